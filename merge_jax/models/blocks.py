"""Building blocks of the transformers, for text, images or both."""

from typing import Any

import flax.linen as nn
import jax

__all__ = ["PADDING", "attention", "check_heads", "dense", "feed_forward", "layer_norm", "not_padding"]

PADDING = 0
"""The padding token."""


def not_padding(tokens: jax.Array) -> jax.Array:
    """Returns the attention mask for tokens `[B, L]` as keys, `[B, 1, 1, L]`: True for tokens other than padding."""
    return (tokens != PADDING)[:, None, None]


def layer_norm(dtype: Any, name: str, epsilon: float = 1e-12) -> nn.LayerNorm:
    """Returns a LayerNorm, by default with the epsilon of BERT."""
    # Such a small epsilon does not hide the rounding errors of the fast variance, E[x^2] - E[x]^2.
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def dense(features: int, dtype: Any, init: nn.initializers.Initializer, name: str) -> nn.Dense:
    """Returns a dense layer, kernel `[in, features]`, initialised by `init`."""
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def attention(
    num_heads: int, dropout_rate: float, dtype: Any, init: nn.initializers.Initializer, name: str, *, train: bool
) -> nn.MultiHeadDotProductAttention:
    """Returns an attention whose heads split the width of the queries; dropout masks differ for each text or image."""
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
    """Returns `down(gelu(up(x)))`, `[..., width]` to the same; its layers belong to the calling module."""
    y = nn.gelu(dense(hidden, dtype, init, "up")(x), approximate=approximate_gelu)
    return dense(x.shape[-1], dtype, init, "down")(y)


def check_heads(width: int, num_heads: int) -> None:
    """Raises ValueError unless the heads divide the width."""
    if width % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the width {width}")
