"""What the transformers here are made of, whether they read text, images or both."""

from typing import Any

import flax.linen as nn
import jax

__all__ = ["PADDING", "attention", "check_heads", "dense", "feed_forward", "layer_norm", "not_padding"]

PADDING = 0
"""The token that stands for none."""


def not_padding(tokens: jax.Array) -> jax.Array:
    """Returns the mask of an attention with tokens `[B, L]` as keys, `[B, 1, 1, L]`: whether one is attended to."""
    return (tokens != PADDING)[:, None, None]


def layer_norm(dtype: Any, name: str, epsilon: float = 1e-12) -> nn.LayerNorm:
    """Returns a LayerNorm, by default with the epsilon of BERT."""
    # So small an epsilon does not hide the rounding of the fast variance, E[x^2] - E[x]^2.
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def dense(features: int, dtype: Any, init: nn.initializers.Initializer, name: str) -> nn.Dense:
    """Returns a dense layer, kernel `[in, features]`, which starts as `init` says."""
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def attention(
    num_heads: int, dropout_rate: float, dtype: Any, init: nn.initializers.Initializer, name: str, *, train: bool
) -> nn.MultiHeadDotProductAttention:
    """Returns an attention whose heads share the width of the queries; weights are dropped for each text or image."""
    return nn.MultiHeadDotProductAttention(
        num_heads,
        dtype=dtype,
        kernel_init=init,
        dropout_rate=dropout_rate,
        broadcast_dropout=False,
        deterministic=not train,
        name=name,
    )


def feed_forward(
    x: jax.Array, hidden: int, dtype: Any, init: nn.initializers.Initializer, *, approximate_gelu: bool = False
) -> jax.Array:
    """Returns `down(gelu(up(x)))`, `[..., width]` to the same; layers of the calling module."""
    y = nn.gelu(dense(hidden, dtype, init, "up")(x), approximate=approximate_gelu)
    return dense(x.shape[-1], dtype, init, "down")(y)


def check_heads(width: int, num_heads: int) -> None:
    """Raises ValueError unless the heads divide the width."""
    if width % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the width {width}")
