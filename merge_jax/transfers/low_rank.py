"""Low rank: re-encoding a matrix by few rows and decoding it, and layers that store two factors.

Legend of shapes: matrix `W [m, n]`, rank `r`, at most `min(m, n)`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["LowRankConv", "LowRankDense", "decode", "encode", "row_basis"]

# With a few extra directions and a few passes over the matrix, the space is within percents of the best one, even if
# singular values decay slowly (Halko, Martinsson & Tropp, arXiv:0909.4061, section 4).
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2
# For a matrix of a few dozen rows, directions whose singular values differ by a tenth are separated to 1e-3.
_ROTATIONS = 32
_FEW_ROWS = 96


def row_basis(matrix: jax.Array, rank: int) -> jax.Array:
    """Returns `B [m, r]` with orthonormal columns, near the leading left singular vectors of `W [m, n]`.

    `W ~ B (B^T W)`. A randomised range finder with two power iterations (arXiv:0909.4061) from a fixed start: no
    state, and `O(m n r)` instead of a full decomposition's `O(m n min(m, n))`. Columns are in decreasing order of
    singular values. The largest entry of each is positive, so that a small change of `W` causes a small change of `B`
    wherever singular values are distinct. `B` is a constant for the gradient. Its columns are orthonormal even if the
    matrix has a lower rank, or is zero.

    Raises:
      ValueError: the rank is below 1 or above `min(m, n)`.
    """
    m, n = matrix.shape
    _check_rank(rank, m, n)
    matrix = lax.stop_gradient(matrix)
    directions = min(rank + _OVERSAMPLING, m, n)
    basis = _orthonormal(_product(matrix, jax.random.normal(jax.random.key(0), (n, directions), matrix.dtype)))
    for _ in range(_POWER_ITERATIONS):
        # The barrier keeps XLA from turning `(B^T W)^T` into `W^T B`, which is several times slower on a CPU.
        rows = lax.optimization_barrier(_product(basis.T, matrix))
        basis = _orthonormal(_product(matrix, _orthonormal(rows.T)))
    return _with_fixed_signs(_product(basis, _leading_directions(_product(basis.T, matrix))[:, :rank]))


def _leading_directions(rows: jax.Array) -> jax.Array:
    """Returns the left singular vectors of a few rows `[k, n]`, `[k, k]`, in decreasing order of singular values.

    Up to 96 rows, by orthogonal iteration: eigendecompositions are slow to run and to compile on accelerators.
    """
    rows = _scaled(rows)
    gram = _product(rows, rows.T)
    if len(rows) > _FEW_ROWS:  # Here, one eigendecomposition costs less than the iterations.
        return jnp.linalg.eigh(gram)[1][:, ::-1]
    # Rescaled each time, so that directions of small singular values neither vanish nor stall.
    start = jnp.eye(len(rows), dtype=rows.dtype)
    found = lax.fori_loop(0, _ROTATIONS, lambda _, q: _orthonormal(_product(gram, q)), start)
    # Directions of nearly equal singular values may still be in the wrong order.
    return found[:, jnp.argsort(-jnp.sum(jnp.square(_product(found.T, rows)), axis=1))]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # In full precision on accelerators too: columns rounded to ten bits are not orthogonal.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def encode(matrix: jax.Array, basis: jax.Array) -> jax.Array:
    """Returns the code `A = B^T W [r, n]`."""
    return basis.T @ matrix


def decode(matrix: jax.Array, change: jax.Array, basis: jax.Array) -> jax.Array:
    """Returns `W + B dA` for the change `dA` of a code; the part of `W` outside the basis does not change."""
    return matrix + basis @ change


def _check_rank(rank: int, m: int, n: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(m, n):
        raise ValueError(f"rank must be a whole number in [1, {min(m, n)}] for a matrix [{m}, {n}], got {rank!r}")


def _orthonormal(columns: jax.Array) -> jax.Array:
    return jnp.linalg.qr(_scaled(columns))[0]


def _scaled(array: jax.Array) -> jax.Array:
    """Returns the array over its largest entry, so that squares neither overflow nor vanish."""
    largest = jnp.max(jnp.abs(array))
    return array / jnp.where(largest > 0, largest, 1.0)


def _with_fixed_signs(basis: jax.Array) -> jax.Array:
    largest = jnp.take_along_axis(basis, jnp.argmax(jnp.abs(basis), axis=0)[None], axis=0)
    return basis * jnp.where(largest < 0, -1.0, 1.0)


class LowRankDense(nn.Module):
    """A dense layer that stores two factors: `y = (x A) B alpha / r + b`, so `W = B A alpha / r` as a matrix.

    The paper's re-encoding from scratch (arXiv:2404.13322). Parameters, in the layout `[in, out]` of all Flax
    kernels: `A [in, r]`, `B [r, out]`, `bias [out]`. Both factors start random, `A` with variance `1 / in` and
    `B` with variance `r / alpha^2`, so that `x W` starts with the variance of `x`. `B` does not start at zero as
    in LoRA, since there is no other kernel (our choice).

    Attributes:
      features: number of outputs.
      rank: `r`; at most the smaller of inputs and outputs.
      alpha: scale of the product; `r` if not given, so that the scale is 1.
      use_bias: whether there is a bias.
      dtype: of the computation; parameters are float32.
    """

    features: int
    rank: int
    alpha: float | None = None
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[..., in]` to `[..., out]`; raises ValueError for a rank that does not fit."""
        _check_rank(self.rank, self.features, inputs.shape[-1])
        scale, b_init = _scale_and_init(self.rank, self.alpha)
        a = self.param("A", nn.initializers.lecun_normal(), (inputs.shape[-1], self.rank))
        b = self.param("B", b_init, (self.rank, self.features))
        inputs, a, b = (x.astype(self.dtype) for x in (inputs, a, b))
        outputs = (inputs @ a) @ b * scale
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            outputs += bias.astype(self.dtype).reshape((1,) * (outputs.ndim - 1) + (-1,))
        return outputs


