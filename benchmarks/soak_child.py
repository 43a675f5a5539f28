"""The separate processes of `benchmarks.soak`: disturbed training, and thousands of saves.

    python -m benchmarks.soak_child serve STEP_FILE

As in `benchmarks.torture_child`, children are forked, and report in lines of JSON.
"""

import contextlib
import itertools
import logging
import os
import resource
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import merge_jax as mj
from benchmarks.memory import memory_now
from benchmarks.torture_child import say, serve
from benchmarks.torture_pair import digest, initial_state, joint_step, load_step, shapes, spoiled_batches_at
from merge_jax.runs import MetricsLog, RunFolder

__all__ = ["REPORT_EVERY", "RUN", "checkpoints_of"]

RUN = "pair-seed0"
"""The name of the run in the folder."""
REPORT_EVERY = 5
"""Steps between two records of metrics."""

_PAUSE = 0.002  # Seconds between steps, as data takes them.


def checkpoints_of(folder: Path) -> Path:
    """Returns where in a run folder the steps are."""
    return folder / "checkpoints" / RUN


def _train(folder: Path, step_file: Path, **options: Any) -> None:
    """Trains, and says how it ended: `stopped` with the state, or `failed` with the error."""
    try:
        _train_on(folder, step_file, **options)
    except Exception as error:
        say("failed", type(error).__name__, str(error)[:600])
        raise


def _train_on(
    folder: Path,
    step_file: Path,
    *,
    save_every: int = REPORT_EVERY,
    steps: int = 3000,
    wait: bool = True,
    compiles: bool = False,
    clock: Sequence[float] = (),
    largest_file: int | None = None,
    all_spoiled: bool = False,
) -> None:
    """Trains in a run folder, resumed where there is a run, until `steps` more are done or a signal stops it.

    Args:
      folder: the run folder.
      step_file: the compiled step.
      save_every: steps between two saves.
      steps: to be done, if nothing happens.
      wait: whether each save is waited for, so that its end is known at once.
      compiles: compile the step, as another version of JAX must.
      clock: what the clock is off by, in seconds, one after the other, each for half a second.
      largest_file: bytes that a file may have.
      all_spoiled: no batch is finite.
    """
    if clock:
        _jump(itertools.cycle(clock))
    advance = jax.jit(joint_step) if compiles else load_step(step_file)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    def batches(step: int) -> Mapping[str, mj.Batch]:
        time.sleep(_PAUSE)
        found = spoiled_batches_at(step)
        if all_spoiled:
            for batch in found.values():
                batch["image"][:] = np.nan
        return found

    run = RunFolder.open(folder, {"soak": True}, resume=(folder / "config.json").exists())
    log = MetricsLog(run)
    with (
        contextlib.closing(run),
        mj.Checkpoints(checkpoints_of(folder), facts={"batches": "torture_pair"}) as checkpoints,
        mj.StopSignals() as signals,
    ):
        step, state, said = _restored(checkpoints)
        with log.writer(RUN, step) as writer:
            recorded = [record["step"] for record in log.records()]
            complete = recorded == list(range(REPORT_EVERY, step + 1, REPORT_EVERY))
            say("restored", step, digest(state), said, complete)

            def report(step: int, metrics: Mapping[str, float], state: mj.JointState) -> None:
                del state
                writer.write(step, {name: float(value) for name, value in metrics.items()})

            state = mj.run_loop(
                mj.stepwise(advance, batches),
                state,
                num_steps=step + steps,
                report_every=REPORT_EVERY,
                report=report,
                checkpoints=_Telling(checkpoints, wait),  # pyright: ignore[reportArgumentType]
                checkpoint_every=save_every,
                should_stop=signals.should_stop,
            )
    say("stopped", int(state.step), digest(state))
    raise SystemExit(128 + (signals.received or 0))


def _restored(checkpoints: mj.Checkpoints) -> tuple[int, mj.JointState, list[str]]:
    """Returns the newest step, its state and what was said about it; where nothing is saved, the initial state."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step, state = checkpoints.restore_latest(shapes()[0]) or (0, initial_state())
    # Orbax leaves tasks behind when a file that it reads is damaged, and Python says so.
    return (
        step,
        state,
        [f"{one.category.__name__}: {one.message}" for one in caught if "coroutine" not in str(one.message)],
    )


class _Telling:
    """Checkpoints that say which saves have ended."""

    def __init__(self, checkpoints: mj.Checkpoints, wait: bool):
        self._checkpoints, self._wait = checkpoints, wait
        self._begun: list[int] = []

    def save(self, step: int, state: Any, *, score: float | None) -> None:
        self._checkpoints.save(step, state, score=score)
        self._begun.append(step)
        if self._wait:
            self._checkpoints.wait()
        # Otherwise the one before may be about to be written, and the one before that has ended.
        for ended in self._begun[: None if self._wait else -2]:
            say("finished", ended)
            self._begun.remove(ended)


def _jump(offsets: itertools.cycle) -> None:
    """Puts the clock that Python's code sees off by the next of some seconds, every half second."""
    true_time, true_ns = time.time, time.time_ns
    off = [next(offsets)]
    time.time = lambda: true_time() + off[0]
    time.time_ns = lambda: true_ns() + int(off[0] * 1e9)

    def move() -> None:
        while True:
            time.sleep(0.5)
            off[0] = next(offsets)

    threading.Thread(target=move, daemon=True).start()


def _save_often(folder: Path, step_file: Path, *, saves: int, samples: int = 20) -> None:
    """Saves a small state many times, and says how much memory and how many files and threads there are."""
    del step_file
    _say_size(0)
    every = max(1, saves // samples)
    with mj.Checkpoints(folder) as checkpoints:
        for step in range(1, saves + 1):
            checkpoints.save(step, {"kernel": np.full((16, 16), step, np.float32), "step": np.int32(step)}, score=step)
            if step % every == 0:
                checkpoints.wait()
                _say_size(step)
    with mj.Checkpoints(folder, read_only=True) as checkpoints:
        newest = checkpoints.latest_step or 0
        arrays = checkpoints.restore_arrays(newest)
    say("stopped", newest, bool(np.all(arrays["kernel"] == saves) and arrays["step"] == saves))


def _say_size(step: int) -> None:
    files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
    say("size", step, memory_now("VmRSS"), files, threads)


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs whole tracebacks of what is damaged on purpose.
    serve(Path(sys.argv[2]), {"train": _train, "save often": _save_often})
