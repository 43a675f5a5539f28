"""Weight selection: evenly chosen entries of a large model as the weights of a small model."""

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
    """Returns the matrix `[size, total]`, float32, that selects the chosen entries of a vector, followed by zeros.

    If entries are chosen for each of `h` vectors, `[h, k]`, these are `h` matrices.
    """
    matrix = jax.nn.one_hot(jnp.asarray(chosen), total, dtype=jnp.float32)
    return jnp.pad(matrix, (*((0, 0),) * (matrix.ndim - 2), (0, size - matrix.shape[-2]), (0, 0)))


def weight_selection_transfer(routes: Routes) -> Transfer:
    """Returns weight selection: each routed target leaf gets evenly chosen rows and inputs of its source leaf.

    `T'[i, j] = S[floor(i p / m), floor(j q / n)]` with `T [m, n]` and `S [p, q]`; rows are outputs. If the source has
    fewer rows or inputs, all of them are written to the target's first ones, and the rest does not change, as in
    `share_transfer`. Leaves of one shape are copied. The adapter is empty.

    Source: arXiv:2311.18823, "uniform selection", which needs a source at least as large along every axis. Its code
    (OscarXZQ/weight-selection) uses these indices if `m` divides `p`, and rounds otherwise; to round down is our
    choice. So is aligning windows of different sizes at their centres (see `copy_overlap`). The routes decide which
    layers are paired; the paper uses the source's first ones.

    Raises:
      ValueError: as `share_transfer`; or for a route with the view `attention`.
    """

    def choose(params: Adapter, target: jax.Array, source: jax.Array) -> jax.Array:
        del params  # Nothing is learned.
        for axis in (0, 1):
            total = source.shape[axis]
            source = source.take(evenly_chosen(min(target.shape[axis], total), total), axis)
        return overlap_blocks(target, source)

    return layerwise_transfer(routes, choose)
