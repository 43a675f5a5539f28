"""Communication between the devices of a `pmap` or `shard_map` for losses that compare examples with each other."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["previous_example", "varying", "whole_batch"]

_Tree = TypeVar("_Tree")


def whole_batch(tree: _Tree, axis_name: str | None) -> _Tree:
    """Gathers arrays `[B / D, ...]` of D devices to the whole `[B, ...]`, in order; unchanged without an axis.

    A loss of the whole batch is the same on every device, and each device's examples receive its gradient D times. So
    the mean of the parameter gradients over devices is the gradient on one device.
    """
    if axis_name is None:
        return tree
    return jax.tree.map(lambda leaf: lax.all_gather(leaf, axis_name, tiled=True), tree)


def varying(tree: _Tree, axis_name: str | None) -> _Tree:
    """Marks parameters that all devices share as each device's own, so that each gets its own gradient.

    Otherwise a checked `shard_map` sums the gradient over the devices, and a mean after that does not change it.
    """
    if axis_name not in jax.sharding.get_abstract_mesh().manual_axes:  # None, or a vmap's: nothing is summed.
        return tree

    def cast(leaf: jax.Array) -> jax.Array:
        return leaf if axis_name in jax.typeof(leaf).mat.varying else lax.pcast(leaf, axis_name, to="varying")

    return jax.tree.map(cast, tree)


def previous_example(batch: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the previous example of each in a batch `[B, ...]`; the last one for the first."""
    if axis_name is None:
        return jnp.roll(batch, 1, axis=0)
    devices = lax.axis_size(axis_name)
    last = lax.ppermute(batch[-1:], axis_name, [(i, (i + 1) % devices) for i in range(devices)])
    return jnp.concatenate([last, batch[:-1]])
