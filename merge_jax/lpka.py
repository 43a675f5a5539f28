"""LPKA, the low-rank parametric knowledge adapter, as Flax (Linen) modules: matrices in, matrices out.

Method: Li et al., "MergeNet", arXiv:2404.13322, with the details of its published code.

Legend of shapes: target matrix `[m, n]`, source matrix `[p, q]`; `h` heads of width `d`; tokens are the rows of
what a module is given, so queries are `[r, c]` and keys `[s, k]`.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.checks import check_at_least_one, check_below_one, check_choice, check_flag, check_float_dtype
from merge_jax.spectral import spectral_norm
from merge_jax.stacks import Stack

__all__ = [
    "ATTENTIONS",
    "LPKA",
    "AttentionName",
    "FeedForward",
    "KnowledgeTransferLayer",
    "ParameterAttention",
    "head_width",
    "layer_norm",
    "linear",
]

AttentionName = Literal["rows_rows", "rows_cols", "cols_rows", "cols_cols"]
"""Which tokens of the target ask which tokens of the source: `cols_rows` is columns of `T`, rows of `S`."""

ATTENTIONS: tuple[AttentionName, ...] = get_args(AttentionName)

# The published epsilon. Rows of weights can have tiny variances, which a usual epsilon would swamp.
_LAYER_NORM_EPSILON = 1e-12
_MINIMUM_WIDTH = 128
_LARGEST_SCORE = 1e8
# Kernels and biases uniform in +-1/sqrt(fan_in), PyTorch's default, which the published code relies on.
_KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def head_width(query_size: int, key_size: int, num_heads: int, max_width: int | None = None) -> int:
    """Returns the width of one attention head: `max((c + k) // 2, 128) // h` as published, the whole capped.

    Raises:
      ValueError: there are more heads than the whole width, so that a head would have none.
    """
    width = max((query_size + key_size) // 2, _MINIMUM_WIDTH)
    if max_width is not None:
        width = min(width, max_width)
    if not 1 <= num_heads <= width:
        raise ValueError(f"num_heads must lie in [1, {width}], the width of its attention, got {num_heads}")
    return width // num_heads


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(features: int, fan_in: int, dtype: Any, name: str) -> nn.Dense:
    """Returns a dense layer with PyTorch's initial distribution; parameters are float32."""
    return nn.Dense(features, dtype=dtype, kernel_init=_KERNEL_INIT, bias_init=_bias_init(fan_in), name=name)


def layer_norm(name: str) -> nn.LayerNorm:
    """Returns a LayerNorm over features in float32 with the published epsilon."""
    # The fast variance, E[x^2] - E[x]^2, cancels badly for weights with a mean.
    return nn.LayerNorm(epsilon=_LAYER_NORM_EPSILON, use_fast_variance=False, dtype=jnp.float32, name=name)


