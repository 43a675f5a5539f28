"""Disturbs a training run for hours; compares every resumed run with an undisturbed one.

    python -m benchmarks.soak --hours 2 --seed 0
    python -m benchmarks.soak --hours 2 --other-python OTHER_ENVIRONMENT/bin/python   # resumed under another JAX too
    python -m benchmarks.soak_table runs/benchmarks/soak.json                         # the table of its figures

Until the time is over, separate processes train a tiny pair. Each is killed (`kill -9`), asked to stop (SIGTERM), or
given a full disk, batches with NaN, a damaged newest checkpoint, changed file dates and a jumping clock, a second
writer, or another version of JAX. After each event the run is resumed: its state must equal that of an undisturbed run,
bit for bit, and no completed save may be missing. In addition, one process saves 10,000 times while its memory and open
files are measured. Figures are written after each event, so a soak can be stopped early.
"""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.report import parse_config
from benchmarks.soak_events import EVENTS
from benchmarks.soak_run import Soak, Tally
from benchmarks.soak_table import table_of
from benchmarks.torture_children import Children
from benchmarks.torture_pair import KnownStates, compile_step, spoiled_batches_at
from merge_jax.runs import describe_environment

__all__ = ["Config", "disturb", "save_often"]

_EVENTS_OF_A_RUN = 30


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    hours: float = 2.0
    """Hours that it takes."""
    seed: int = 0
    """Seed of which event comes when, and how long it takes to come."""
    saves: int = 10_000
    """Saves of the process whose memory and open files are measured; 0 for none."""
    other_python: str | None = None
    """Python of an environment with another version of JAX; without, none is tried."""
    out: Path = Path("runs/benchmarks/soak.json")
    """File of the figures."""

    def check(self) -> None:
        """Raises ValueError for an option out of range, FileNotFoundError for a Python that is not there."""
        if not 0 < self.hours < float("inf") or self.seed < 0 or self.saves < 0:
            raise ValueError(
                f"hours must be above 0, seed and saves 0 or more, got {self.hours}, {self.seed} and {self.saves}"
            )
        if self.other_python is not None and not os.access(self.other_python, os.X_OK):
            raise ValueError(f"other_python must be a Python that can be run, got {self.other_python}")


def save_often(children: Children, folder: Path, saves: int, figures: dict[str, Any]) -> None:
    """Saves so often in one process, and adds its memory in bytes, open files and threads to `figures` as they come."""
    figures.update(n=saves, whole=False, sizes=[])
    children.start("save often", folder, saves=saves)
    word = ""
    while word != "ended":
        word, *values = children.until("size")[-1] if word != "stopped" else children.until("ended")[-1]
        if word == "size":
            figures["sizes"].append(dict(zip(("saves", "rss", "files", "threads"), values, strict=True)))
            if values[0] == saves:
                word, *values = children.until("stopped")[-1]
                figures["whole"] = values == [saves, True]


def disturb(soak: Soak, random: np.random.Generator, name: str) -> bool:
    """Lets one event happen; returns False where it failed, so that the run is given up: a child hangs, say."""
    try:
        EVENTS[name][1](soak, random)
    except Exception as error:  # It goes on for hours, whatever happens.
        soak.tally.figures["events given up"] += 1
        soak.tally.note(f"{name}: {type(error).__name__}: {error}")
        soak.close()
        return False
    soak.tally.events[name] += 1
    return True


def main() -> None:
    """Runs the benchmark; prints a table and writes JSON."""
    config = parse_config({"default": Config()}, "benchmarks.soak", __doc__, Config.check)
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, lambda *unused: (_ for _ in ()).throw(SystemExit(143)))  # What is mounted goes.
    begun, environment = time.monotonic(), describe_environment()
    until, random, tally = begun + config.hours * 3600, np.random.default_rng(config.seed), Tally()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        root = Path(temporary)
        known = KnownStates(compile_step(root / "step"), spoiled_batches_at)
        soak = Soak(root / "run", root / "step", known, tally, config.other_python)
        stack.callback(soak.close)
        many: dict[str, Any] = {}

        def write() -> None:
            content = {
                "config": {name: str(value) for name, value in asdict(config).items()},
                "environment": environment,
                "seconds": round(time.monotonic() - begun),
                "full_disk": soak.mounted,
                "saves": many,
                **vars(tally),
            }
            config.out.parent.mkdir(parents=True, exist_ok=True)
            part = config.out.with_suffix(".part")
            part.write_text(json.dumps(content, indent=2) + "\n")
            part.replace(config.out)

        if config.saves:
            saving = stack.enter_context(Children(root / "step", "benchmarks.soak_child", patience=config.hours * 3600))
            options = saving, root / "many", config.saves, many
            threading.Thread(target=save_often, args=options, daemon=True).start()
        names = [name for name in EVENTS if config.other_python is not None or name != "another JAX"]
        weights = np.array([EVENTS[name][0] for name in names])
        while time.monotonic() < until:
            number = tally.figures["runs"] = tally.figures["runs"] + 1
            soak.folder, soak.finished = root / f"run-{number}", 0
            whole = disturb(soak, random, "sigterm")
            for _ in range(_EVENTS_OF_A_RUN):
                if not whole or time.monotonic() > until:
                    break
                whole = disturb(soak, random, str(random.choice(names, p=weights / weights.sum())))
                write()
            if whole:
                disturb(soak, random, "sigterm")
            write()
            shutil.rmtree(root / f"run-{number}", ignore_errors=True)
    print(table_of(json.loads(config.out.read_text())))
    print(f"written to {config.out}")


if __name__ == "__main__":
    main()
