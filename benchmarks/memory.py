"""Memory of this process and of trees of arrays."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import jax

__all__ = ["bytes_of", "give_back", "memory_now", "peak_bytes", "trim"]


def bytes_of(tree: Any) -> int:
    """Returns the bytes of all leaves, arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def peak_bytes() -> int:
    """Returns the highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # In KiB everywhere but on macOS.


def memory_now(kind: str) -> int:
    """Returns the memory of this process in bytes, by its name in Linux's `/proc/self/status`; on Linux alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def give_back() -> None:
    """Frees what nothing refers to, and gives free memory back to the system, as `trim`."""
    gc.collect()
    trim()


def trim() -> None:
    """Gives the memory that is free back to the system, where the C library is GNU's, which keeps some otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
