"""Weight selection: a large model's entries, evenly chosen, as a small model's weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.layouts import overlap_blocks
from merge_jax.transfers.base import Transfer
from merge_jax.transfers.layerwise import layerwise_transfer
from merge_jax.transfers.routes import Routes
from merge_jax.types import Adapter

__all__ = ["choice_matrix", "evenly_chosen", "weight_selection_transfer"]


def evenly_chosen(size: int, total: int) -> np.ndarray:
    """Returns `size` of the indices `0 .. total - 1`, evenly spaced from the first on: `floor(i total / size)`.

    >>> evenly_chosen(3, 6), evenly_chosen(3, 7)
    (array([0, 2, 4]), array([0, 2, 4]))
    """
    return np.arange(size) * total // size


def choice_matrix(chosen: Any, size: int, total: int) -> jax.Array:
    """Returns the matrix `[size, total]`, float32, that takes the chosen entries of a vector, and 0 after them."""
    matrix = jax.nn.one_hot(jnp.asarray(chosen), total, dtype=jnp.float32)
    return jnp.pad(matrix, ((0, size - matrix.shape[0]), (0, 0)))


def weight_selection_transfer(routes: Routes) -> Transfer:
    """Returns weight selection: each routed target leaf gets evenly chosen rows and inputs of its source leaf.

    `T'[i, j] = S[floor(i p / m), floor(j q / n)]` with `T [m, n]` and `S [p, q]`, rows being outputs. Where the source
    has fewer rows or inputs than the target, all of them are written to the first ones, and the rest stays, as in
    `share_transfer`; leaves of one shape are copied. The adapter is empty.

    Source: arXiv:2311.18823, "uniform selection", which needs a source as large along every axis. Its code
    (OscarXZQ/weight-selection) has these indices where `m` divides `p`, and rounds otherwise; to round down is our
    choice. So are windows of convolutions of different sizes, which meet at their centres (see `copy_overlap`). Which
    layer is paired with which is up to the routes; the paper takes the source's first ones.

    Raises:
      ValueError: as `share_transfer`; or for a route with the view `attention`.
    """

    def choose(params: Adapter, target: jax.Array, source: jax.Array) -> jax.Array:
        del params  # There is nothing learned.
        for axis in (0, 1):
            total = source.shape[axis]
            source = source.take(evenly_chosen(min(target.shape[axis], total), total), axis)
        return overlap_blocks(target, source)

    return layerwise_transfer(routes, choose)
