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

_AUGMENTATION = 2**32 - 1  # No step's number: steps are int32.


def make_epoch(step_fn: JointStep) -> Epoch:
    """Returns a pure function that takes `count` steps in one loop: `(state, arrays, indices, count) -> (state, sums)`.

    - `arrays`, `{role: {entry: [N, ...]}}`: all examples of each role. They stay on the device.
    - `indices`, `{role: [n, B]}` with `n >= count`: the examples of each step's batch. Only the first `count` rows are
      read, so one compilation serves every count up to `n`. Nothing else comes from the host.
    - `sums`: the step's metrics, summed over the steps, float32.

    Jit it with the state donated. It can be vmapped over seeds (`over_seeds`) and laid over devices (`jit_layout`,
    `pmap_layout`).
    """

    step_fn = jax.jit(step_fn, inline=True)  # For its trace alone, which both its uses below then share.

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
    """Returns the step with the batches of some roles changed at random first, inside the compiled step.

    The key of a step is drawn from the state's key and step, apart from all that the step itself draws, so a resumed
    run sees the same changes. The teacher of a distillation sees the changed batch too.

    Args:
      step_fn: the joint step.
      augment: the change of the batch of each role that has one.
      axis_name: the `pmap` axis, if any: every device draws its own.
    """

    def step(state: JointState, batches: Mapping[str, Batch]) -> tuple[JointState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, _AUGMENTATION), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        keys = dict(zip(augment, jax.random.split(key, len(augment)), strict=True))
        changed = {role: augment[role](keys[role], batches[role]) for role in augment if role in batches}
        return step_fn(state, {**batches, **changed})

    return step
