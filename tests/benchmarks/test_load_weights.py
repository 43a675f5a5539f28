"""The benchmark of reading weights runs, and what it promises of memory holds."""

import sys

import pytest

from benchmarks import load_weights


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_what_is_mapped_takes_no_memory_beside_the_leaves(capsys):
    load_weights.main(["--gigabytes", "0.1", "--repetitions", "1", "--formats", "safetensors"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    memory = {row[1]: float(row[-1].rstrip("| ")) for row in rows}
    assert memory.keys() == {"merge_jax", "merge_jax, one leaf of 8", "safetensors.numpy"}
    assert memory["merge_jax"] <= 1.2
    assert memory["merge_jax, one leaf of 8"] <= 1.2
