"""What devices of a `pmap` or `shard_map` have to tell each other where examples are compared with one another."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["previous_example", "whole_batch"]

_Tree = TypeVar("_Tree")


def whole_batch(tree: _Tree, axis_name: str | None) -> _Tree:
    """Returns arrays `[B / D, ...]` of each of D devices as the whole `[B, ...]`, in order; unchanged without an axis.

    A loss of the whole batch is the same on every device, and its gradient comes back to each device's own examples D
    times, so that the mean over the devices of what each has for its parameters is the gradient on one.
    """
    if axis_name is None:
        return tree
    return jax.tree.map(lambda leaf: lax.all_gather(leaf, axis_name, tiled=True), tree)


def previous_example(batch: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns for each example of a batch `[B, ...]` the one before it, for the first the last."""
    if axis_name is None:
        return jnp.roll(batch, 1, axis=0)
    devices = lax.axis_size(axis_name)
    last = lax.ppermute(batch[-1:], axis_name, [(i, (i + 1) % devices) for i in range(devices)])
    return jnp.concatenate([last, batch[:-1]])
