"""Layers of the convolutional networks: convolutions that XLA also runs fast on a CPU, and BatchNorm."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Conv", "DepthwiseConv", "Layers", "Padding", "rounded_width"]

Padding = Literal["even", "same"]
"""Padding of convolutions: equal on all sides, as in PyTorch; or TensorFlow's SAME, which at stride 2 pads an even size
with one pixel less, at the start."""

_KERNEL_INIT = nn.initializers.he_normal()


@dataclass(frozen=True)
class Layers:
    """Creates the layers of a model, all with the same options; parameters are float32.

    Attributes:
      dtype: of the computation; statistics of BatchNorm are always float32.
      axis_name: the `pmap` axis over which BatchNorm computes the batch's statistics; None for undivided batches.
      train: whether BatchNorm uses the batch's statistics instead of the running ones.
      momentum: share of the running statistics of BatchNorm that a step keeps.
      epsilon: of BatchNorm, added to the variance.
      padding: of the convolutions with a window.
    """

    dtype: Any
    axis_name: str | None
    train: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    padding: Padding = "even"

    def batch_norm(self, name: str) -> nn.BatchNorm:
        """Returns a BatchNorm."""
        return nn.BatchNorm(
            use_running_average=not self.train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            axis_name=self.axis_name,
            name=name,
        )

    def conv(self, features: int, stride: int, name: str, *, size: int = 3) -> "Conv":
        """Returns a convolution without a bias, kernel `[size, size, in, out]`."""
        return Conv(features, stride, self.dtype, size, self.padding, name=name)

    def pointwise_conv(self, features: int, name: str, *, use_bias: bool = False) -> nn.Dense:
        """Returns a 1x1 convolution as a matrix product, kernel `[in, out]`: faster than XLA's on a CPU."""
        return nn.Dense(
            features,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=_KERNEL_INIT,
            dot_general=_product_of_rows,
            name=name,
        )

    def depthwise_conv(self, stride: int, name: str, *, use_bias: bool, size: int = 3) -> "DepthwiseConv":
        """Returns a depthwise convolution, kernel `[size, size, 1, C]`."""
        return DepthwiseConv(stride, use_bias, self.dtype, size, self.padding, name=name)


class Conv(nn.Module):
    """A convolution without a bias, kernel `[size, size, in, out]`, on `[B, H, W, in]`.

    On a CPU it is the product of all windows with the kernel as a matrix. Inside a compiled loop, XLA chooses an axis
    order for the gradient's convolutions for which it has no fast code; they take tens of times longer.
    """

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    size: int = 3
    padding: Padding = "even"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, in]` to `[B, H/s, W/s, features]`."""
        kernel = self.param("kernel", _KERNEL_INIT, (self.size, self.size, x.shape[-1], self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        windows = functools.partial(_product_of_windows, stride=self.stride, padding=self.padding)
        convolution = functools.partial(_convolution, stride=self.stride, padding=self.padding)
        return lax.platform_dependent(x, kernel, cpu=windows, default=convolution)


def _convolution(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding = "even") -> jax.Array:
    sides = _sides(x, len(kernel), stride, padding)
    return lax.conv_general_dilated(x, kernel, (stride, stride), sides, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _product_of_windows(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding = "even") -> jax.Array:
    windows = jnp.concatenate([tap for _, _, tap in _taps(x, len(kernel), stride, padding)], axis=-1)
    return _rows_times(windows, kernel.reshape(-1, kernel.shape[-1]))


def _rows_times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `[..., in] x [in, out]` as one product of two matrices."""
    # Otherwise the kernel's gradient would sum over several axes, for which XLA's CPU compiler first transposes an
    # operand in memory: that took a quarter of ResNet50's step.
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _product_of_rows(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **_: Any) -> jax.Array:
    return _rows_times(x, kernel)


def _sides(x: jax.Array, size: int, stride: int, padding: Padding) -> Sequence[tuple[int, int]]:
    """Returns the padding before and after, along height and width, in pixels."""
    if padding == "even":
        return ((size // 2, size // 2),) * 2
    return lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")


def _taps(x: jax.Array, size: int, stride: int, padding: Padding) -> list[tuple[int, int, jax.Array]]:
    """Returns row, column and input `[B, H/s, W/s, C]` of each tap of a window."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *_sides(x, size, stride, padding), (0, 0)))
    places = itertools.product(range(size), repeat=2)
    return [(i, j, padded[:, i : i + height : stride, j : j + width : stride]) for i, j in places]


def _sum_of_taps(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Returns the sum over a window's taps of input times kernel, `[B, H, W, C]` to `[B, H/s, W/s, C]`."""
    taps = _taps(x, len(kernel), stride, padding)
    return functools.reduce(jnp.add, [tap * kernel[i : i + 1, j : j + 1] for i, j, tap in taps])


_depthwise = jax.custom_vjp(_sum_of_taps, nondiff_argnums=(2, 3))


def _depthwise_forward(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> tuple[jax.Array, Any]:
    return _sum_of_taps(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride: int, padding: Padding, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    size = len(kernel)
    if stride == 1 and size % 2 == 1:
        # One fused sum again; transposed slices would each be materialised before the sum.
        dx = _sum_of_taps(dy, kernel[::-1, ::-1], stride, padding)
    else:
        (dx,) = jax.vjp(lambda x: _sum_of_taps(x, kernel, stride, padding), x)[1](dy)
    slopes = functools.partial(_slopes, size=size, stride=stride, padding=padding)

    def at_once(x: jax.Array, dy: jax.Array) -> list[jax.Array]:
        return [slope.sum(axis=(0, 1, 2)) for slope in slopes(x, dy)]

    def by_example(x: jax.Array, dy: jax.Array) -> list[jax.Array]:
        def add(totals: list[jax.Array], example: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], None]:
            new = slopes(*(array[None] for array in example))
            return [total + slope[0] for total, slope in zip(totals, new, strict=True)], None

        totals, _ = lax.scan(add, [jnp.zeros(dy.shape[1:], jnp.float32)] * size**2, (x, dy))
        return [total.sum(axis=(0, 1)) for total in totals]

    # On a CPU, XLA is slow to sum products with slices: they took most of a step.
    dkernel = jnp.stack(lax.platform_dependent(x, dy, cpu=by_example, default=at_once))
    return dx, dkernel.reshape(kernel.shape).astype(kernel.dtype)


def _slopes(x: jax.Array, dy: jax.Array, *, size: int, stride: int, padding: Padding) -> list[jax.Array]:
    """Returns input times cotangent at each tap of the window, `size^2` arrays `[B, H/s, W/s, C]`, float32."""
    return [(tap * dy).astype(jnp.float32) for _, _, tap in _taps(x, size, stride, padding)]


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


class DepthwiseConv(nn.Module):
    """A depthwise convolution, kernel `[size, size, 1, C]`, on `[B, H, W, C]`.

    It sums shifted products: on a CPU, XLA's grouped convolution is an order of magnitude slower. It has a custom
    reverse derivative, so `jax.jvp` fails, as for all functions with `jax.custom_vjp`.
    """

    stride: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    size: int = 3
    padding: Padding = "even"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H/s, W/s, C]`."""
        channels = x.shape[-1]
        kernel = self.param("kernel", _KERNEL_INIT, (self.size, self.size, 1, channels)).astype(self.dtype)
        y = _depthwise(x.astype(self.dtype), kernel, self.stride, self.padding)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (channels,)).astype(self.dtype)[None, None, None]
        return y


def rounded_width(width: float) -> int:
    """Returns the multiple of 8 nearest to a scaled width, but at least nine tenths of it."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded
