"""Many steps in one compiled loop, over examples that stay on the device."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.training.joint import JointState, JointStep
from merge_jax.types import Batch, Metrics

__all__ = ["Augment", "Epoch", "augmented", "make_epoch"]

Augment = Callable[[jax.Array, Batch], Batch]
"""`(key, batch) -> batch`: a random change of a batch; the key is consumed."""

Epoch = Callable[[JointState, Mapping[str, Batch], Mapping[str, jax.Array], Any], tuple[JointState, Metrics]]
"""`(state, arrays, indices, count) -> (state, sums of the metrics)`; see `make_epoch`."""

_AUGMENTATION = 2**32 - 1  # Not a valid step: steps are int32.


def make_epoch(step_fn: JointStep) -> Epoch:
    """Returns a pure function that takes `count` steps in one loop: `(state, arrays, indices, count) -> (state, sums)`.

    - `arrays`, `{role: {entry: [N, ...]}}`: all examples of each role. They stay on the device.
    - `indices`, `{role: [n, B]}` with `n >= count`: the examples of each step's batch. Only the first `count` rows are
      read, so one compilation serves every count up to `n`. The host sends nothing else.
    - `sums`: the step's metrics, summed over the steps, float32.

    Jit it with the state donated. It can be vmapped over seeds (`over_seeds`) and distributed over devices
    (`jit_layout`, `pmap_layout`).
    """

    step_fn = jax.jit(step_fn, inline=True)  # Jitted only so that both uses below share one trace.

    def epoch(
        state: JointState, arrays: Mapping[str, Batch], indices: Mapping[str, jax.Array], count: Any
    ) -> tuple[JointState, Metrics]:
        def batches_at(i: Any) -> dict[str, Batch]:
            return {role: jax.tree.map(operator.itemgetter(rows[i]), arrays[role]) for role, rows in indices.items()}

        def advance(i: Any, carry: tuple[JointState, Metrics]) -> tuple[JointState, Metrics]:
            state, sums = carry
            state, metrics = step_fn(state, batches_at(i))
            return state, jax.tree.map(lambda total, value: total + value.astype(jnp.float32), sums, metrics)

        _, shapes = jax.eval_shape(step_fn, state, batches_at(0))
        sums = jax.tree.map(lambda metric: jnp.zeros(metric.shape, jnp.float32), shapes)
        return lax.fori_loop(0, count, advance, (state, sums))

    return epoch


def augmented(step_fn: JointStep, augment: Mapping[str, Augment], *, axis_name: str | None = None) -> JointStep:
    """Returns the step with random augmentation of some roles' batches, inside the compiled step.

    The augmentation key is derived from the state's key and step, independently of the step's own keys, so a resumed
    run sees the same changes. A distillation teacher sees the changed batch too.

    Args:
      step_fn: the joint step.
      augment: the augmentation `(key, batch) -> batch` by role.
      axis_name: the `pmap` axis, if any; each device then draws separately.
    """

    def step(state: JointState, batches: Mapping[str, Batch]) -> tuple[JointState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, _AUGMENTATION), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        keys = dict(zip(augment, jax.random.split(key, len(augment)), strict=True))
        changed = {role: augment[role](keys[role], batches[role]) for role in augment if role in batches}
        return step_fn(state, {**batches, **changed})

    return step
