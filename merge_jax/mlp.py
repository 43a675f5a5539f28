"""A layer without attention, to learn what attention is good for."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from merge_jax.checks import check_at_least_one, check_below_one, check_flag, check_float_dtype
from merge_jax.lpka import FeedForward, layer_norm, linear

__all__ = ["MixingLayer"]


class MixingLayer(nn.Module):
    """Rows and columns of the source are mixed by two perceptrons: `FFN(LayerNorm(T + (P_r (P_c S)^T)^T))`.

    `P_c` maps each row of the source `[p, q]` to `n` features, `P_r` each of those columns from `p` to `m`
    entries: `P x = gelu(x W_1 + b_1) W_2 + b_2` with `width` hidden units. It differs from
    `KnowledgeTransferLayer` in that what is mixed with what is learned once instead of asked by queries; our
    choice of the ablation that arXiv:2404.13322 names without detail.

    Attributes:
      width: hidden units of both perceptrons.
      max_hidden: cap on the hidden width of the feed-forward block; None for `2 n`.
      feed_forward_dropout: dropout on the feed-forward block.
      spectral: whether the feed-forward kernels are divided by their spectral norms.
      dtype: of the computation, LayerNorm excepted; parameters are float32.
    """

    width: int = 128
    max_hidden: int | None = 1024
    feed_forward_dropout: float = 0.2
    spectral: bool = True
    dtype: Any = jnp.float32

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        check_at_least_one(width=self.width)
        if self.max_hidden is not None:
            check_at_least_one(max_hidden=self.max_hidden)
        check_below_one(feed_forward_dropout=self.feed_forward_dropout)
        check_flag(spectral=self.spectral)
        check_float_dtype(self.dtype)

    @nn.compact
    def __call__(self, target: jax.Array, source: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps target `[m, n]` and source `[p, q]` to `[m, n]`, float32."""

        def perceptron(x: jax.Array, features: int, name: str) -> jax.Array:
            hidden = linear(self.width, x.shape[1], self.dtype, f"{name}_up")(x)
            return linear(features, self.width, self.dtype, f"{name}_down")(nn.gelu(hidden, approximate=False))

        m, n = target.shape
        columns = perceptron(source, n, "columns")
        mixed = perceptron(columns.T, m, "rows").T
        feed_forward = FeedForward(
            self.max_hidden, self.feed_forward_dropout, self.spectral, self.dtype, name="feed_forward"
        )
        return feed_forward(layer_norm("norm")(target + mixed), deterministic=deterministic)
