"""Trains a stage, on one seed or on several side by side, from its newest checkpoint on."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Lowered
from tqdm.auto import tqdm

from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.runs.folder import MetricsLog, RunFolder
from merge_jax.study.trial import Stage
from merge_jax.training.joint import JointState, TrainState
from merge_jax.training.loop import run_loop
from merge_jax.training.seeds import stack_arrays, stack_seeds, unstack_seeds
from merge_jax.training.sharding import Layout
from merge_jax.training.signals import StopSignals
from merge_jax.types import Metrics

__all__ = ["Compiled", "Outcome", "RunStoppedError", "Trainer", "cell_name", "compile_epoch", "steps_per_call"]


class Compiled(NamedTuple):
    """A compiled epoch, and how long its compilation took, in seconds."""

    epoch: Any
    seconds: float


class RunStoppedError(Exception):
    """A signal has stopped the run; the step that it reached is saved."""


class Outcome(NamedTuple):
    """What training one stage on one seed came to.

    Attributes:
      state: at the last step.
      seconds: that it was trained, evaluation included, before interruptions too; where seeds ran side by side, one's
        share.
    """

    state: JointState
    seconds: float


def steps_per_call(stage: Stage) -> int:
    """Returns how many steps one call of a compiled epoch takes: all between two reports.

    On a CPU at most ten: calls cost nothing there, steps take long, and the progress bar should move. As many where
    examples are streamed, since those of all its steps are in memory.
    """
    most = stage.lengths.report_every
    return min(most, 10) if stage.streams or jax.default_backend() == "cpu" else most


def compile_epoch(lowered: Lowered) -> Compiled:
    """Compiles a traced epoch."""
    start = time.perf_counter()
    epoch = lowered.compile()
    return Compiled(epoch, time.perf_counter() - start)


def cell_name(stage: Stage, seeds: Sequence[int]) -> str:
    """Returns the name of the checkpoints of seeds that train together."""
    return f"{stage.name}-seeds{seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else f"{stage.name}-seed{seeds[0]}"


class Trainer:
    """Trains stages; it holds what all of them share."""

    def __init__(
        self,
        layout: Layout,
        lowered: Mapping[str, Lowered],
        compiled: Mapping[str, Compiled],
        folder: RunFolder,
        log: MetricsLog,
        bar: tqdm,
        signals: StopSignals,
    ):
        """Takes how a run lies on devices, the traced stages, those compiled, where to write, and what may stop it."""
        self._layout, self._lowered, self._compiled = layout, lowered, dict(compiled)
        self._folder, self._log, self._bar = folder, log, bar
        self._signals = signals

    def skip(self, stage: Stage, seeds: Sequence[int]) -> None:
        """Counts a stage that was trained before as done."""
        self._count_as_done(stage.lengths.steps * len(seeds))

    def _count_as_done(self, steps: int) -> None:
        if not self._bar.disable:
            self._bar.initial += steps  # Not of this session, so not of its pace.
            self._bar.update(steps)

    def compile_seconds(self, stage: Stage) -> float:
        """Returns how long the stage's epoch compiled; 0 where that was not needed."""
        return self._compiled[stage.name].seconds if stage.name in self._compiled else 0.0

    def tell(self, line: str) -> None:
        """Prints a line on standard error, above the bar; of several processes, the first speaks for all."""
        if jax.process_index() == 0:
            self._bar.write(line, file=sys.stderr)

    def train(self, stage: Stage, seeds: Sequence[int], sources: Sequence[TrainState]) -> list[Outcome]:
        """Returns the outcome of each seed; several train side by side in one program.

        Raises:
          RunStoppedError: a signal asked for it.
        """
        stacked = len(seeds) > 1
        cell = cell_name(stage, seeds)
        self._bar.set_postfix_str(cell)
        states = [stage.initial_state(seed, source) for seed, source in zip(seeds, sources, strict=True)]
        state = self._layout.put_state(stack_seeds(states) if stacked else states[0])
        with (
            Checkpoints(self._folder.checkpoints / cell, keep=stage.keep, facts=stage.facts(seeds)) as checkpoints,
            contextlib.ExitStack() as open_files,
        ):
            first, state = checkpoints.restore_latest(state) or (0, state)
            self._count_as_done(first * len(seeds))
            if 0 < first < stage.lengths.steps:
                self.tell(f"{cell} goes on from step {first} of {stage.lengths.steps}")
            timed = f"checkpoints/{cell}/seconds.json"  # Up to each report, so that a run which goes on counts on.
            seconds = {step: s for step, s in self._folder.read_json(timed, {}).items() if int(step) <= first}
            before = seconds.get(str(first), 0.0)
            writers = [open_files.enter_context(self._log.writer(f"{stage.name}-seed{seed}", first)) for seed in seeds]

            def count_seconds(step: int) -> None:
                seconds[str(step)] = before + time.perf_counter() - start
                self._folder.write_json(timed, seconds)

            def report(step: int, metrics: dict[str, Any], state: JointState) -> float | None:
                scores = []
                for i, (writer, one) in enumerate(zip(writers, _each(state, stacked), strict=True)):
                    own = {name: float(value[i] if stacked else value) for name, value in metrics.items()}
                    validated = stage.validate(one, seeds[i])
                    writer.write(step, own | validated)
                    scores.append(validated.get(f"target/validation_{stage.roles['target'].metric}"))
                count_seconds(step)
                known = [score for score in scores if score is not None]
                return sum(known) / len(known) if known else None

            if first < stage.lengths.steps and stage.name not in self._compiled:
                # Its last checkpoint was there, but is damaged.
                self._compiled[stage.name] = compile_epoch(self._lowered[stage.name])
            start = time.perf_counter()
            state = run_loop(
                self._advance(stage, seeds, open_files),
                state,
                num_steps=stage.lengths.steps,
                report_every=stage.lengths.report_every,
                report=report,
                steps_per_call=steps_per_call(stage),
                checkpoints=checkpoints,
                checkpoint_every=stage.lengths.checkpoint_every,
                on_steps=lambda count: self._bar.update(count * len(seeds)),
                should_stop=self._signals.should_stop,
            )
            last = int(state.step)
            count_seconds(last)
        if last < stage.lengths.steps:
            raise RunStoppedError(f"{cell} at step {last} of {stage.lengths.steps}")
        return [Outcome(one, seconds[str(last)] / len(seeds)) for one in _each(state, stacked)]

    def _advance(self, stage: Stage, seeds: Sequence[int], open_files: contextlib.ExitStack) -> Any:
        """Returns the stage's compiled epoch with its data, as the loop wants it."""
        if stage.name not in self._compiled:  # Nothing is left of it to train.
            return None
        epoch, most = self._compiled[stage.name].epoch, steps_per_call(stage)

        def put(arrays: Sequence[Any]) -> Any:
            return self._layout.put_arrays(stack_arrays(arrays) if len(seeds) > 1 else arrays[0])

        def put_indices(indices: Sequence[Any]) -> Any:
            return self._layout.put_indices(stack_arrays(indices) if len(seeds) > 1 else indices[0])

        # Always as many rows as were compiled for; those after `count` are not read.
        if stage.streams:
            readers = [open_files.enter_context(stage.read_ahead(seed, most)) for seed in seeds]

            def advance(state: JointState, first: int, count: int) -> tuple[JointState, Metrics]:
                arrays, indices = zip(*(reader.read(first, count) for reader in readers), strict=True)
                return epoch(state, put(arrays), put_indices(indices), np.int32(count))
        else:
            arrays = put([stage.arrays(seed) for seed in seeds])
            indices_at = [stage.indices_at(seed) for seed in seeds]

            def advance(state: JointState, first: int, count: int) -> tuple[JointState, Metrics]:
                return epoch(state, arrays, put_indices([at(first, most) for at in indices_at]), np.int32(count))

        return advance


def _each(state: JointState, stacked: bool) -> list[JointState]:
    return unstack_seeds(state) if stacked else [state]
