"""The inputs and results of a part of `benchmarks.torture`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from benchmarks.torture_children import Children
from benchmarks.torture_pair import KnownStates

__all__ = ["Outcome", "Tools", "counted"]


@dataclass(frozen=True)
class Tools:
    """What the parts share.

    Attributes:
      step: the compiled step of `torture_pair`.
      known: the states of an unbroken run of it.
      children: processes that fork children, one at a time each.
      folder: to write into.
      bar: to be moved once for each of N.
    """

    step: Any
    known: KnownStates
    children: Sequence[Children]
    folder: Path
    bar: tqdm


class Outcome(NamedTuple):
    """What a part came to.

    Attributes:
      result: in words.
      reached: whether that is what was aimed for.
      figures: for the JSON file.
    """

    result: str
    reached: bool
    figures: Mapping[str, Any]


def counted(good: int, n: int) -> str:
    """Returns e.g. `99 of 100`."""
    return f"{good} of {n}"