class ParameterAttention(nn.Module):
    """Rows of one matrix attend to rows of another: `LayerNorm(X + concat_h(softmax(Q K^T / sqrt(d)) V) W_o)`.

    `Q = X W_q`, `K = Y W_k`, `V = Y W_v`, with biases. Source: arXiv:2404.13322, details as in its code.

    Attributes:
      num_heads: number of heads `h`; the width of each is `head_width(c, k, h, max_width)`.
      max_width: cap on the width of all heads together; None as published.
      dropout_rate: dropout on the attention weights.
      max_scores: attention maps `[h, r, s]` with more entries are made in chunks of queries and made again in the
        backward pass, so that memory does not grow with `r s`; the values are the same.
      dtype: of the computation, softmax and LayerNorm excepted; parameters are float32.
    """

    num_heads: int
    max_width: int | None = None
    dropout_rate: float = 0.1
    max_scores: int = 2**22
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps queries `[r, c]` and keys `[s, k]` to `[r, c]`, float32."""
        chex.assert_rank([queries, keys], [2, 2])
        c, k = queries.shape[1], keys.shape[1]
        d = head_width(c, k, self.num_heads, self.max_width)
        features = self.num_heads * d

        def heads(x: jax.Array, name: str) -> jax.Array:
            return linear(features, x.shape[1], self.dtype, name)(x).reshape(-1, self.num_heads, d)

        q, key, value = heads(queries, "query"), heads(keys, "key"), heads(keys, "value")
        rate = 0.0 if deterministic else self.dropout_rate
        mixed = _attend(q, key, value, rate, self.make_rng("dropout") if rate else None, self.max_scores)
        outputs = linear(c, features, self.dtype, "out")(mixed.reshape(-1, features))
        return layer_norm("norm")(queries + outputs)


def _attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    max_scores: int,
) -> jax.Array:
    """Returns `softmax(Q K^T / sqrt(d)) V`, `[r, h, d]`, for queries `[r, h, d]`, keys and values `[s, h, d]`."""

    def mix(queries: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        scores = jnp.einsum("rhd,shd->hrs", queries, keys).astype(jnp.float32) / queries.shape[-1] ** 0.5
        # Beyond that, one rounding of a score is more than an exponential can take, and XLA may round twice.
        weights = nn.softmax(jnp.clip(scores, -_LARGEST_SCORE, _LARGEST_SCORE))
        if dropout_key is not None:
            weights = jnp.where(_kept(dropout_key, dropout_rate, weights.shape), weights / (1 - dropout_rate), 0.0)
        return jnp.einsum("hrs,shd->rhd", weights.astype(values.dtype), values)

    r, h, d = queries.shape
    chunk = max(1, max_scores // (h * keys.shape[0]))
    if chunk >= r:
        return mix(queries, dropout_key)
    chunks = -(-r // chunk)
    padded = jnp.pad(queries, ((0, chunks * chunk - r), (0, 0), (0, 0))).reshape(chunks, chunk, h, d)
    dropout_keys = None if dropout_key is None else jax.random.split(dropout_key, chunks)
    # Under checkpoint a chunk's map lives only while the chunk is worked on, in the backward pass too.
    mixed = lax.map(lambda chunk: jax.checkpoint(mix)(*chunk), (padded, dropout_keys))
    return mixed.reshape(chunks * chunk, h, d)[:r]


def _kept(key: jax.Array, dropout_rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Returns a mask that keeps each entry with probability `1 - rate`, to a 65536th."""
    # Two entries of each random word: making the words takes longer than all else that dropout does.
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    halves = lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
    return halves.reshape(shape) >= min(round(dropout_rate * 2**16), 2**16 - 1)


class _SpectralDense(nn.Module):
    """A dense layer whose kernel is divided by its spectral norm: `x W / sigma(W) + b`."""

    features: int
    normalised: bool
    dtype: Any

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        fan_in = inputs.shape[-1]
        kernel = self.param("kernel", _KERNEL_INIT, (fan_in, self.features))
        bias = self.param("bias", _bias_init(fan_in), (self.features,))
        if self.normalised:
            kernel = kernel / jnp.maximum(spectral_norm(kernel), _LAYER_NORM_EPSILON)
        return inputs.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)[None]


