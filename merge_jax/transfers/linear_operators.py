"""Linear operators: the target's weights are the source's between two learned matrices."""

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
"""What the operators are at the start; see `linear_operator_transfer`."""


def linear_operator_transfer(routes: Routes, *, start: OperatorStart = "overlap", shared: bool = False) -> Transfer:
    """Returns the transfer by learned linear operators: `T' = (1 - M) T + A S B`, each tap of a window on its own.

    `T` is `[m, n]`, `S [p, q]`; `A [m, p]` acts on the outputs, `B [q, n]` on the inputs, and `M` is 1 in the block
    that both leaves have. Windows of convolutions meet at their centres (see `copy_overlap`). At the start,

    - `overlap`: `A` and `B` are the identity, cropped or padded with zeros: `share_transfer` exactly;
    - `selection`: they choose rows and inputs evenly: `weight_selection_transfer` exactly.

    All that is learned is `A` and `B`. Outside of the block that both have, `A S B` is 0 at the start, and what it
    becomes is added to the target at every transfer.

    Source: LiGO, arXiv:2303.00980, which grows a model once: all of `W = A S B` is made from the source. Ours are the
    way down, the target's part where the source is smaller, the starts, and that all of `A` and `B` is learned, where
    its code (VITA-Group/LiGO) keeps the source's block an identity. The paper ties operators over layers, as `shared`
    does for routes of one shape, and mixes layers; here several source leaves of one route are under each other, so
    that `A [m, L p]` mixes them.

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
        # The highest precision, since a product with the identity is to give back the source exactly.
        made = jnp.einsum(
            "mp,pq...,qn->mn...", params["outputs"], aligned, params["inputs"], precision=lax.Precision.HIGHEST
        )
        return kept + made

    return layerwise_transfer(routes, operate, start=operators, shared=shared)
