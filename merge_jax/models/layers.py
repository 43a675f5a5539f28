"""Convolutions that XLA runs well on a CPU, and the BatchNorm both model families share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["DepthwiseConv", "batch_norm", "conv3x3", "pointwise_conv"]

_KERNEL_INIT = nn.initializers.he_normal()


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """Returns a BatchNorm that takes the batch's statistics while training; momentum 0.9, epsilon 1e-5."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


def conv3x3(features: int, stride: int, name: str, *, use_bias: bool = False) -> nn.Conv:
    """Returns a 3x3 convolution with padding 1 on every side, kernel `[3, 3, in, out]`.

    The padding is explicit: Flax's `SAME` pads a strided convolution on one side only, unlike PyTorch.
    """
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=1,
        use_bias=use_bias,
        kernel_init=_KERNEL_INIT,
        name=name,
    )


def pointwise_conv(features: int, name: str, *, use_bias: bool = False) -> nn.Dense:
    """Returns a 1x1 convolution as the matrix product it is, kernel `[in, out]`: faster than XLA's on a CPU."""
    return nn.Dense(features, use_bias=use_bias, kernel_init=_KERNEL_INIT, name=name)


class DepthwiseConv(nn.Module):
    """A 3x3 depthwise convolution with padding 1 and bias, kernel `[3, 3, 1, C]`, on `[B, H, W, C]`.

    It sums nine shifted products: on a CPU, XLA's grouped convolution is an order of magnitude slower.
    """

    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H/s, W/s, C]`."""
        height, width, channels = x.shape[1:]
        kernel = self.param("kernel", _KERNEL_INIT, (3, 3, 1, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [
            padded[:, i : i + height : self.stride, j : j + width : self.stride] * kernel[i : i + 1, j : j + 1]
            for i in range(3)
            for j in range(3)
        ]
        return functools.reduce(jnp.add, taps) + bias[None, None, None]