class FeedForward(nn.Module):
    """`LayerNorm(X + Dropout(gelu(X W_up) W_down))`, both kernels divided by their spectral norms.

    Attributes:
      max_hidden: cap on the hidden width, which is `2 n` as published: 4 n^2 parameters, more than all else where
        matrices are wide. Below `2 n` the block is a bottleneck.
      dropout_rate: dropout on what is added.
      spectral: whether kernels are divided by their spectral norms.
      dtype: of the computation, LayerNorm excepted; parameters are float32.
    """

    max_hidden: int | None = None
    dropout_rate: float = 0.2
    spectral: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps `[m, n]` to `[m, n]`, float32."""
        n = x.shape[-1]
        hidden_size = 2 * n if self.max_hidden is None else min(2 * n, self.max_hidden)
        hidden = nn.gelu(_SpectralDense(hidden_size, self.spectral, self.dtype, name="up")(x), approximate=True)
        hidden = _SpectralDense(n, self.spectral, self.dtype, name="down")(hidden)
        hidden = nn.Dropout(self.dropout_rate)(hidden, deterministic=deterministic)
        return layer_norm("norm")(x + hidden)


class KnowledgeTransferLayer(nn.Module):
    """One layer of LPKA: four attentions between rows and columns, averaged, then a feed-forward block.

    `FFN((A(T, S) + A(T, S^T) + A(T^T, S)^T + A(T^T, S^T)^T) / 4)`; arXiv:2404.13322. Rows and
    columns both serve as tokens, since either may carry what the other model needs.

    With inner width `D` (equal in all four) and hidden width `f`, the layer has `4 D (m + n + p + q) + 2 n f`
    parameters and a forward pass costs `4 D (4 m n + 4 p q + (m + n)(p + q)) + 4 m n f` floating point
    operations, biases and norms left out. The published widths grow with the matrices: for 768x3072 from 768x3072
    two layers have 215 million parameters. The caps are our choice; they change nothing where matrices are small.

    Attributes:
      num_heads: heads of each attention; 8 as published.
      max_width: cap on the inner width of each attention; None as published.
      max_hidden: cap on the hidden width of the feed-forward block; None as published.
      attentions: which of the four there are; all as published. `cols_cols` costs most where matrices are wide.
      attention_dropout: dropout on attention weights; 0.1 as published.
      feed_forward_dropout: dropout on the feed-forward block; 0.2 as published.
      spectral: whether the feed-forward kernels are divided by their spectral norms, as published.
      max_scores: entries of an attention map that are held at once; see `ParameterAttention`.
      dtype: of the computation; parameters, softmax and norms are float32.
    """

    num_heads: int = 8
    max_width: int | None = 512
    max_hidden: int | None = 1024
    attentions: tuple[AttentionName, ...] = ATTENTIONS
    attention_dropout: float = 0.1
    feed_forward_dropout: float = 0.2
    spectral: bool = True
    max_scores: int = 2**22
    dtype: Any = jnp.float32

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        check_at_least_one(num_heads=self.num_heads, max_scores=self.max_scores)
        caps = {"max_width": self.max_width, "max_hidden": self.max_hidden}
        check_at_least_one(**{name: cap for name, cap in caps.items() if cap is not None})
        check_below_one(attention_dropout=self.attention_dropout, feed_forward_dropout=self.feed_forward_dropout)
        check_flag(spectral=self.spectral)
        check_float_dtype(self.dtype)
        if not isinstance(self.attentions, tuple) or not self.attentions:
            raise ValueError(
                f"attentions must be a tuple of one or more of {', '.join(ATTENTIONS)}, got {self.attentions!r}"
            )
        for name in self.attentions:
            check_choice("attention", name, ATTENTIONS)
        if len(set(self.attentions)) < len(self.attentions):
            raise ValueError(f"an attention stands twice in {self.attentions}")

    @nn.compact
    def __call__(self, target: jax.Array, source: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps target `[m, n]` and source `[p, q]` to `[m, n]`."""

        def attend(name: AttentionName) -> jax.Array:
            asks, answers = name.split("_")
            attention = ParameterAttention(
                self.num_heads, self.max_width, self.attention_dropout, self.max_scores, self.dtype, name=name
            )
            keys = source if answers == "rows" else source.T
            if asks == "rows":
                return attention(target, keys, deterministic=deterministic)
            return attention(target.T, keys, deterministic=deterministic).T

        mixed = sum(map(attend, self.attentions[1:]), attend(self.attentions[0])) / len(self.attentions)
        feed_forward = FeedForward(
            self.max_hidden, self.feed_forward_dropout, self.spectral, self.dtype, name="feed_forward"
        )
        return feed_forward(mixed, deterministic=deterministic)


class LPKA(Stack):
    """The adapter: a stack of knowledge transfer layers whose output is the new target matrix.

    `T_0 = T; T_{i+1} = Layer_i(T_i, S)`; arXiv:2404.13322. Every row of the output has variance 1 (before the last
    scale and bias), whatever the target's scale was.

    Attributes:
      num_layers: layers in the stack; 2 as published.
      layer: the layer that is stacked; by default with our caps on widths.
    """

    num_layers: int = 2
    layer: nn.Module = dataclasses.field(default_factory=KnowledgeTransferLayer)
