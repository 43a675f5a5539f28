"""Several seeds of one run side by side in one program."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from merge_jax.training.epoch import Epoch
from merge_jax.training.joint import JointState
from merge_jax.types import Batch, Metrics

__all__ = ["over_seeds", "stack_seeds", "unstack_seeds"]

# All seeds share one step: with per-seed steps, vmap would turn the cond into a select and transfer at every step.
_AXES = JointState(step=None, key=0, source=0, target=0, adapter=0)  # type: ignore[arg-type]


def stack_seeds(states: Sequence[JointState]) -> JointState:
    """Stacks the states of S seeds into one, leaves `[S, ...]`; all share the step.

    Raises:
      ValueError: no states, or states at different steps.
    """
    if len({int(state.step) for state in states}) != 1:
        raise ValueError(f"seeds must stand at the same step, got {[int(state.step) for state in states]}")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return stacked.replace(step=_copy(states[0].step))


def unstack_seeds(state: JointState) -> list[JointState]:
    """Returns the separate states of stacked seeds."""
    return [
        jax.tree.map(operator.itemgetter(i), state.replace(step=())).replace(step=_copy(state.step))
        for i in range(len(state.key))
    ]


def _copy(step: jax.Array) -> jax.Array:
    # Each state may be donated separately.
    return jnp.array(step, copy=True)


def over_seeds(epoch: Epoch) -> Epoch:
    """Returns the epoch over stacked states, arrays `[S, N, ...]` and indices `[S, n, B]`; metrics are `[S]`.

    Each seed computes the same as alone, up to the rounding of batched products, if the keys are threefry: `rbg` keys
    draw differently under vmap.
    """

    def stacked_epoch(
        state: JointState, arrays: Mapping[str, Batch], indices: Mapping[str, jax.Array], count: Any
    ) -> tuple[JointState, Metrics]:
        return jax.vmap(epoch, in_axes=(_AXES, 0, 0, None), out_axes=(_AXES, 0))(state, arrays, indices, count)

    return stacked_epoch
