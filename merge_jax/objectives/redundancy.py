"""Redundancy suppression: two models' features should agree by channel, and channels should be uncorrelated."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from merge_jax.objectives.device_axis import whole_batch
from merge_jax.objectives.features import centred

__all__ = ["redundancy_suppression"]

_EPSILON = 1e-5


def redundancy_suppression(
    features: Sequence[jax.Array], others: Sequence[jax.Array], *, kappa: float = 0.01, axis_name: str | None = None
) -> jax.Array:
    """Returns RSD, `mean over layers |(C - I) o M|^2 / d`; the others get no gradient.

    `C [d, d]` holds the correlations over the batch of each channel of the model with each of the other, and `M` is 1
    on the diagonal (invariance) and `sqrt(kappa)` elsewhere (decorrelation). An objective for `feature_agreement` and
    `prepare`, like `disagreement`; the best value is 0. Source: Zhang et al., arXiv:2507.21844, and their code, for the
    loss and `kappa`. Three choices are ours, so that the loss depends only on features. Channels of maps are averaged
    over positions. Layers are divided by their width, for equal weight. If widths differ, the wider features are
    projected on fixed random orthonormal directions, instead of through their learned network of two layers.

    Args:
      features: of each layer, `[B, ..., d]`.
      others: of equally many layers of another model, `[B, ..., d']`.
      kappa: the weight of decorrelation, 0 or more.
      axis_name: as in `disagreement`.

    Raises:
      ValueError: different numbers of layers or examples; a kappa that is negative or not a number.
    """
    if not 0 <= kappa < float("inf"):
        raise ValueError(f"kappa must be 0 or more, got {kappa}")
    if len(others) != len(features):
        raise ValueError(f"{len(features)} layers are to agree with {len(others)} of the source")
    own, other = whole_batch((tuple(features), tuple(map(lax.stop_gradient, others))), axis_name)
    losses = [_layer(*pair, kappa) for pair in zip(own, other, strict=True)]
    return sum(losses[1:], losses[0]) / len(losses)


def _layer(features: jax.Array, others: jax.Array, kappa: float) -> jax.Array:
    if len(features) != len(others):
        raise ValueError(f"features must be of the same examples, got {len(features)} and {len(others)}")
    width = min(features.shape[-1], others.shape[-1])
    own, other = (_standardised(_projected(_channels(each), width)) for each in (features, others))
    correlations = jnp.matmul(other.T, own) / len(own)
    same = jnp.eye(width)
    return jnp.sum(jnp.square(correlations - same) * (same + kappa * (1 - same))) / width


def _channels(features: jax.Array) -> jax.Array:
    features = features.astype(jnp.float32)
    return features.reshape(len(features), -1, features.shape[-1]).mean(axis=1)


def _projected(features: jax.Array, width: int) -> jax.Array:
    size = features.shape[1]
    return features if size == width else features @ _directions(size, width)


@functools.lru_cache(maxsize=64)
def _directions(size: int, width: int) -> np.ndarray:
    """Returns orthonormal columns `[size, width]`, the same at every step and in every run."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(size, width)))[0].astype(np.float32)


def _standardised(features: jax.Array) -> jax.Array:
    features = centred(features)
    # Epsilon is under the root, so that a constant channel has a finite gradient.
    return features / jnp.sqrt(jnp.mean(jnp.square(features), axis=0, keepdims=True) + _EPSILON**2)
