"""What memory is free."""

from pathlib import Path

import jax

__all__ = ["free_memory"]

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Returns the bytes that are free on the first device; None where nothing tells.

    Of a CPU they are what Linux calls available, or what is left of a container's limit where that is less.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    free = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * int(lines["MemAvailable"].split()[0]))
        limit, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        free.append(int(limit) - int(used))
    except (OSError, KeyError, ValueError):
        pass  # Not Linux, or no limit ("max").
    return min(free, default=None)
