"""The benchmark of streamed sources runs, and what is streamed takes less memory."""

import sys

import pytest

from benchmarks import stream_source


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_copies_take_less_where_the_source_is_streamed(capsys):
    stream_source.main(["--size", "small", "--layers", "32", "--methods", "copies"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    memory = {row[3]: int(row[4]) for row in rows}
    source = int(rows[0][2])
    assert memory["streamed"] < source / 2
    assert memory["streamed"] < memory["loaded"] - source / 2
