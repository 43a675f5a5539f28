"""Linear operators: the target's weights are the source's, multiplied by two learned matrices."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from merge_jax.checks import check_choice
from merge_jax.layouts import overlap_blocks
from merge_jax.transfers.base import Transfer
from merge_jax.transfers.layerwise import layerwise_transfer
from merge_jax.transfers.routes import Routes
from merge_jax.transfers.weight_selection import choice_matrix, evenly_chosen
from merge_jax.types import Adapter

__all__ = ["OperatorStart", "linear_operator_transfer"]

OperatorStart = Literal["overlap", "selection"]
"""How the operators are initialised; see `linear_operator_transfer`."""


def linear_operator_transfer(routes: Routes, *, start: OperatorStart = "overlap", shared: bool = False) -> Transfer:
    """Returns the transfer by learned linear operators: `T' = (1 - M) T + A S B`, separately for each tap of a window.

    `T` is `[m, n]`, `S [p, q]`; `A [m, p]` acts on the outputs, `B [q, n]` on the inputs, and `M` is 1 in the overlap
    of both leaves. Windows of convolutions are aligned at their centres (see `copy_overlap`). At the start,

    - `overlap`: `A` and `B` are the identity, cropped or padded with zeros: `share_transfer` exactly;
    - `selection`: they choose rows and inputs evenly: `weight_selection_transfer` exactly.

    Only `A` and `B` are learned. Outside the overlap, `A S B` starts at 0, and every transfer adds its current value to
    the target.

    Source: LiGO, arXiv:2303.00980, which grows a model once: the whole `W = A S B` comes from the source. Our choices
    are to support smaller targets, to keep the target's part if the source is smaller, the starts, and to learn all of
    `A` and `B`; its code (VITA-Group/LiGO) fixes the source's block to the identity. The paper ties operators over
    layers, as `shared` does for routes of one shape, and mixes layers. Here the source leaves of one route are stacked,
    so that `A [m, L p]` mixes them.

    Args:
      routes: as `share_transfer`.
      start: one of the two above.
      shared: whether routes of one shape share `A` and `B`.

    The adapter is `{target path: {"outputs": A, "inputs": B}}`, batched as in `adapter_transfer`; computed in float32.

    Raises:
      ValueError: as `share_transfer`; for an unknown start, a route with the view `attention`, or, in `apply`, an
        adapter of other routes.
    """
    check_choice("start", start, get_args(OperatorStart))

    def choice(size: int, total: int) -> jax.Array:
        """Returns the matrix `[size, total]` that chooses entries of a vector of length `total`."""
        count = min(size, total)
        return choice_matrix(evenly_chosen(count, total) if start == "selection" else np.arange(count), size, total)

    def operators(target: tuple[int, ...], source: tuple[int, ...]) -> Adapter:
        (m, n), (p, q) = target[:2], source[:2]
        return {"outputs": choice(m, p), "inputs": choice(n, q).T}

    def operate(params: Adapter, target: jax.Array, source: jax.Array) -> jax.Array:
        target, source = target.astype(jnp.float32), source.astype(jnp.float32)
        kept = overlap_blocks(target, jnp.zeros_like(source))
        aligned = overlap_blocks(jnp.zeros((*source.shape[:2], *target.shape[2:])), source)
        # The highest precision, so that a product with the identity returns the source exactly.
        made = jnp.einsum(
            "mp,pq...,qn->mn...", params["outputs"], aligned, params["inputs"], precision=lax.Precision.HIGHEST
        )
        return kept + made

    return layerwise_transfer(routes, operate, start=operators, shared=shared)
