"""LPKA, the low-rank parametric knowledge adapter, as plain functions of arrays: matrices in, matrices out.

Method: Li et al., "MergeNet", arXiv:2404.13322, with the details of its published code.

Legend of shapes: target matrix `[m, n]`, source matrix `[p, q]`; `h` heads of width `d`; tokens are the rows of a
matrix, so queries are `[r, c]` and keys `[s, k]`; `L` layers, the first axis of every parameter.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from merge_jax.checks import check_at_least_one, check_below_one, check_choice, check_flag, check_float_dtype
from merge_jax.transfers.adapters.matrix_layers import (
    dense,
    dense_start,
    feed_forward,
    feed_forward_start,
    hidden_size,
    in_layers,
    layer_norm,
    norm_start,
    pad_to,
    valid_ones,
)
from merge_jax.transfers.network import Dropout, Network, Sizes, Start, draw, draw_mask, draw_masks, drawn_network

__all__ = [
    "ATTENTIONS",
    "LPKA",
    "AttentionName",
    "LPKAOptions",
    "apply",
    "attention_widths",
    "init",
    "lpka_network",
]

AttentionName = Literal["rows_rows", "rows_cols", "cols_rows", "cols_cols"]
"""Which target tokens attend to which source tokens: in `cols_rows`, columns of `T` attend to rows of `S`."""

ATTENTIONS: tuple[AttentionName, ...] = get_args(AttentionName)

_MINIMUM_WIDTH = 128
_LARGEST_SCORE = 1e8
# The score of a padding key: its weight underflows to 0.
_NO_SCORE = -1e30
# Attentions of up to this many queries always run as one; larger ones only if padding adds little work.
_SMALL = 256
_LARGEST_RATIO = 1.25


@dataclass(frozen=True)
class LPKAOptions:
    """The options of an LPKA; the defaults are the published values, except for the two caps (our choice).

    Attributes:
      num_layers: layers `L`.
      num_heads: heads `h` of each attention.
      max_width: cap on the width `h d` of each attention; None as published.
      max_hidden: cap on the hidden width `f` of the feed-forward block, which is `2 n` as published: 4 n^2 parameters,
        more than all others in wide matrices. Below `2 n` the block is a bottleneck.
      attentions: which of the four to use. `cols_cols` costs most for wide matrices.
      attention_dropout: rate of dropout on the attention weights.
      feed_forward_dropout: rate of dropout on the output of the feed-forward block.
      spectral: whether the feed-forward kernels are divided by their spectral norms.
      max_scores: attention maps `[h, r, s]` with more entries are computed in chunks of queries and recomputed in the
        backward pass, so that memory does not grow with `r s`. Without dropout the values do not depend on it.
      dtype: of the computation; parameters, softmax and norms are float32.
    """

    num_layers: int = 2
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
        check_at_least_one(num_layers=self.num_layers, num_heads=self.num_heads, max_scores=self.max_scores)
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
            raise ValueError(f"an attention appears twice in {self.attentions}")


def init(key: jax.Array, sizes: Sizes, options: LPKAOptions) -> dict[str, Any]:
    """Returns the parameters of one LPKA: uniform in `+-1/sqrt(fan in)`, PyTorch's default, and norms of 1 and 0.

    `D` is the sum of the widths `h d` of all attentions of a side, `a` their number, and `f` the hidden width. Each
    array has a first axis of `L` layers:

    - `target_rows`, queries from the target's rows: `query` (kernel `[n, D]`, bias `[D]`), `out` (kernel `[D, n]`, bias
      `[a, n]`) and `norm` (scale and bias `[a, n]`); `target_cols` the same for columns, with `m` instead of `n`;
    - `source_rows`, keys and values from the source's rows: `key_value` (kernel `[q, 2 D]`, bias `[2 D]`), key and
      value of each attention in turn; `source_cols` the same with `p`;
    - `feed_forward`: `up` (kernel `[n, f]`, bias `[f]`), `down` (kernel `[f, n]`, bias `[n]`), `norm` (`[n]`).

    Raises:
      ValueError: more heads than the width of an attention.
    """
    return draw(key, _starts(sizes, sizes, options))


def apply(
    params: Mapping[str, Any],
    target: jax.Array,
    source: jax.Array,
    masks: Mapping[str, Any] | None = None,
    true: Mapping[str, Any] | None = None,
    *,
    options: LPKAOptions,
) -> jax.Array:
    """Returns the new target matrix `[m, n]`: `T_0 = T; T_{i+1} = Layer_i(T_i, S)`.

    A layer is `FFN((A(T, S) + A(T, S^T) + A(T^T, S)^T + A(T^T, S^T)^T) / 4)`, with the attention
    `A(X, Y) = LayerNorm(X + concat_h(softmax(Q K^T / sqrt(d)) V) W_o)`, `Q = X W_q`, `K = Y W_k`, `V = Y W_v`, all with
    biases. Rows and columns both serve as tokens, since either may carry useful knowledge. Every row of the output has
    variance 1 (before the last scale and bias), whatever the target's scale. arXiv:2404.13322.

    A layer has `sum_a 2 D_a (c + k) + 2 n f` parameters and costs `sum_a 4 D_a (m n + p q + r s) + 4 m n f` floating
    point operations, without biases and norms. Attention `a` of width `D_a` has `r` queries of `c` features and `s`
    keys of `k`. The published widths grow with the matrices: between matrices of 768x3072, two layers have 215 million
    parameters.

    Args:
      params: from `init`.
      target: `[m, n]`.
      source: `[p, q]`.
      masks: dropout masks from `draw_masks`; None for no dropout.
      true: the true sizes `m`, `n`, `p`, `q`, and `scales` of scores by attention, if matrices and parameters are
        padded with zeros. The output inside the true sizes is then that of the unpadded ones, and undefined outside.
      options: those of `init`.
    """
    return in_layers(functools.partial(_layer, options, true, source), options.num_layers, target, params, masks)


class _Attention(NamedTuple):
    """One of the four attentions: `r` queries of `c` features, `s` keys of `k` features, heads of `h d` in total."""

    asks: str
    answers: str
    r: int
    c: int
    s: int
    k: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.asks}_{self.answers}"


def _attentions(sizes: Sizes, options: LPKAOptions) -> list[_Attention]:
    """Returns the attentions between matrices of these sizes, first those with the target's rows as queries."""
    m, n, p, q = sizes
    found = []
    for name in ATTENTIONS:
        if name in options.attentions:
            asks, answers = name.split("_")
            r, c = (m, n) if asks == "rows" else (n, m)
            s, k = (p, q) if answers == "rows" else (q, p)
            found.append(_Attention(asks, answers, r, c, s, k, _width(c, k, options)))
    return found


