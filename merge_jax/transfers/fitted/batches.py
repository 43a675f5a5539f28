"""Batched inputs of a refit, and a loop over batches that stores values of each."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["in_batches", "stacked"]


def in_batches(inputs: Sequence[jax.Array], size: int) -> tuple[list[jax.Array], jax.Array]:
    """Returns the inputs as `[batches, B, ...]` and weights `[batches, B]`; padding of the last batch has weight 0."""
    count = jnp.shape(inputs[0])[0]
    batches = math.ceil(count / size)
    places = jnp.arange(batches * size)
    weights = (places < count).astype(jnp.float32).reshape(batches, size)
    return [jnp.asarray(one)[places % count].reshape(batches, size, *jnp.shape(one)[1:]) for one in inputs], weights


def stacked(fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any, after: jax.Array) -> tuple[Any, Any]:
    """Returns the result of `lax.scan(fn, carry, rows)`; its stacks are allocated after the number `after` is known.

    On a CPU, XLA would allocate the stacks of successive scans all at once, since their initial zeros depend on
    nothing.
    """
    count = len(jax.tree.leaves(rows)[0])
    first = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape[1:], one.dtype), rows)
    made = jax.eval_shape(fn, carry, first)[1]
    start = lax.stop_gradient(after)  # All of it is overwritten.
    stacks = jax.tree.map(lambda one: jnp.full((count, *one.shape), start, one.dtype), made)

    def step(i: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, stacks = state
        carry, made = fn(carry, jax.tree.map(lambda one: one[i], rows))
        return carry, jax.tree.map(lambda stack, one: stack.at[i].set(one), stacks, made)

    return lax.fori_loop(0, count, step, (carry, stacks))
