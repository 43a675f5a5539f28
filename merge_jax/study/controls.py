"""Sources to compare a trained source with: what of a gain is the source's knowledge, and what its numbers alone."""

from typing import Any

import jax
import jax.numpy as jnp

from merge_jax.study.choices import SourceControl
from merge_jax.study.sources import initial_key
from merge_jax.training.joint import TrainState

__all__ = ["OTHER_SEED", "controlled"]

OTHER_SEED = 1000
"""Added to a seed for the start and the batches of the source under `other_seed`; the split stays the seed's."""


def controlled(control: SourceControl, source: TrainState, seed: int) -> TrainState:
    """Returns the source that methods are handed in the place of a trained one.

    `shuffled`: the entries of each leaf of its parameters permuted among themselves, which keeps the numbers and no
    structure. `noise`: each leaf drawn anew from the normal distribution of its mean and standard deviation. Statistics
    of the model (BatchNorm) stay. Other controls are of the training, and the source is returned as it is. Our choice:
    leaf by leaf, so that a layer's scale, which helps by itself, stays as well.

    Args:
      control: by name.
      source: the trained one.
      seed: what is drawn depends on it alone.
    """
    draws = {"shuffled": _permuted, "noise": _normal}
    if control not in draws:
        return source
    key = initial_key(seed, "control")
    leaves, structure = jax.tree.flatten(source.params)
    keys = jax.random.split(key, len(leaves))
    drawn = [draws[control](k, leaf) for k, leaf in zip(keys, leaves, strict=True)]
    return source.replace(params=jax.tree.unflatten(structure, drawn))


def _permuted(key: jax.Array, leaf: Any) -> jax.Array:
    return jax.random.permutation(key, jnp.ravel(leaf)).reshape(leaf.shape)


def _normal(key: jax.Array, leaf: Any) -> jax.Array:
    return (jnp.mean(leaf) + jnp.std(leaf) * jax.random.normal(key, leaf.shape, leaf.dtype)).astype(leaf.dtype)
