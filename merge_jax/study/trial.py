"""The trials of a run: each trains a method, or pre-trains the source, on one seed at a time."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Lowered

from merge_jax.data import Arrays, ReadAhead, Splits, fingerprint, indices_of, is_streamed, num_examples
from merge_jax.paths import flatten, replace, select, some_of
from merge_jax.study.config import RunConfig
from merge_jax.study.measures import FitHead, Measures, make_fit_head, make_measures, observer
from merge_jax.study.models.model import POOL, StudyModel
from merge_jax.study.scenario import FitFn, Lengths, Method, Scenario, StartFn
from merge_jax.study.shown import Shown
from merge_jax.study.sources import OTHER_SEED, SourcePlan, initial_key
from merge_jax.training.epoch import Epoch, augmented, make_epoch
from merge_jax.training.joint import JointState, JointStep, Task, TrainState, init_joint_state, make_joint_step
from merge_jax.training.sharding import Layout
from merge_jax.training.trajectory import last_of, replay_evenly, replayed
from merge_jax.transfers.base import Key, Step, Transfer, writes
from merge_jax.types import Adapter, Batch, Metrics, Params, TeacherFn

__all__ = ["Trial", "keeping", "make_trials"]

Indices = Mapping[str, np.ndarray]
_POOL_STREAM = 2
Digest = Callable[[Callable[[int], Splits], int], str]
"""`(splits, seed) -> fingerprint of the training split`."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A method, or the source's pre-training, trained once per seed.

    Pre-training is also a joint run: its target is the scenario's source, and it has no source.

    Attributes:
      name: the method's name, or `source`.
      roles: the models by role; without `source` its parameters are `{}`.
      source_task: the source's task during joint training; None for a frozen source, or none.
      method: the method.
      lengths: the training lengths.
      config: the run's options.
      optimizer: the adapter's optimizer.
      axis_name: the `pmap` axis that the models average over; None under jit.
      digest: digests the training split; all trials share it, since it reads every number.
      fit_head: fits the target's last layer before the first step, if the run requests it.
      measures: the target's measurements; all trials share them, since they are compiled once. None for pre-training.
      shown: a frozen source's outputs that are computed once; None if there are none, or each step computes them.
      snapshots: the number of saved steps, if the source is a trajectory.
      keep: the number of checkpoints to keep; None for all.
      seed_offset: added to the seed for initialisation and batches, not for the split.
      trains_source: whether it pre-trains the source, which then draws its initialisation, batches and steps as the
        source.
    """

    name: str
    roles: Mapping[str, StudyModel]
    source_task: Task | None
    method: Method
    lengths: Lengths
    config: RunConfig
    optimizer: optax.GradientTransformation
    axis_name: str | None
    digest: Digest
    fit_head: FitHead | None = None
    measures: Measures | None = None
    shown: Shown | None = None
    snapshots: int | None = None
    keep: int | None = 2
    seed_offset: int = 0
    trains_source: bool = False

    @cached_property
    def epoch(self) -> Epoch:
        """Many joint steps of one seed in one loop."""
        method = self.method
        step = make_joint_step(
            self.source_task,
            method.task,
            method.transfer,
            cycle=self.config.cycle,
            stop=method.stop,
            num_steps=self.lengths.steps,
            update=self.config.update,
            teacher=method.teacher if self.shown is None else None,
            adapter_optimizer=self.optimizer,
            axis_name=self.axis_name,
        )
        augment = {role: model.augment for role, model in self.roles.items() if model.augment is not None}
        if method.pooled:
            step = _pooled(step, self.roles["target"].inputs)
            augment |= {"pool": augment["target"]} if "target" in augment else {}
        return make_epoch(augmented(step, augment, axis_name=self.axis_name) if augment else step)

    def run_name(self, seed: int) -> str:
        """Returns a seed's name in the metrics and for its checkpoint folder."""
        return f"{self.name}-seed{seed}"

    @cached_property
    def steps_per_call(self) -> int:
        """The number of steps per call of the compiled epoch: all between two reports.

        At most ten on a CPU: calls cost nothing there, steps are slow, and the progress bar should move. At most ten
        also with streamed examples, since those of all its steps are in memory.
        """
        most = self.lengths.report_every
        return min(most, 10) if self.streams or jax.default_backend() == "cpu" else most

    def lower(self, layout: Layout) -> Lowered:
        """Returns the jitted epoch, traced from the shapes of its arguments alone."""
        state = jax.eval_shape(lambda: self._state(0, self.fresh_source(0), self.method.fit))
        steps = self.steps_per_call
        indices = self.indices_at(0)(0, steps)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            (state, self._array_shapes(steps, state.source), indices),
        )
        return layout.lower(self.epoch, *shapes, jax.ShapeDtypeStruct((), np.int32))

    def fresh_source(self, seed: int) -> TrainState:
        """Returns a seed's initial source; a trajectory starts as copies of it."""
        if "source" not in self.roles:
            return TrainState({}, {}, None)
        source = TrainState(*self.roles["source"].init(initial_key(seed, "source")), None)
        if self.snapshots is None:
            return source
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.snapshots, *leaf.shape)), source)

    def initial_state(self, seed: int, source: TrainState) -> JointState:
        """Returns the initial state: the same for every method of a seed, except for a method's start.

        Raises:
          ValueError: the method's start does not match the target.
        """
        state = self._state(seed, source, self.method.fit, self.method.start)
        if self.fit_head is None:
            return state
        leaves, model_state = self.fit_head(self._written(state), seed, self.name)
        target = TrainState(replace(state.target.params, leaves), model_state, None)
        return self._state(seed, source, lambda *_: state.adapter.params, lambda *_: target)

    @property
    def prepares(self) -> bool:
        """Whether anything is fitted or started before the first step; if not, the blank state is the initial one."""
        return not all(one is None for one in (self.method.fit, self.method.start, self.fit_head))

    def blank_state(self, seed: int, source: TrainState) -> JointState:
        """Returns a state like the initial one, neither started nor fitted: the template for restoring."""
        return self._state(seed, source)

    def _state(
        self, seed: int, source: TrainState, fit: FitFn | None = None, start: StartFn | None = None
    ) -> JointState:
        seed += self.seed_offset
        target = TrainState(
            *self.roles["target"].init(initial_key(seed, "source" if self.trains_source else "target")), None
        )
        if start is not None:
            target = self._started(start, initial_key(seed, "start"), source, target, self._examples(seed))
        adapter = None
        if fit is not None:
            made = self.method.transfer.init(initial_key(seed, "adapter"), source.params, target.params)
            adapter = fit(made, source, target.params, self._examples(seed))
        state = init_joint_state(
            initial_key(seed, "adapter"),
            self.source_task,
            self.method.task,
            self.method.transfer,
            source_params=source.params,
            source_state=source.model_state,
            target_params=target.params,
            target_state=target.model_state,
            adapter=adapter,
            adapter_optimizer=self.optimizer,
        )
        return state.replace(key=initial_key(seed, "source_steps" if self.trains_source else "steps"))

    def measure_start(self, state: JointState, seed: int) -> dict[str, float | None]:
        """Returns measurements of the target right after the write, from the initial state.

        That is after `start` and `fit`, with the first write of the transfer, if any, and before any step.
        """
        if self.measures is None:
            return {}
        found = self.measures.start(self._written(state), seed)
        return {f"target_start_{name}": value for name, value in found.items()}

    def _written(self, state: JointState) -> TrainState:
        """Returns the target after the first write."""
        target = state.target
        if self.method.stop > 0 and writes(self.method.transfer):
            target = target.replace(params=self._write(state.adapter.params, state.source.params, target.params))
        return target

    @cached_property
    def _write(self) -> Callable[[Adapter, Params, Params], Params]:
        return jax.jit(partial(self.method.transfer.apply, step=0))

    def measure_end(self, state: JointState, seed: int) -> dict[str, float | None]:
        """Returns the probe of the target after its last step."""
        return {} if self.measures is None else {"target_probe": self.measures.end(state.target, seed)}

    def _started(
        self, start: StartFn, key: jax.Array, source: TrainState, target: TrainState, examples: Batch
    ) -> TrainState:
        started = start(key, source, target, examples)
        if not isinstance(started, TrainState):
            raise ValueError(f"the start of {self.name!r} must give a TrainState, got {type(started).__name__}")
        parts = "params", "model_state"
        wanted, found = (flatten({part: getattr(state, part) for part in parts}) for state in (target, started))
        if wanted.keys() != found.keys():
            lacks, more = (
                some_of(sorted(one), 3) or "nothing" for one in (wanted.keys() - found, found.keys() - wanted)
            )
            raise ValueError(f"the start of {self.name!r} gives another target: it lacks {lacks}, and has {more} more")
        for path, leaf in wanted.items():
            shape, dtype = np.shape(found[path]), jnp.result_type(found[path])
            if (shape, dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(
                    f"the start of {self.name!r} gives another target: {path!r} must be {leaf.shape} of {leaf.dtype}, "
                    f"got {shape} of {dtype}"
                )
        return started.replace(opt_state=None)

    def _examples(self, seed: int) -> Batch:
        """Returns the target's examples, with those of its pool."""
        target = self.roles["target"]
        pool = {} if target.pool is None else target.pool(seed)
        return {**target.splits(seed).train, **{POOL + name: entry for name, entry in pool.items()}}

    def arrays(self, seed: int) -> dict[str, Batch]:
        """Returns all training examples of the trained roles, and the target's pool if it is used."""
        return {role: dict(arrays) for role, (arrays, _) in self._read(seed).items()}

    def shown_arrays(self, seed: int, source: TrainState) -> dict[str, Batch]:
        """Returns these with the outputs of a frozen source, if they are computed once."""
        arrays = self.arrays(seed)
        if self.shown is not None:
            arrays[self.shown.role] |= self.shown.outputs(seed, source, arrays[self.shown.role])
        return arrays

    def _read(self, seed: int) -> dict[str, tuple[Arrays, int]]:
        """Returns the examples by role, and the stream of their order."""
        read: dict[str, tuple[Arrays, int]] = {
            role: (self.roles[role].splits(seed).train, int(role == "source" or self.trains_source))
            for role in self._learning_roles
        }
        pool = self.roles["target"].pool
        return {**read, "pool": (pool(seed), _POOL_STREAM)} if self.method.pooled and pool is not None else read

    @cached_property
    def streams(self) -> bool:
        """Whether examples are streamed, instead of all being on the device."""
        return any(is_streamed(arrays) for arrays in self.arrays(0).values())

    def facts(self, seed: int) -> dict[str, str | int]:
        """Returns what a seed's steps depend on besides the state: the examples and their order."""
        data = {f"{role}_data": self.digest(self.roles[role].splits, seed) for role in self._learning_roles}
        if "pool" in (read := self._read(seed)):
            data["pool_data"] = fingerprint(read["pool"][0])
        return {"seeds": str(seed), "batch_size": self.config.batch_size, **data}

    def read_ahead(self, seed: int) -> ReadAhead:
        """Returns a reader of the examples for one call of the epoch at a time."""
        return ReadAhead(self.arrays(seed), self._indices(seed), self.steps_per_call)

    def indices_at(self, seed: int) -> Callable[[int, int], Indices]:
        """Returns `(first step, count) -> {role: [count, B]}`: the examples in each batch."""
        by_role = self._indices(seed)
        return lambda first, count: {role: indices(first, count) for role, indices in by_role.items()}

    def _indices(self, seed: int) -> dict[str, Callable[[int, int], np.ndarray]]:
        return {
            role: indices_of(num_examples(arrays), self.config.batch_size, seed + self.seed_offset, stream)
            for role, (arrays, stream) in self._read(seed).items()
        }

    def _array_shapes(self, steps: int, source: TrainState) -> Any:
        """Returns shapes of the examples of one call of the epoch: all of them, or those of its steps."""

        def shape(entry: Any) -> jax.ShapeDtypeStruct:
            leading = steps * self.config.batch_size if self.streams else len(entry)
            return jax.ShapeDtypeStruct((leading, *entry.shape[1:]), entry.dtype)

        arrays = {role: {name: shape(entry) for name, entry in own.items()} for role, own in self.arrays(0).items()}
        if self.shown is not None:
            arrays[self.shown.role] |= self.shown.shapes(source, arrays[self.shown.role])
        return arrays

    def validate(self, state: JointState, seed: int) -> dict[str, float]:
        """Returns the validation metrics of the trained models; none if a split is empty."""
        return {
            f"{role}/validation_{name}": value
            for role in self._learning_roles
            if num_examples(self.roles[role].splits(seed).validation)
            for name, value in self._evaluate(state, seed, role, "validation").items()
        }

    def test(self, state: JointState, seed: int, role: str) -> dict[str, float]:
        """Returns a model's metrics on the test split, read once, after the last step. None without a model."""
        return self._evaluate(state, seed, role, "test") if role in self.roles else {}

    def answers(self, state: JointState) -> dict[str, list[str]]:
        """Returns the answers of each model with sample images."""
        answers = {}
        for role, model in self.roles.items():
            if model.sample_images is not None:
                trained = self._model(state, role)
                answers[role] = list(model.sample_images.answer(trained.params, trained.model_state))
        return answers

    @property
    def _learning_roles(self) -> tuple[str, ...]:
        return ("target",) if self.source_task is None else ("source", "target")

    def _evaluate(self, state: JointState, seed: int, role: str, split: str) -> dict[str, float]:
        model = self._model(state, role)
        arrays = getattr(self.roles[role].splits(seed), split)
        return self.roles[role].evaluate(model.params, model.model_state, arrays)

    def _model(self, state: JointState, role: str) -> TrainState:
        model: TrainState = getattr(state, role)
        if role == "source" and self.snapshots is not None:
            model = jax.tree.map(lambda leaf: leaf[-1], model)
        return model


def make_trials(scenario: Scenario, config: RunConfig, source_plan: SourcePlan) -> dict[str, Trial]:
    """Returns the trials of a seed in order: the source's pre-training, if any, then the methods."""

    @cache
    def digest(splits: Callable[[int], Splits], seed: int) -> str:
        return fingerprint(splits(seed).train)

    make_trial = partial(
        Trial, config=config, optimizer=scenario.adapter_optimizer, axis_name=scenario.axis_name, digest=digest
    )
    make_shown = cache(Shown)  # Methods share a teacher's outputs.
    snapshots = source_plan.snapshots
    trials = {}
    roles = {"target": scenario.target}
    if scenario.source is not None:
        roles["source"] = scenario.source
        if source_plan.read is None and source_plan.lengths is not None and scenario.source_task is not None:
            trials["source"] = make_trial(
                "source",
                {"target": scenario.source},
                None,
                Method(scenario.source_task),
                source_plan.lengths,
                trains_source=True,
                keep=2 if snapshots is None else None,
                seed_offset=OTHER_SEED if config.source_control == "other_seed" else 0,
            )
    source_task = scenario.source_task if source_plan.live else None
    lengths = scenario.schedule.target
    observe = observer(scenario.target, scenario.target.splits(0).test)
    measures, fit_head, head = make_measures(scenario.target, observe, scenario.axis_name), None, ()
    if scenario.head_first:
        head, fit_head = make_fit_head(scenario.target, observe, scenario.axis_name)
    for name, method in scenario.methods.items():
        if (method.fit or method.start) is not None and config.source in ("live", "trajectory"):
            raise ValueError(
                f"the method {name!r} is fitted to a source that has been trained, once: with --source {config.source} "
                "there is none before the first step; take pretrained or frozen"
            )
        transfer, teacher = method.transfer, method.teacher
        if snapshots is not None:  # All are shown while there are transfers; the last one teaches.
            transfer = replayed(transfer, replay_evenly(snapshots, max(1, round(method.stop * lengths.steps))))
            teacher = None if teacher is None else last_of(teacher)
        if head and writes(transfer):
            _check_writes_more(name, method.transfer, scenario, head)
            transfer = keeping(transfer, head)
        method = dataclasses.replace(method, transfer=transfer, teacher=teacher)
        shown = _shown_once(scenario, source_plan, method, make_shown)
        trials[name] = make_trial(
            name,
            roles,
            source_task,
            method,
            lengths,
            shown=shown,
            fit_head=fit_head,
            measures=measures,
            snapshots=snapshots,
        )
    return trials


def _check_writes_more(name: str, transfer: Transfer, scenario: Scenario, head: tuple[str, ...]) -> None:
    """Checks that a transfer writes more than the last layer, which is fitted to labels.

    Raises:
      ValueError: it does not, so that the method would transfer nothing.
    """
    source = {} if scenario.source is None else scenario.source.shapes[0]
    rows = transfer.describe(source, scenario.target.shapes[0])
    written = [row.target for row in rows if not row.left_out]
    if written and all(set(target.split(" + ")) <= set(head) for target in written):
        raise ValueError(
            f"the method {name!r} writes {some_of(written, 3)} alone, and --head-first fits the last layer: it "
            "would transfer nothing; add routes of other layers, or leave --head-first out"
        )


def _shown_once(
    scenario: Scenario, plan: SourcePlan, method: Method, make_shown: Callable[[str, TeacherFn], Shown]
) -> Shown | None:
    """Returns a frozen source's outputs for fixed examples; None if each step should compute them."""
    source, target = scenario.source, scenario.target
    if source is None or method.teacher is None or not method.each_alone:
        return None
    if plan.live or plan.snapshots is not None or target.augment is not None:
        return None
    pool = target.pool if method.pooled else None
    arrays = target.splits(0).train if pool is None else pool(0)
    if is_streamed(arrays) or jax.process_count() > 1:  # With several processes, none may hold the whole source.
        return None
    shown = make_shown("target" if pool is None else "pool", method.teacher)
    return shown if shown.fits(TrainState(*source.shapes, None), arrays) else None


def _pooled(step: JointStep, inputs: tuple[str, ...]) -> JointStep:
    """Returns the step with inputs of the pool in the target's batch, besides the labelled examples."""

    def with_pool(state: JointState, batches: Mapping[str, Batch]) -> tuple[JointState, Metrics]:
        others = {role: batch for role, batch in batches.items() if role != "pool"}
        pool = {POOL + name if name in inputs else name: entry for name, entry in batches["pool"].items()}
        return step(state, {**others, "target": {**batches["target"], **pool}})

    return with_pool


def keeping(transfer: Transfer, paths: tuple[str, ...]) -> Transfer:
    """Returns the transfer that leaves these leaves of the target unchanged."""

    def apply(
        adapter: Adapter, source_params: Params, target_params: Params, *, key: Key = None, step: Step = None
    ) -> Params:
        new = transfer.apply(adapter, source_params, target_params, key=key, step=step)
        return replace(new, select(target_params, paths))

    return dataclasses.replace(transfer, apply=apply)
