"""Fault injection for the library: kills, flipped bits, damage, signals, non-finite numbers.

    python -m benchmarks.torture                       # all parts, each within a minute on two cores
    python -m benchmarks.torture --parts kills flips   # some of them
    python -m benchmarks.torture --scale 0.1           # a tenth of each N

Every part counts correct outcomes out of N, with a seed, without assertions. Only processes are killed: their writes
remain in the caches of a running system, so power loss is not covered. Everything runs on the CPU. A part's seconds
exclude the start of Python, which all parts share.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
from rich.console import Console
from tqdm.auto import tqdm

from benchmarks.damage import DAMAGE
from benchmarks.report import parse_config, report
from benchmarks.torture_children import Children
from benchmarks.torture_files import damage, flips
from benchmarks.torture_numbers import nan, resume
from benchmarks.torture_overhead import digests, overhead
from benchmarks.torture_pair import KnownStates, compile_step
from benchmarks.torture_part import Outcome, Tools
from benchmarks.torture_processes import frozen, kills, peer, sigterm, writer

__all__ = ["PARTS", "Config", "Part", "prepare"]

PartName = Literal[
    "kills", "flips", "damage", "resume", "sigterm", "nan", "peer", "frozen", "writer", "overhead", "digests"
]


class Part(NamedTuple):
    """One part.

    Attributes:
      what: is done.
      n: how often.
      aim: what was aimed for.
      function: does it: `(tools, n, seed) -> outcome`.
    """

    what: str
    n: int
    aim: str
    function: Callable[[Tools, int, int], Outcome]


_KINDS = len(DAMAGE) - (os.geteuid() == 0)  # Root may read what nobody may.

PARTS: dict[PartName, Part] = {
    "kills": Part("kill -9 while every step is saved, restart", 100, "100 of 100, 0 lost", kills),
    "flips": Part("one bit of a saved step flipped", 1000, "0 silent", flips),
    "damage": Part("the newest of three steps damaged, each in its own way", _KINDS, "all", damage),
    "resume": Part("10 steps, cut in two, against an unbroken run", 6, "6 of 6 bit-equal", resume),
    "sigterm": Part("SIGTERM to a training loop", 10, "10 of 10 saved where they stopped", sigterm),
    "nan": Part("steps, a tenth of them on batches with NaN", 200, "20 of 20, as without them", nan),
    "peer": Part("kill -9 to one of two processes", 1, "the other ends with our message, under 10 s", peer),
    "frozen": Part("one of two processes stopped for ever", 1, "the other ends with our message, under 10 s", frozen),
    "writer": Part("a second process writes into a folder", 10, "10 of 10 refused, under 2 s", writer),
    "overhead": Part("time that save blocks, of that between two saves", 5, "under 5 %", overhead),
    "digests": Part("digests of 64 MB", 9, "under 1 s/GB", digests),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    parts: tuple[PartName, ...] = get_args(PartName)
    """Parts to do."""
    scale: float = 1.0
    """Fraction of each N; at least one of it is done."""
    seed: int = 0
    """Seed of all that is random."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        if not self.parts:
            raise ValueError(f"parts must name at least one of {', '.join(get_args(PartName))}")
        if not 0 < self.scale < float("inf") or self.seed < 0:
            raise ValueError(f"scale must be above 0, seed 0 or more, got {self.scale} and {self.seed}")


@contextlib.contextmanager
def prepare(folder: Path) -> Iterator[Tools]:
    """Yields what the parts share: the compiled step, and two processes that fork children."""
    step_file = folder / "step"
    step = compile_step(step_file)
    with Children(step_file) as first, Children(step_file) as second:
        yield Tools(step, KnownStates(step), (first, second), folder, tqdm(disable=True))


def main() -> None:
    """Runs the benchmark; prints a table and writes JSON."""
    config = parse_config({"default": Config()}, "benchmarks.torture", __doc__, Config.check)
    jax.config.update("jax_platforms", "cpu")
    rows, figures = [], {}
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with Console(stderr=True).status("compiling"):
            tools = stack.enter_context(prepare(temporary))
        for name in config.parts:
            what, part_n, aim, function = PARTS[name]
            n = max(1, round(config.scale * part_n))
            folder = temporary / name
            folder.mkdir(exist_ok=True)
            start = time.perf_counter()
            with tqdm(total=n, desc=name, leave=False) as bar:
                outcome = function(replace(tools, folder=folder, bar=bar), n, config.seed)
            seconds = time.perf_counter() - start
            mark = "" if outcome.reached else " (missed)"
            rows.append((f"{name}: {what}", str(n), str(config.seed), outcome.result + mark, aim, f"{seconds:.1f}"))
            figures[name] = {
                "n": n,
                "result": outcome.result,
                "aim": aim,
                "reached": outcome.reached,
                "seconds": seconds,
                **outcome.figures,
            }
    notes = "process death, not power loss; seconds are those of a part, without the start of Python"
    report("torture", config, ("what was done", "N", "seed", "result", "aimed for", "s"), rows, figures, notes)


if __name__ == "__main__":
    main()
