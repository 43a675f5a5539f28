"""MergeNet: the transfer through an LPKA, with our defaults and as published."""

from typing import Any, Unpack

import jax.numpy as jnp

from merge_jax.transfers.adapters.adapter import AdapterOptions, adapter_transfer
from merge_jax.transfers.adapters.lpka import ATTENTIONS, AttentionName, LPKAOptions, lpka_network
from merge_jax.transfers.base import Transfer
from merge_jax.transfers.routes import Routes

__all__ = ["lpka_transfer", "published_transfer"]


def lpka_transfer(
    routes: Routes,
    *,
    num_layers: int = 2,
    num_heads: int = 8,
    max_width: int | None = 512,
    max_hidden: int | None = 1024,
    attentions: tuple[AttentionName, ...] = ATTENTIONS,
    attention_dropout: float = 0.1,
    feed_forward_dropout: float = 0.2,
    spectral: bool = True,
    max_scores: int = 2**22,
    dtype: Any = jnp.float32,
    **options: Unpack[AdapterOptions],
) -> Transfer:
    """Returns MergeNet's transfer: each routed target leaf attends to its source leaf through an LPKA.

    `T' = LPKA(T, S)` in one of the output forms of `adapter_transfer`, by default `warm`. Two defaults cap widths that,
    as published, grow with the matrices. The caps do not affect small matrices, and `published_transfer` has none.
    Source: arXiv:2404.13322.

    Args:
      routes: `{target path: source path}`, or a sequence of such pairs or of `Route`s; paths may be patterns.
      num_layers: layers of each LPKA, 1 or more.
      num_heads: heads of each attention, 1 or more.
      max_width: cap on the inner width of each attention, or None.
      max_hidden: cap on the hidden width of each feed-forward block, or None.
      attentions: which of `rows_rows`, `rows_cols`, `cols_rows`, `cols_cols` to use.
      attention_dropout: rate of dropout on attention weights, in [0, 1).
      feed_forward_dropout: rate of dropout on the feed-forward block, in [0, 1).
      spectral: whether feed-forward kernels are divided by their spectral norms.
      max_scores: entries of attention maps in memory at once; larger maps are computed in chunks of queries, and
        recomputed in the backward pass. The values do not depend on it.
      dtype: of the computation, e.g. bfloat16; parameters, softmax and norms stay float32.
      **options: `output`, `rank`, `view`, `gate`, `shared`, `padding`; see `adapter_transfer`.

    Raises:
      ValueError: as `adapter_transfer`, and for an option out of range.
    """
    network = lpka_network(
        LPKAOptions(
            num_layers=num_layers,
            num_heads=num_heads,
            max_width=max_width,
            max_hidden=max_hidden,
            attentions=attentions,
            attention_dropout=attention_dropout,
            feed_forward_dropout=feed_forward_dropout,
            spectral=spectral,
            max_scores=max_scores,
            dtype=dtype,
        )
    )
    return adapter_transfer(routes, network, **options)


def published_transfer(routes: Routes, *, num_layers: int = 2, num_heads: int = 8) -> Transfer:
    """Returns the transfer exactly as published: `T' = LPKA(T, S)`, no caps on widths, whole matrices.

    The rows of the new matrix have variance 1, so use it before a BatchNorm, and with
    `make_joint_step(..., update="surrogate")` to train it as published. Source: arXiv:2404.13322 and its code;
    `tests/transfers/adapters/test_published.py` compares them.

    Raises:
      ValueError: as `lpka_transfer`.
    """
    return lpka_transfer(
        routes, num_layers=num_layers, num_heads=num_heads, max_width=None, max_hidden=None, output="published"
    )