def _width(query_features: int, key_features: int, options: LPKAOptions) -> int:
    """Returns the width `h d` of an attention: `max((c + k) // 2, 128)` as published, capped, a multiple of `h`."""
    width = max((query_features + key_features) // 2, _MINIMUM_WIDTH)
    if options.max_width is not None:
        width = min(width, options.max_width)
    if options.num_heads > width:
        raise ValueError(f"num_heads must lie in [1, {width}], the width of its attention, got {options.num_heads}")
    return width // options.num_heads * options.num_heads


def attention_widths(sizes: Sizes, options: LPKAOptions) -> dict[str, int]:
    """Returns the width `h d` of each attention by name."""
    return {one.name: one.width for one in _attentions(sizes, options)}


def _bundles(attentions: Sequence[_Attention]) -> list[list[_Attention]]:
    """Returns the attentions in bundles that run as one: those with the same keys and similar numbers of queries.

    Our choice: each attention is otherwise compiled separately, so two share one program if padding the shorter queries
    costs little.
    """
    bundles = []
    for answers in ("rows", "cols"):
        bundle = [one for one in attentions if one.answers == answers]
        most = max((one.r for one in bundle), default=0)
        if most <= _SMALL or len(bundle) * most <= _LARGEST_RATIO * sum(one.r for one in bundle):
            bundles.append(bundle)
        else:
            bundles += [[one] for one in bundle]
    return [bundle for bundle in bundles if bundle]


def _layer(
    options: LPKAOptions,
    true: Mapping[str, Any] | None,
    source: jax.Array,
    target: jax.Array,
    params: Mapping[str, Any],
    masks: Mapping[str, Any],
) -> jax.Array:
    attentions = _attentions(Sizes(*target.shape, *source.shape), options)
    mixed = _mixed(attentions, true, source, target, params, masks, options)
    total: Any = 0.0
    for asks, x, valid in (
        ("rows", target, _valid(target, 1, true, "n")),
        ("cols", target.T, _valid(target, 0, true, "m")),
    ):
        answered = [mixed[one.name] for one in attentions if one.asks == asks]
        if answered:
            output, norm = params[f"target_{asks}"]["out"], params[f"target_{asks}"]["norm"]
            kernels = jnp.split(output["kernel"], np.cumsum([part.shape[1] for part in answered])[:-1])
            pairs = zip(answered, kernels, strict=True)
            out = jnp.stack([part.astype(options.dtype) @ kernel.astype(options.dtype) for part, kernel in pairs])
            new = layer_norm(x[None] + out + output["bias"][:, None].astype(out.dtype), norm, valid).sum(axis=0)
            total = total + (new if asks == "rows" else new.T)
    x = total / len(attentions)
    rows, columns = _valid(target, 0, true, "m"), _valid(target, 1, true, "n")
    if rows is not None and columns is not None:  # Outputs of padded queries must not be used.
        x = jnp.where(rows[:, None] & columns[None], x, 0.0)
    new = feed_forward(params["feed_forward"], x, masks.get("feed_forward"), columns, options)
    # Nor by the next layer's queries, whose kernels would get gradients outside the true sizes.
    return new if rows is None else jnp.where(rows[:, None], new, 0.0)


def _valid(matrix: jax.Array, axis: int, true: Mapping[str, Any] | None, size: str) -> jax.Array | None:
    """Returns which indices of an axis are not padding; None for all."""
    return None if true is None else jnp.arange(matrix.shape[axis]) < true[size]


def _mixed(
    attentions: Sequence[_Attention],
    true: Mapping[str, Any] | None,
    source: jax.Array,
    target: jax.Array,
    params: Mapping[str, Any],
    masks: Mapping[str, Any],
    options: LPKAOptions,
) -> dict[str, jax.Array]:
    """Returns the attended values of each attention's queries, `[r, h d]`, before the output kernels."""
    h = options.num_heads
    queries: dict[str, jax.Array] = {}
    for tokens, x in (("rows", target), ("cols", target.T)):
        asking = [one for one in attentions if one.asks == tokens]
        if asking:
            projected = dense(x, params[f"target_{tokens}"]["query"], options.dtype)
            queries |= zip([one.name for one in asking], _by_attention(projected, asking, 1), strict=True)
    keys_values = {
        tokens: dense(x, params[f"source_{tokens}"]["key_value"], options.dtype)
        for tokens, x in (("rows", source), ("cols", source.T))
        if f"source_{tokens}" in params
    }
    mixed = {}
    for number, bundle in enumerate(_bundles(attentions)):
        answers, s = bundle[0].answers, bundle[0].s
        r, d = max(one.r for one in bundle), max(one.width for one in bundle) // h
        answering = [one for one in attentions if one.answers == answers]
        if bundle == answering and len({one.width for one in bundle}) == 1:
            kv = jnp.moveaxis(keys_values[answers].reshape(s, len(bundle), 2, h, d), 1, 0)
        else:
            parts = dict(zip(answering, _by_attention(keys_values[answers], answering, 2), strict=True))
            kv = jnp.stack([pad_to(parts[one].reshape(s, 2, h, -1), (s, 2, h, d)) for one in bundle])
        q = jnp.stack([pad_to(queries[one.name].reshape(one.r, h, -1), (r, h, d)) for one in bundle])
        if true is None:
            valid, scales = None, jnp.asarray([one.width // h for one in bundle], jnp.float32) ** -0.5
        else:
            valid = jnp.arange(s) < true["p" if answers == "rows" else "q"]
            scales = jnp.stack([true["scales"][one.name] for one in bundle])
        q *= scales.astype(q.dtype)[:, None, None, None]
        answered = _attend(q, kv[:, :, 0], kv[:, :, 1], masks.get(f"attention_{number}"), valid, options)
        for one, part in zip(bundle, answered, strict=True):
            mixed[one.name] = part[: one.r, :, : one.width // h].reshape(one.r, one.width)
    return mixed


def _by_attention(projected: jax.Array, attentions: Sequence[_Attention], parts: int) -> list[jax.Array]:
    """Splits `[tokens, features]` by attention; each slice is `parts` times as wide as the attention."""
    return jnp.split(projected, np.cumsum([parts * one.width for one in attentions])[:-1], axis=1)


def _attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | None,
    valid: jax.Array | None,
    options: LPKAOptions,
) -> jax.Array:
    """Returns `softmax(Q K^T) V`, `[a, r, h, d]`, of `a` attentions: queries `[a, r, h, d]`, the others `[a, s, h, d]`.

    The mask is `[a, h, r, s]`, or a random key if that has more than `max_scores` entries; valid keys are `[s]`.
    """
    rate = options.attention_dropout

    def mix(queries: jax.Array, mask: jax.Array | None) -> jax.Array:
        scores = jnp.einsum("arhd,ashd->ahrs", queries, keys).astype(jnp.float32)
        # Beyond that, one rounding of a score is more than an exponential can take, and XLA may round twice.
        scores = jnp.clip(scores, -_LARGEST_SCORE, _LARGEST_SCORE)
        if valid is not None:
            scores = jnp.where(valid[None, None, None], scores, _NO_SCORE)
        weights = jax.nn.softmax(scores)
        if mask is not None:
            weights = jnp.where(mask, weights / (1 - rate), 0.0)
        return jnp.einsum("ahrs,ashd->arhd", weights.astype(values.dtype), values)

    a, r, h, d = queries.shape
    s = keys.shape[1]
    chunk = max(1, options.max_scores // (a * h * s))
    if chunk >= r:
        return mix(queries, mask)
    chunks = -(-r // chunk)
    padded = jnp.moveaxis(pad_to(queries, (chunks * chunk, h, d)).reshape(a, chunks, chunk, h, d), 1, 0)
    mask_keys = None if mask is None else jax.random.split(mask, chunks)

    # Under checkpoint, a chunk's map is freed after the chunk, in the backward pass too.
    @jax.checkpoint
    def mix_chunk(queries: jax.Array, mask_key: jax.Array | None) -> jax.Array:
        return mix(queries, None if mask_key is None else draw_mask(mask_key, (a, h, chunk, s), rate))

    mixed = lax.map(lambda chunk: mix_chunk(*chunk), (padded, mask_keys))
    return jnp.moveaxis(mixed, 0, 1).reshape(a, chunks * chunk, h, d)[:, :r]


def _starts(true: Sizes, padded: Sizes, options: LPKAOptions) -> dict[str, Any]:
    """Returns the initial parameters for the true sizes, padded with zeros."""
    layers, h = options.num_layers, options.num_heads
    starts: dict[str, Any] = {}
    pairs = list(zip(_attentions(true, options), _attentions(padded, options), strict=True))
    for tokens, (features, wide) in {"rows": (true.n, padded.n), "cols": (true.m, padded.m)}.items():
        asking = [(one.width, pad.width) for one, pad in pairs if one.asks == tokens]
        if asking:
            heads = np.concatenate([_valid_heads(width, pad, h) for width, pad in asking])
            # The output kernel of each attention has a separate fan in.
            bounds = np.array([width**-0.5 for width, _ in asking])
            by_row = heads * np.repeat(bounds, [pad for _, pad in asking])
            kept = valid_ones(features, wide)
            starts[f"target_{tokens}"] = {
                "query": dense_start(layers, features, kept, heads),
                "out": {
                    "kernel": Start((layers, len(heads), wide), (by_row[None, :, None], kept[None, None])),
                    "bias": Start((layers, len(asking), wide), (bounds[None, :, None], kept[None, None])),
                },
                "norm": norm_start(layers, len(asking), wide),
            }
    for tokens, (features, wide) in {"rows": (true.q, padded.q), "cols": (true.p, padded.p)}.items():
        answering = [(one.width, pad.width) for one, pad in pairs if one.answers == tokens]
        if answering:
            heads = np.concatenate([np.tile(_valid_heads(width, pad, h), 2) for width, pad in answering])
            starts[f"source_{tokens}"] = {"key_value": dense_start(layers, features, valid_ones(features, wide), heads)}
    return starts | {"feed_forward": feed_forward_start(layers, true, padded, options)}


def _valid_heads(true: int, padded: int, heads: int) -> np.ndarray:
    """Returns `valid_ones` of each of the heads of an axis."""
    return np.tile(valid_ones(true // heads, padded // heads), heads)


def _masks(sizes: Sizes, options: LPKAOptions) -> dict[str, Dropout]:
    """Returns the dropout masks to draw in one pass; none if the rate is 0."""
    masks = {}
    if options.attention_dropout:
        for number, bundle in enumerate(_bundles(_attentions(sizes, options))):
            shape = (len(bundle), options.num_heads, max(one.r for one in bundle), bundle[0].s)
            whole = math.prod(shape) <= options.max_scores
            masks[f"attention_{number}"] = Dropout((options.num_layers, *shape), options.attention_dropout, whole)
    if options.feed_forward_dropout:
        masks["feed_forward"] = Dropout((options.num_layers, sizes.m, sizes.n), options.feed_forward_dropout)
    return masks


def _flops(sizes: Sizes, options: LPKAOptions) -> int:
    """Returns the floating point operations of one pass; see `apply`."""
    m, n, p, q = sizes
    products = [4 * one.width * (m * n + p * q + one.r * one.s) for one in _attentions(sizes, options)]
    return options.num_layers * (sum(products) + 4 * m * n * hidden_size(sizes, options))


def _true(sizes: Sizes, options: LPKAOptions) -> dict[str, Any]:
    scales = {one.name: (one.width // options.num_heads) ** -0.5 for one in _attentions(sizes, options)}
    return {**sizes._asdict(), "scales": scales}


def lpka_network(options: LPKAOptions) -> Network:
    """Returns the LPKA as a network for `adapter_transfer`.

    Raises:
      ValueError: an option out of range.
    """
    options.check()
    return drawn_network(
        functools.partial(_starts, options=options),
        functools.partial(apply, options=options),
        functools.partial(_masks, options=options),
        true=functools.partial(_true, options=options),
        flops=functools.partial(_flops, options=options),
    )


class LPKA(nn.Module):
    """The adapter as a Flax module: its parameters are the arrays of `init`, its call is `apply`.

    Attributes:
      options: of the LPKA.
    """

    options: LPKAOptions = LPKAOptions()

    @nn.compact
    def __call__(self, target: jax.Array, source: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps target `[m, n]` and source `[p, q]` to `[m, n]`; dropout draws from the rng `dropout`."""
        chex.assert_rank([target, source], [2, 2])
        sizes = Sizes(*target.shape, *source.shape)
        if self.is_initializing():
            start: Any = init(self.make_rng("params"), sizes, self.options)
        else:  # Only their shapes are used.
            shapes = jax.eval_shape(functools.partial(init, sizes=sizes, options=self.options), jax.random.key(0))
            start = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
        params = {name: self.param(name, lambda _, name=name: start[name]) for name in start}
        masks = None if deterministic else draw_masks(self.make_rng("dropout"), _masks(sizes, self.options))
        return apply(params, target, source, masks, options=self.options)
