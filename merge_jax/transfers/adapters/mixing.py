"""The attention-free ablation: a network that mixes the matrices with perceptrons, and its transfer."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checks import check_at_least_one, check_below_one, check_flag, check_float_dtype
from merge_jax.transfers.adapters.adapter import AdapterOptions, adapter_transfer
from merge_jax.transfers.adapters.matrix_layers import (
    dense,
    dense_start,
    feed_forward,
    feed_forward_start,
    in_layers,
    layer_norm,
    norm_start,
)
from merge_jax.transfers.base import Transfer
from merge_jax.transfers.network import Dropout, Network, Sizes, drawn_network
from merge_jax.transfers.routes import Routes

__all__ = ["MixingOptions", "apply", "mixing_network", "mlp_transfer"]


@dataclass(frozen=True)
class MixingOptions:
    """The options of the mixing network.

    Attributes:
      num_layers: layers, 1 or more.
      width: hidden units of both perceptrons.
      max_hidden: cap on the hidden width of the feed-forward block; None for `2 n`.
      feed_forward_dropout: dropout on the feed-forward block.
      spectral: whether the feed-forward kernels are divided by their spectral norms.
      dtype: of the computation, except LayerNorm; parameters are float32.
    """

    num_layers: int = 2
    width: int = 128
    max_hidden: int | None = 1024
    feed_forward_dropout: float = 0.2
    spectral: bool = True
    dtype: Any = jnp.float32

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        check_at_least_one(num_layers=self.num_layers, width=self.width)
        if self.max_hidden is not None:
            check_at_least_one(max_hidden=self.max_hidden)
        check_below_one(feed_forward_dropout=self.feed_forward_dropout)
        check_flag(spectral=self.spectral)
        check_float_dtype(self.dtype)


def apply(
    params: Mapping[str, Any],
    target: jax.Array,
    source: jax.Array,
    masks: Mapping[str, Any] | None = None,
    true: Any = None,
    *,
    options: MixingOptions,
) -> jax.Array:
    """Returns the new target matrix `[m, n]`; a layer is `FFN(LayerNorm(T + (P_r (P_c S)^T)^T))`.

    `P_c` maps each row of the source `[p, q]` to `n` features, `P_r` each of those columns from `p` to `m`
    entries: `P x = gelu(x W_1 + b_1) W_2 + b_2` with `width` hidden units. Unlike a layer of the LPKA, the mixing is
    learned once and does not depend on queries. This is our choice for the ablation that arXiv:2404.13322 names without
    detail.
    """
    del true  # Its matrices are never padded.

    def layer(target: jax.Array, params: Mapping[str, Any], masks: Mapping[str, Any]) -> jax.Array:
        def perceptron(x: jax.Array, name: str) -> jax.Array:
            hidden = dense(x, params[name]["up"], options.dtype)
            return dense(jax.nn.gelu(hidden, approximate=False), params[name]["down"], options.dtype)

        mixed = perceptron(perceptron(source, "columns").T, "rows").T
        x = layer_norm(target + mixed, params["norm"])
        return feed_forward(params["feed_forward"], x, masks.get("feed_forward"), None, options)

    return in_layers(layer, options.num_layers, target, params, masks)


def _starts(true: Sizes, sizes: Sizes, options: MixingOptions) -> dict[str, Any]:
    del true  # Its matrices are never padded.
    layers, hidden = options.num_layers, np.ones(options.width, np.float32)

    def perceptron(fan_in: int, features: int) -> dict[str, Any]:
        inputs, outputs = np.ones(fan_in, np.float32), np.ones(features, np.float32)
        return {
            "up": dense_start(layers, fan_in, inputs, hidden),
            "down": dense_start(layers, options.width, hidden, outputs),
        }

    return {
        "columns": perceptron(sizes.q, sizes.n),
        "rows": perceptron(sizes.p, sizes.m),
        "norm": norm_start(layers, sizes.n),
        "feed_forward": feed_forward_start(layers, sizes, sizes, options),
    }


def _masks(sizes: Sizes, options: MixingOptions) -> dict[str, Dropout]:
    if not options.feed_forward_dropout:
        return {}
    return {"feed_forward": Dropout((options.num_layers, sizes.m, sizes.n), options.feed_forward_dropout)}


def mixing_network(options: MixingOptions) -> Network:
    """Returns the attention-free network.

    Raises:
      ValueError: an option out of range.
    """
    options.check()
    return drawn_network(
        functools.partial(_starts, options=options),
        functools.partial(apply, options=options),
        functools.partial(_masks, options=options),
    )


def mlp_transfer(
    routes: Routes,
    *,
    num_layers: int = 2,
    width: int = 128,
    max_hidden: int | None = 1024,
    feed_forward_dropout: float = 0.2,
    spectral: bool = True,
    dtype: Any = jnp.float32,
    **options: Unpack[AdapterOptions],
) -> Transfer:
    """Returns the attention-free ablation: learned perceptrons mix the source's rows and columns.

    See `mixing.apply` for the equation; everything else is as in `lpka_transfer`.

    Args:
      routes: as `lpka_transfer`.
      num_layers: layers of each adapter, 1 or more.
      width: hidden units of the perceptrons, 1 or more.
      max_hidden: cap on the hidden width of each feed-forward block, or None.
      feed_forward_dropout: rate of dropout on the feed-forward block, in [0, 1).
      spectral: whether feed-forward kernels are divided by their spectral norms.
      dtype: of the computation; parameters and norms stay float32.
      **options: `output`, `rank`, `view`, `gate`, `shared`, `padding`; see `adapter_transfer`.

    Raises:
      ValueError: as `lpka_transfer`.
    """
    network = mixing_network(
        MixingOptions(
            num_layers=num_layers,
            width=width,
            max_hidden=max_hidden,
            feed_forward_dropout=feed_forward_dropout,
            spectral=spectral,
            dtype=dtype,
        )
    )
    return adapter_transfer(routes, network, **options)