class LowRankConv(nn.Module):
    """A convolution that stores two factors: `W = B A alpha / r`, `A [r k, in k]`, `B [out k, r k]`.

    The product is `W[(o, y), (i, x)]`, for output `o` at height `y` from input `i` at width `x`. Each factor holds one
    side of the window, which is one interpretation of the shapes in arXiv:2404.13322 (our choice). Parameters are
    stored transposed, like all Flax kernels: `A [in kw, r kh]`, `B [r kh, out kh]`, `bias [out]`.

    Attributes:
      features: number of outputs.
      kernel_size: window `(kh, kw)`.
      rank: `r`; at most the smaller of inputs and outputs.
      alpha: scale of the product; `r` if not given, so that the scale is 1.
      strides: of the window.
      padding: as `flax.linen.Conv`.
      use_bias: whether there is a bias.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_size: tuple[int, int]
    rank: int
    alpha: float | None = None
    strides: tuple[int, int] = (1, 1)
    padding: str | Sequence[tuple[int, int]] = "SAME"
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[B, H, W, in]` to `[B, H', W', out]`; raises ValueError for a rank that does not fit."""
        channels, (height, width) = inputs.shape[-1], self.kernel_size
        _check_rank(self.rank, self.features, channels)
        inner = self.rank * height
        scale, b_init = _scale_and_init(self.rank, self.alpha, inner)
        # Each output sums over in * kh * kw inputs; A reads in * kw of them.
        a_init = nn.initializers.variance_scaling(1 / height, "fan_in", "normal")
        a = self.param("A", a_init, (channels * width, inner))
        b = self.param("B", b_init, (inner, self.features * height))
        kernel = (a @ b * scale).reshape(channels, width, self.features, height).transpose(3, 1, 0, 2)
        outputs = lax.conv_general_dilated(
            inputs.astype(self.dtype),
            kernel.astype(self.dtype),
            self.strides,
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            outputs += bias.astype(self.dtype)[None, None, None]
        return outputs


def _scale_and_init(
    rank: int, alpha: float | None, inner: int | None = None
) -> tuple[float, nn.initializers.Initializer]:
    """Returns `alpha / r`, and the initialiser of `B` with which the product keeps the scale of `A`."""
    scale = 1.0 if alpha is None else alpha / rank
    if not scale > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    return scale, nn.initializers.normal((inner or rank) ** -0.5 / scale)
