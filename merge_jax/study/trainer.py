"""Trains a trial on one seed, from its newest checkpoint on."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Lowered
from rich.console import Console
from tqdm.auto import tqdm

from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.runs.folder import MetricsLog, RunFolder
from merge_jax.study.trial import Trial
from merge_jax.training.compilation_cache import programs_read
from merge_jax.training.joint import JointState, TrainState
from merge_jax.training.loop import Advance, run_loop
from merge_jax.training.sharding import Layout
from merge_jax.training.signals import StopSignals
from merge_jax.types import Metrics

__all__ = ["Programs", "RunStoppedError", "Trained", "Trainer"]

_START = "start.json"


class RunStoppedError(Exception):
    """A signal has stopped the run; the step that it reached is saved."""


class Trained(NamedTuple):
    """What training one trial on one seed came to.

    Attributes:
      state: at the last step.
      seconds: that it was trained, evaluation included, before interruptions too.
      compile_seconds: how long its epoch compiled; 0 where that was not needed.
      start: what the target was worth before the first step; empty where that was not measured.
      records: its reports, in order.
    """

    state: JointState
    seconds: float
    compile_seconds: float
    start: Mapping[str, float | None]
    records: Sequence[Mapping[str, Any]]


class Programs:
    """The epochs of all trials by name, each compiled once, when it is first asked for.

    Attributes:
      seconds: how long the compilation of those took that were asked for, by name.
    """

    def __init__(self, lowered: Mapping[str, Lowered]):
        """Takes the traced epochs."""
        self.seconds: dict[str, float] = {}
        self._lowered = lowered
        self._epochs: dict[str, Any] = {}

    def compile(self, name: str, place: str = "") -> Any:
        """Returns the compiled epoch, and says how long that took: on a CPU, it may be longer than the training.

        Args:
          name: of the trial.
          place: which of how many programs it is, in words.
        """
        if name not in self._epochs:
            with Console(stderr=True).status(f"compiling {name}{place}"):
                before, start = programs_read(), time.perf_counter()
                self._epochs[name] = self._lowered[name].compile()
                self.seconds[name] = time.perf_counter() - start
            cached = " (read from the compilation cache)" if programs_read() > before else ""
            print(f"compiled {name}{place}: {self.seconds[name]:.0f} s{cached}", file=sys.stderr)
        return self._epochs[name]


class Trainer:
    """Trains trials; it holds what all of them share."""

    def __init__(self, layout: Layout, programs: Programs, folder: RunFolder, bar: tqdm, signals: StopSignals):
        """Takes how a run lies on devices, the compiled trials, where to write, and what may stop it."""
        self._layout, self._programs = layout, programs
        self._folder, self._log, self._bar = folder, MetricsLog(folder), bar
        self._signals = signals

    def announce(self, line: str) -> None:
        """Prints a line on standard error, above the bar; of several processes, the first speaks for all."""
        if jax.process_index() == 0:
            self._bar.write(line, file=sys.stderr)

    def train(self, trial: Trial, seed: int, source: TrainState) -> Trained:
        """Returns what training a trial on a seed came to.

        Raises:
          RunStoppedError: a signal asked for it.
        """
        name, num_steps = trial.run_name(seed), trial.lengths.steps
        self._bar.set_postfix_str(name)
        facts = trial.facts(seed)
        state = trial.blank_state(seed, source)
        with (
            Checkpoints(self._folder.checkpoints / name, keep=trial.keep, facts=facts) as checkpoints,
            contextlib.ExitStack() as open_files,
        ):
            first, state = self._first_state(trial, seed, source, state, checkpoints)
            if not self._bar.disable:
                self._bar.initial += first  # Not of this session, so not of its pace.
                self._bar.update(first)
            timed = f"checkpoints/{name}/seconds.json"  # Up to each report, so that a run which goes on counts on.
            seconds = {step: s for step, s in self._folder.read_json(timed, {}).items() if int(step) <= first}
            before = seconds.get(str(first), 0.0)
            if first < num_steps:
                if first > 0:
                    self.announce(f"{name} goes on from step {first} of {num_steps}")
                writer = open_files.enter_context(self._log.writer(name, first))
                self._programs.compile(trial.name)  # Where the last checkpoint is damaged, only now.
                start = time.perf_counter()
                advance = self._make_advance(trial, seed, source, open_files)

                def count_seconds(step: int) -> None:
                    seconds[str(step)] = before + time.perf_counter() - start
                    self._folder.write_json(timed, seconds)

                def report(step: int, metrics: dict[str, Any], state: JointState) -> float | None:
                    validated = trial.validate(state, seed)
                    writer.write(step, {metric: float(value) for metric, value in metrics.items()} | validated)
                    count_seconds(step)
                    return validated.get(f"target/validation_{trial.roles['target'].metric}")

                state = run_loop(
                    advance,
                    state,
                    num_steps=num_steps,
                    report_every=trial.lengths.report_every,
                    report=report,
                    steps_per_call=trial.steps_per_call,
                    checkpoints=checkpoints,
                    checkpoint_every=trial.lengths.checkpoint_every,
                    on_steps=self._bar.update,
                    should_stop=self._signals.should_stop,
                )
                count_seconds(int(state.step))
        last = int(state.step)
        if last < num_steps:
            raise RunStoppedError(f"{name} at step {last} of {num_steps}")
        start_measures = self._folder.read_json(f"checkpoints/{name}/{_START}", {})
        records = [record for record in self._log.records() if record["run"] == name]
        compiling = self._programs.seconds.get(trial.name, 0.0)
        return Trained(state, seconds.get(str(last), 0.0), compiling, start_measures, records)

    def _first_state(
        self, trial: Trial, seed: int, source: TrainState, blank: JointState, checkpoints: Checkpoints
    ) -> tuple[int, JointState]:
        """Returns the step that a trial goes on from, and its state: the saved one, or that before the first step."""
        restored = checkpoints.restore_latest(self._layout.put_state(blank))
        if restored is not None:
            return restored
        state = trial.initial_state(seed, source) if trial.prepares else blank
        # Kept, since a run that goes on has the state before its first step no more.
        self._folder.write_json(f"checkpoints/{trial.run_name(seed)}/{_START}", trial.measure_start(state, seed))
        return 0, self._layout.put_state(state)

    def _make_advance(
        self, trial: Trial, seed: int, source: TrainState, open_files: contextlib.ExitStack
    ) -> Advance[JointState]:
        """Returns the trial's compiled epoch with its data, as the loop wants it."""
        epoch, layout, most = self._programs.compile(trial.name), self._layout, trial.steps_per_call

        # Always as many rows as were compiled for; those after `count` are not read.
        if trial.streams:
            reader = open_files.enter_context(trial.read_ahead(seed))

            def advance(state: JointState, first: int, count: int) -> tuple[JointState, Metrics]:
                arrays, indices = reader.read(first, count)
                return epoch(state, layout.put_arrays(arrays), layout.put_indices(indices), np.int32(count))
        else:
            arrays, indices_at = layout.put_arrays(trial.shown_arrays(seed, source)), trial.indices_at(seed)

            def advance(state: JointState, first: int, count: int) -> tuple[JointState, Metrics]:
                return epoch(state, arrays, layout.put_indices(indices_at(first, most)), np.int32(count))

        return advance
