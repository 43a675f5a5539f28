"""Floats of 16 bits, computed in 32."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["at_least_float32"]


def at_least_float32(array: Any) -> jax.Array:
    """Returns floats of 16 bits in float32, other numbers as they are: near 20, those of bfloat16 are 0.125 apart."""
    array = jnp.asarray(array)
    return array.astype(jnp.float32) if array.dtype in (jnp.bfloat16, jnp.float16) else array
