"""Counts what devices exchange in a compiled program, from its text."""

import math
import re
from collections.abc import Callable

__all__ = ["received_bytes"]

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
# Of a result of so many bytes on one of n devices, what a device receives on a ring.
_RECEIVED: dict[str, Callable[[int, int], float]] = {
    "all-gather": lambda size, n: size * (n - 1) / n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}
_OPERATION = re.compile(rf"= (.+?) ({'|'.join(_RECEIVED)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


def received_bytes(text: str, num_devices: int) -> dict[str, float]:
    """Returns the bytes that a device receives in a program, by the kind of collective.

    A loop counts as often as its text says that it runs, and once where that is not known. Of a branch all ways count.

    Args:
      text: of the compiled program, `jax.stages.Compiled.as_text()`.
      num_devices: that take part in each collective.
    """
    lines_of: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            lines_of[name] = []
            entry = name if found[1] else entry
        elif name:
            lines_of[name].append(line)
    known: dict[str, dict[str, float]] = {}

    def total(name: str) -> dict[str, float]:
        if name not in known:
            sums: dict[str, float] = {}
            for line in lines_of.get(name, ()):
                if found := _OPERATION.search(line):
                    size = _size(found[1]) // (2 if found[3] and found[2] != "all-reduce" else 1)
                    sums[found[2]] = sums.get(found[2], 0.0) + _RECEIVED[found[2]](size, num_devices)
                trips = _TRIPS.search(line)
                times = int(trips[1]) if trips else 1
                called = [*_CALLED.findall(line)]
                for branches in _BRANCHES.findall(line):
                    called += [one.strip().lstrip("%") for one in branches.split(",")]
                for one in called:
                    for kind, size in total(one).items():
                        sums[kind] = sums.get(kind, 0.0) + times * size
            known[name] = sums
        return known[name]

    return total(entry)


def _size(shapes: str) -> int:
    """Returns the bytes of a result, an array or several."""
    found = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(_BYTES[dtype] * math.prod(int(one) for one in sizes.split(",") if one) for dtype, sizes in found)
