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
    """A signal has stopped the run; the current step is saved."""


class Trained(NamedTuple):
    """The result of training one trial on one seed.

    Attributes:
      state: the state at the last step.
      seconds: the training time, including evaluation and earlier sessions.
      compile_seconds: the compilation time of its epoch; 0 if not compiled.
      start: measurements of the target before the first step; empty if not measured.
      records: its reports, in order.
    """

    state: JointState
    seconds: float
    compile_seconds: float
    start: Mapping[str, float | None]
    records: Sequence[Mapping[str, Any]]


class Programs:
    """The epochs of all trials by name, each compiled once on first use.

    Attributes:
      seconds: the compilation times of those used, by name.
    """

    def __init__(self, lowered: Mapping[str, Lowered]):
        """Takes the traced epochs."""
        self.seconds: dict[str, float] = {}
        self._lowered = lowered
        self._epochs: dict[str, Any] = {}

    def compile(self, name: str, place: str = "") -> Any:
        """Returns the compiled epoch, and prints the compilation time: on a CPU, it may exceed the training time.

        Args:
          name: the trial's name.
          place: its position among the programs, in words.
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
    """Trains trials, and holds their shared objects."""

    def __init__(self, layout: Layout, programs: Programs, folder: RunFolder, bar: tqdm, signals: StopSignals):
        """Takes the device layout, the compiled trials, the run folder, and the stop signals."""
        self._layout, self._programs = layout, programs
        self._folder, self._log, self._bar = folder, MetricsLog(folder), bar
        self._signals = signals

    def announce(self, line: str) -> None:
        """Prints a line on standard error, above the bar; only the first of several processes prints."""
        if jax.process_index() == 0:
            self._bar.write(line, file=sys.stderr)

    def train(self, trial: Trial, seed: int, source: TrainState) -> Trained:
        """Trains a trial on a seed, and returns the result.

        Raises:
          RunStoppedError: a signal requested a stop.
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
                self._bar.initial += first  # From an earlier session, so not part of this one's pace.
                self._bar.update(first)
            timed = f"checkpoints/{name}/seconds.json"  # Up to each report, so that a resumed run continues the count.
            seconds = {step: s for step, s in self._folder.read_json(timed, {}).items() if int(step) <= first}
            before = seconds.get(str(first), 0.0)
            if first < num_steps:
                if first > 0:
                    self.announce(f"{name} goes on from step {first} of {num_steps}")
                writer = open_files.enter_context(self._log.writer(name, first))
                self._programs.compile(trial.name)  # If the last checkpoint is damaged, this is known only now.
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
        """Returns the step from which a trial continues, and its state: the saved or the initial one."""
        restored = checkpoints.restore_latest(self._layout.put_state(blank))
        if restored is not None:
            return restored
        state = trial.initial_state(seed, source) if trial.prepares else blank
        # Saved, since a resumed run no longer has its initial state.
        self._folder.write_json(f"checkpoints/{trial.run_name(seed)}/{_START}", trial.measure_start(state, seed))
        return 0, self._layout.put_state(state)

    def _make_advance(
        self, trial: Trial, seed: int, source: TrainState, open_files: contextlib.ExitStack
    ) -> Advance[JointState]:
        """Returns the trial's compiled epoch with its data, in the form that the loop needs."""
        epoch, layout, most = self._programs.compile(trial.name), self._layout, trial.steps_per_call

        # Always the compiled number of rows; those after `count` are not read.
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
