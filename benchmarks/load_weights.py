"""Compares weights mapped from a file and read once with `safetensors.numpy` and with copied formats.

`python -m benchmarks.load_weights`: a file of 200 MB; `--gigabytes 4` for a larger one, `--formats` for fewer formats.
Memory is a process's peak beyond its memory before reading, as a multiple of the leaves' bytes; all leaves are summed,
so that every number is read.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
from safetensors.numpy import load_file, save_file

import merge_jax as mj
from benchmarks.apart import measure_apart
from benchmarks.memory import memory_now

__all__ = ["main", "measure"]

_LEAVES = 8


def _save_msgpack(leaves: dict[str, np.ndarray], path: Path) -> None:
    path.write_bytes(flax.serialization.to_bytes(leaves))


_FORMATS: dict[str, Callable[[dict[str, np.ndarray], Path], Any]] = {
    "safetensors": save_file,
    "npz": lambda leaves, path: np.savez(path, **leaves),  # pyright: ignore[reportArgumentType]
    "msgpack": _save_msgpack,
}
_READERS: dict[str, Callable[[str], dict[str, np.ndarray]]] = {
    "merge_jax": lambda path: mj.load_weights(path),
    "merge_jax, one leaf of 8": lambda path: mj.load_weights(path, select="w0"),
    "safetensors.numpy": load_file,
}


def measure(reader: str, path: str) -> dict[str, float]:
    """Returns seconds, bytes of the leaves and of memory beyond those before, of reading a file and summing it."""
    mj.load_weights(path, select="tiny")  # What is imported with the first call is none of the second's.
    Path("/proc/self/clear_refs").write_text("5")  # The highest memory is the present one.
    before, start = memory_now("VmRSS"), time.perf_counter()
    leaves = _READERS[reader](path)
    for leaf in leaves.values():
        leaf.sum(dtype=np.float64)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": sum(leaf.nbytes for leaf in leaves.values()),
        "memory": memory_now("VmHWM") - before,
    }


def main(arguments: list[str] | None = None) -> None:
    """Writes files of each format, reads each in processes of their own, and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=_FORMATS, default=list(_FORMATS))
    options = parser.parse_args(arguments)
    size = int(options.gigabytes * 1e9 / 4 / _LEAVES)
    random = np.random.default_rng(0)
    leaves = {f"w{i}": random.random(size, np.float32) for i in range(_LEAVES)} | {"tiny": np.ones(1, np.float32)}
    print(
        "| format | reader | s | to safetensors.numpy | memory / bytes of the leaves |\n| --- | --- | --- | --- | --- |"
    )
    beside = {"seconds": float("nan")}
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.formats:
            path = Path(folder) / f"m.{kind}"
            _FORMATS[kind](leaves, path)
            if kind == "npz":
                path = path.with_suffix(".npz")
            readers = [name for name in _READERS if kind == "safetensors" or name.startswith("merge_jax")]
            found = {name: _median(name, path, options.repetitions) for name in readers}
            beside = found.get("safetensors.numpy", beside)
            for name, one in found.items():
                times, memory = one["seconds"] / beside["seconds"], one["memory"] / one["bytes"]
                print(f"| {kind} | {name} | {one['seconds']:.3f} | {times:.2f} | {memory:.2f} |")
            path.unlink()


def _median(reader: str, path: Path, repetitions: int) -> dict[str, float]:
    """Returns the median of each figure, over processes that have read nothing before."""
    runs = [measure_apart("benchmarks.load_weights", reader, str(path)) for _ in range(repetitions)]
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}


if __name__ == "__main__":
    main()
