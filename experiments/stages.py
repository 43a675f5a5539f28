"""What a run trains, once a seed: the methods, and before them the source on its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import optax
from jax.stages import Lowered

from experiments.config import RunConfig
from experiments.scenario import Method, Role, Scenario
from merge_jax.data import batches_of
from merge_jax.joint import (
    JointState,
    JointStep,
    Task,
    TrainState,
    adapter_adamw,
    init_joint_state,
    make_joint_step,
)
from merge_jax.types import Batch

__all__ = ["Stage", "make_stages"]


@dataclass(frozen=True)
class Stage:
    """What is trained once a seed: a method, or the source on its own.

    That too is a joint run, of a target that is the scenario's source and has nothing to receive from.

    Attributes:
      name: of the method, or `source`.
      roles: the models by the part they play; without `source` there is none, and its parameters are `{}`.
      source_task: what the source learns beside the target; None for a frozen source, or none.
      method: the method.
      num_steps: steps of the target.
      batch_size: examples in a batch of either.
      optimizer: the adapter's optimizer.
      step: the joint step.
    """

    name: str
    roles: Mapping[str, Role]
    source_task: Task | None
    method: Method
    num_steps: int
    batch_size: int
    optimizer: optax.GradientTransformation
    step: JointStep

    def lower(self) -> Lowered:
        """Returns the jitted step, traced for the shapes of its state and batches; nothing is computed."""
        state = jax.eval_shape(lambda: self.initial_state(0, self.fresh_source(0)))
        return jax.jit(self.step, donate_argnums=0).lower(state, self.batches_at(0)(0))

    def fresh_source(self, seed: int) -> TrainState:
        """Returns the source of a seed as it starts."""
        if "source" not in self.roles:
            return TrainState({}, {}, None)
        return TrainState(*self.roles["source"].init(_key(seed, 0)), None)

    def initial_state(self, seed: int, source: TrainState) -> JointState:
        """Returns the state before the first step; for a seed, it is the same for every method."""
        params, model_state = self.roles["target"].init(_key(seed, 1))
        return init_joint_state(
            _key(seed, 2),
            self.source_task,
            self.method.task,
            self.method.transfer,
            source_params=source.params,
            source_state=source.model_state,
            target_params=params,
            target_state=model_state,
            adapter_optimizer=self.optimizer,
        )

    def batches_at(self, seed: int) -> Callable[[int], dict[str, Batch]]:
        """Returns `step -> batches`; a frozen source needs none."""
        by_role = {
            role: batches_of(self.roles[role].splits(seed).train, self.batch_size, seed)
            for role in self._learning_roles
        }
        return lambda step: {role: batch_at(step) for role, batch_at in by_role.items()}

    def validate(self, state: JointState, seed: int) -> dict[str, float]:
        """Returns the metrics on the validation splits, of the models that learn."""
        return {
            f"{role}/validation_{name}": value
            for role in self._learning_roles
            for name, value in self._evaluate(state, seed, role, "validation").items()
        }

    def test_accuracy(self, state: JointState, seed: int, role: str) -> float:
        """Returns the accuracy on the test split, in [0, 1]; read once, after the last step."""
        return self._evaluate(state, seed, role, "test")["accuracy"]

    @property
    def _learning_roles(self) -> tuple[str, ...]:
        return ("target",) if self.source_task is None else ("source", "target")

    def _evaluate(self, state: JointState, seed: int, role: str, split: str) -> dict[str, float]:
        model: TrainState = getattr(state, role)
        arrays = getattr(self.roles[role].splits(seed), split)
        return self.roles[role].evaluate(model.params, model.model_state, arrays)


def _key(seed: int, purpose: int) -> jax.Array:
    """Returns the key of a seed for the source's start (0), the target's start (1) or the joint run (2).

    Of the kind that XLA compiles fastest: hundreds of small draws are a third of the compilation otherwise.
    """
    return jax.random.fold_in(jax.random.key(seed, impl="rbg"), purpose)


def make_stages(scenario: Scenario, config: RunConfig) -> dict[str, Stage]:
    """Returns the stages of a seed in order: the source's own training, unless it is live, then the methods."""
    optimizer = adapter_adamw(config.adapter_learning_rate)

    def stage(
        name: str,
        roles: Mapping[str, Role],
        source_task: Task | None,
        method: Method,
        num_steps: int,
    ) -> Stage:
        step = make_joint_step(
            source_task,
            method.task,
            method.transfer,
            cycle=config.cycle,
            stop=method.stop,
            num_steps=num_steps,
            update=config.update,
            teacher=method.teacher,
            adapter_optimizer=optimizer,
        )
        return Stage(name, roles, source_task, method, num_steps, config.batch_size, optimizer, step)

    stages = {}
    live_task = scenario.source_task
    if config.source == "pretrained":
        live_task = None
        stages["source"] = stage(
            "source",
            {"target": scenario.source},
            None,
            Method(scenario.source_task),
            config.source_steps,
        )
    roles = {"source": scenario.source, "target": scenario.target}
    for name, method in scenario.methods.items():
        stages[name] = stage(name, roles, live_task, method, config.steps)
    return stages
