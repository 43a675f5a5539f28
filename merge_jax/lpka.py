"""LPKA, the low-rank parametric knowledge adapter, as Flax (Linen) modules: matrices in, matrices out.

Method: Li et al., "MergeNet", arXiv:2404.13322, with the details of its published code.

Legend of shapes: target matrix `[m, n]`, source matrix `[p, q]`; `h` heads of width `d`; tokens are the rows of
what a module is given, so queries are `[r, c]` and keys `[s, k]`.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from merge_jax.spectral import spectral_norm

__all__ = ["LPKA", "GatedLPKA", "KnowledgeTransferLayer", "ParameterAttention", "head_width"]

# The published epsilon. Rows of weights can have tiny variances, which a usual epsilon would swamp.
_LAYER_NORM_EPSILON = 1e-12
_MINIMUM_WIDTH = 128
# Kernels and biases uniform in +-1/sqrt(fan_in), PyTorch's default, which the published code relies on.
_KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def head_width(query_size: int, key_size: int, num_heads: int) -> int:
    """Returns the width of one attention head, `max((c + k) // 2, 128) // h`, as published.

    Raises:
      ValueError: there are more heads than the whole width, so that a head would have none.
    """
    width = max((query_size + key_size) // 2, _MINIMUM_WIDTH)
    if not 1 <= num_heads <= width:
        raise ValueError(f"num_heads must lie in [1, {width}], the width of its attention, got {num_heads}")
    return width // num_heads


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _dense(features: int, fan_in: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=_KERNEL_INIT, bias_init=_bias_init(fan_in), name=name)


def _layer_norm(name: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels badly for weights with a mean.
    return nn.LayerNorm(epsilon=_LAYER_NORM_EPSILON, use_fast_variance=False, name=name)


class ParameterAttention(nn.Module):
    """Rows of one matrix attend to rows of another: `LayerNorm(X + concat_h(softmax(Q K^T / sqrt(d)) V) W_o)`.

    `Q = X W_q`, `K = Y W_k`, `V = Y W_v`, with biases. Source: arXiv:2404.13322, details as in its code.

    Attributes:
      num_heads: number of heads `h`; the width of each is `head_width(c, k, h)`.
      dropout_rate: dropout on the attention weights.
    """

    num_heads: int
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps queries `[r, c]` and keys `[s, k]` to `[r, c]`."""
        chex.assert_rank([queries, keys], [2, 2])
        c, k = queries.shape[1], keys.shape[1]
        d = head_width(c, k, self.num_heads)
        features = self.num_heads * d
        q = _dense(features, c, "query")(queries).reshape(-1, self.num_heads, d)
        key = _dense(features, k, "key")(keys).reshape(-1, self.num_heads, d)
        value = _dense(features, k, "value")(keys).reshape(-1, self.num_heads, d)
        weights = nn.softmax(jnp.einsum("rhd,shd->hrs", q, key) / jnp.sqrt(d).astype(q.dtype))
        weights = nn.Dropout(self.dropout_rate)(weights, deterministic=deterministic)
        mixed = jnp.einsum("hrs,shd->rhd", weights, value).reshape(-1, features)
        return _layer_norm("norm")(queries + _dense(c, features, "out")(mixed))


class _SpectralDense(nn.Module):
    """A dense layer whose kernel is divided by its spectral norm: `x W / sigma(W) + b`."""

    features: int
    normalised: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        fan_in = inputs.shape[-1]
        kernel = self.param("kernel", _KERNEL_INIT, (fan_in, self.features))
        bias = self.param("bias", _bias_init(fan_in), (self.features,))
        if self.normalised:
            kernel = kernel / jnp.maximum(spectral_norm(kernel), _LAYER_NORM_EPSILON)
        return inputs @ kernel + bias[None]


