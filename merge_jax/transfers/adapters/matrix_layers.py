"""Building blocks of networks on matrices: dense layers, LayerNorm, a feed-forward block, and stacked layers.

Details as in the published code of MergeNet (arXiv:2404.13322). Padded sizes have zeros after the true ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from merge_jax.transfers.adapters.spectral import spectral_norm
from merge_jax.transfers.network import Sizes, Start

__all__ = [
    "LayerFn",
    "dense",
    "dense_start",
    "feed_forward",
    "feed_forward_start",
    "hidden_size",
    "in_layers",
    "layer_norm",
    "norm_start",
    "pad_to",
    "valid_ones",
]

# A loop compiles as slowly as two separate layers.
_UNROLLED = 2

LayerFn = Callable[[jax.Array, Any, Any], jax.Array]
"""`(target [m, n], params, masks) -> target [m, n]`: one layer."""

# The published epsilon. Rows of weights can have tiny variances, which a usual epsilon would dominate.
_EPSILON = 1e-12


def in_layers(layer: LayerFn, num_layers: int, target: jax.Array, params: Any, masks: Any) -> jax.Array:
    """Returns the target after all layers: `T_{i+1} = layer(T_i, params_i, masks_i)`.

    One or two layers are unrolled. More run in a loop, which takes as long to compile as two; intermediate values of a
    layer are then recomputed in the backward pass.
    """
    layers = params, dict(masks or {})
    if num_layers <= _UNROLLED:
        for i in range(num_layers):
            target = layer(target, *jax.tree.map(lambda leaf, i=i: jnp.squeeze(leaf[i : i + 1], 0), layers))
        return target

    @jax.checkpoint
    def step(target: jax.Array, layer_inputs: Any) -> jax.Array:
        return layer(target, *layer_inputs)

    return lax.scan(
        lambda target, layer_inputs: (step(target, layer_inputs), None), target.astype(jnp.float32), layers
    )[0]


def feed_forward(
    params: Mapping[str, Any], x: jax.Array, mask: jax.Array | None, valid: jax.Array | None, options: Any
) -> jax.Array:
    """Returns `LayerNorm(X + Dropout(gelu(X W_up) W_down))`, `[m, n]`, both kernels divided by their spectral norms.

    Args:
      params: `up`, `down` and `norm`.
      x: `[m, n]`.
      mask: dropout mask, `[m, n]`, or None.
      valid: which columns are not padding, `[n]`, or None for all.
      options: with `feed_forward_dropout`, `spectral` and `dtype`.
    """
    up, down = params["up"], params["down"]
    if options.spectral:
        # Both have one shape, so one program computes their norms.
        kernels = jnp.stack([up["kernel"], down["kernel"].T])
        norms = jnp.maximum(jax.vmap(spectral_norm)(kernels), _EPSILON)
        up, down = ({**dense, "kernel": dense["kernel"] / norm} for dense, norm in zip((up, down), norms, strict=True))
    hidden = jax.nn.gelu(dense(x, up, options.dtype), approximate=True)
    added = dense(hidden, down, options.dtype)
    if mask is not None:
        added = jnp.where(mask, added / (1 - options.feed_forward_dropout), 0.0)
    return layer_norm(x + added, params["norm"], valid)


def layer_norm(x: jax.Array, params: Mapping[str, jax.Array], valid: jax.Array | None = None) -> jax.Array:
    """Returns `(x - mean) / sqrt(variance + 1e-12) * scale + bias` over the last axis, in float32.

    Args:
      x: `[..., tokens, c]`.
      params: `scale` and `bias`, `[..., c]`.
      valid: which features are not padding, `[c]`, or None for all.
    """
    x = x.astype(jnp.float32)
    count: Any = x.shape[-1]
    if valid is not None:
        valid, count = jnp.expand_dims(valid, range(x.ndim - 1)), jnp.sum(valid)
        x = jnp.where(valid, x, 0.0)
    # The fast variance, E[x^2] - E[x]^2, suffers from cancellation for weights with a mean.
    centred = x - jnp.sum(x, axis=-1, keepdims=True) / count
    if valid is not None:
        centred = jnp.where(valid, centred, 0.0)
    variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / count
    scale, bias = (jnp.expand_dims(params[name], -2) for name in ("scale", "bias"))
    return centred * lax.rsqrt(variance + _EPSILON) * scale + bias


def dense(x: jax.Array, params: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    """Returns `X W + b`, computed in this dtype."""
    return x.astype(dtype) @ params["kernel"].astype(dtype) + params["bias"].astype(dtype)[None]


def pad_to(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns the array with its last axes zero-padded to this shape."""
    extra = array.ndim - len(shape)
    widths = [(0, new - old) for old, new in zip(array.shape[extra:], shape, strict=True)]
    return jnp.pad(array, [(0, 0)] * extra + widths) if any(width for _, width in widths) else array


def valid_ones(true: int, padded: int) -> np.ndarray:
    """Returns 1 for each true index of an axis, and 0 for padding."""
    return (np.arange(padded) < true).astype(np.float32)


def dense_start(layers: int, fan_in: int, inputs: np.ndarray, outputs: np.ndarray) -> dict[str, Start]:
    """Returns the `Start` of a dense kernel `[layers, inputs, outputs]` and bias: `+-1/sqrt(fan in)`, as in PyTorch.

    Inputs and outputs are 1, or 0 for padding.
    """
    bound, count = fan_in**-0.5 * outputs[None], outputs.size
    return {
        "kernel": Start((layers, inputs.size, count), (inputs[None, :, None], bound[None])),
        "bias": Start((layers, count), (bound,)),
    }


def norm_start(*shape: int) -> dict[str, Start]:
    """Returns the `Start` of a LayerNorm: the identity."""
    return {"scale": Start(shape, centre=1.0), "bias": Start(shape)}


def hidden_size(sizes: Sizes, options: Any) -> int:
    """Returns the hidden width of the feed-forward block, `2 n`, capped at `max_hidden` of the options."""
    return 2 * sizes.n if options.max_hidden is None else min(2 * sizes.n, options.max_hidden)


def feed_forward_start(layers: int, true: Sizes, padded: Sizes, options: Any) -> dict[str, Any]:
    """Returns the initial parameters of `feed_forward`, with `max_hidden` of the options."""
    features, hidden = (
        valid_ones(true.n, padded.n),
        valid_ones(hidden_size(true, options), hidden_size(padded, options)),
    )
    return {
        "up": dense_start(layers, true.n, features, hidden),
        "down": dense_start(layers, hidden_size(true, options), hidden, features),
        "norm": norm_start(layers, padded.n),
    }
