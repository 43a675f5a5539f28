"""Metrics of predictions, as means over examples."""

import jax
import jax.numpy as jnp

__all__ = ["accuracy", "top_k_accuracy"]


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the fraction in [0, 1] of logits `[..., C]` whose largest entry is the label `[...]`; a scalar."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def top_k_accuracy(logits: jax.Array, labels: jax.Array, k: int = 5) -> jax.Array:
    """Returns the fraction in [0, 1] of labels `[...]` among the k largest of logits `[..., C]`; a scalar.

    Raises:
      ValueError: k is not in [1, C].
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must lie in [1, {logits.shape[-1]}], got {k}")
    _, largest = jax.lax.top_k(logits, k)
    return jnp.mean(jnp.any(largest == labels[..., None], axis=-1))