class _FeedForward(nn.Module):
    """`LayerNorm(X + Dropout(gelu(X W_up) W_down))`, both kernels divided by their spectral norms."""

    dropout_rate: float
    spectral: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        n = x.shape[-1]
        hidden = nn.gelu(_SpectralDense(2 * n, self.spectral, name="up")(x), approximate=True)
        hidden = _SpectralDense(n, self.spectral, name="down")(hidden)
        hidden = nn.Dropout(self.dropout_rate)(hidden, deterministic=deterministic)
        return _layer_norm("norm")(x + hidden)


class KnowledgeTransferLayer(nn.Module):
    """One layer of LPKA: four attentions between rows and columns, averaged, then a feed-forward block.

    `FFN((A(T, S) + A(T, S^T) + A(T^T, S)^T + A(T^T, S^T)^T) / 4)`; arXiv:2404.13322. Rows and
    columns both serve as tokens, since either may carry what the other model needs.
    """

    num_heads: int = 8
    attention_dropout: float = 0.1
    feed_forward_dropout: float = 0.2
    spectral: bool = True

    @nn.compact
    def __call__(self, target: jax.Array, source: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps target `[m, n]` and source `[p, q]` to `[m, n]`."""

        def attend(name: str, queries: jax.Array, keys: jax.Array) -> jax.Array:
            attention = ParameterAttention(self.num_heads, self.attention_dropout, name=name)
            return attention(queries, keys, deterministic=deterministic)

        mixed = (
            attend("rows_rows", target, source)
            + attend("rows_cols", target, source.T)
            + attend("cols_rows", target.T, source).T
            + attend("cols_cols", target.T, source.T).T
        ) / 4
        feed_forward = _FeedForward(self.feed_forward_dropout, self.spectral, name="feed_forward")
        return feed_forward(mixed, deterministic=deterministic)


class LPKA(nn.Module):
    """The adapter as published: a stack of knowledge transfer layers whose output is the new target matrix.

    `T_0 = T; T_{i+1} = Layer_i(T_i, S)`. Every row of the output has variance 1 (before the last scale and
    bias), whatever the target's scale was.

    Attributes:
      num_layers: layers in the stack; 2 as published.
      num_heads: heads of each attention; 8 as published.
      attention_dropout: dropout on attention weights; 0.1 as published.
      feed_forward_dropout: dropout on the feed-forward block; 0.2 as published.
      spectral: whether the feed-forward kernels are divided by their spectral norms, as published.
    """

    num_layers: int = 2
    num_heads: int = 8
    attention_dropout: float = 0.1
    feed_forward_dropout: float = 0.2
    spectral: bool = True

    @nn.compact
    def __call__(self, target: jax.Array, source: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps target `[m, n]` and source `[p, q]` to `[m, n]`."""
        for i in range(self.num_layers):
            layer = KnowledgeTransferLayer(
                self.num_heads,
                self.attention_dropout,
                self.feed_forward_dropout,
                self.spectral,
                name=f"layer_{i}",
            )
            target = layer(target, source, deterministic=deterministic)
        return target


class GatedLPKA(nn.Module):
    """LPKA as a change that a gate lets in: `T + g s (LPKA(T / s, S / s_S) - T / s)`, `g = 0` at the start.

    `s` and `s_S` are the root mean squares of target and source. Our choice: the published output replaces the
    target and with it the target's scale, which only a following BatchNorm forgives; here the transfer starts
    as the identity, keeps the target's scale, and both matrices meet at the scale that attention expects.
    """

    lpka: LPKA

    @nn.compact
    def __call__(self, target: jax.Array, source: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps target `[m, n]` and source `[p, q]` to `[m, n]`."""
        gate = self.param("gate", nn.initializers.zeros, ())
        scale = _root_mean_square(target)
        normalised = target / scale
        proposed = self.lpka(normalised, source / _root_mean_square(source), deterministic=deterministic)
        return target + gate * scale * (proposed - normalised)


def _root_mean_square(matrix: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(matrix)) + _LAYER_NORM_EPSILON)
