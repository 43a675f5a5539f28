"""The spectral norm of a matrix inside a compiled function, without state."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["spectral_norm"]

# Above this size, squaring the Gram matrix costs more than a Lanczos iteration and the squares of its small matrix.
_LARGEST_GRAM = 64
_LANCZOS_STEPS = 32
# After this many squarings, the leading direction outweighs one with 0.998 of its singular value by 10^7.
_SQUARINGS = 12


def spectral_norm(matrix: jax.Array) -> jax.Array:
    """Returns the largest singular value of `matrix [a, b]`, a scalar: `sigma = max |W v| over |v| = 1`.

    The leading direction is that of a high power of the Gram matrix `G = W W^T`, by repeated squaring. If `min(a, b)`
    is above 64, `G` is first reduced to the space of a 32-step Lanczos iteration from a fixed start. The published code
    keeps a power iteration's vectors as state. Our choice needs no state, so a transfer stays a pure function of its
    parameters, and no eigendecomposition, which is slow on accelerators. As in that code, the singular vectors are
    constants for the gradient: `d sigma / d W = u v^T`.

    A zero matrix has the norm 0 and the gradient 0.
    """
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T  # The norm is the same, and the Gram matrix smaller.
    constant = lax.stop_gradient(matrix)
    # Scaled to its largest entry, so that squares neither overflow nor vanish.
    scaled = constant / _positive(jnp.max(jnp.abs(constant)))
    if matrix.shape[0] <= _LARGEST_GRAM:
        u = _leading_vector(_product(scaled, scaled.T))
    else:
        basis = _lanczos_basis(scaled)
        image = _product(basis, scaled)
        u = _product(_leading_vector(_product(image, image.T)), basis)
    v = _unit(_product(u, scaled))
    u = _unit(_product(scaled, v))
    return u @ matrix @ v


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # In full precision on accelerators too: ten squarings do not tolerate rounding to ten bits.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _positive(norm: jax.Array) -> jax.Array:
    return jnp.where(norm > 0, norm, 1.0)


def _unit(vector: jax.Array) -> jax.Array:
    return vector / _positive(jnp.linalg.norm(vector))


def _start(size: int) -> jax.Array:
    """Returns a fixed vector that is unlikely to be orthogonal to the leading direction of a matrix."""
    return jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)


def _leading_vector(gram: jax.Array) -> jax.Array:
    """Returns the eigenvector `[k]` of the largest eigenvalue of a positive semidefinite matrix `[k, k]`."""

    def square(_: int, power: jax.Array) -> jax.Array:
        power = power / _positive(jnp.max(jnp.abs(power)))
        return _product(power, power)

    power = lax.fori_loop(0, _SQUARINGS, square, gram)
    return _unit(_product(power / _positive(jnp.max(jnp.abs(power))), _start(gram.shape[0])))


def _lanczos_basis(matrix: jax.Array) -> jax.Array:
    """Returns orthonormal rows `[32, a]` of the Krylov space of `W W^T`, and rows of zeros once it is exhausted."""
    size = matrix.shape[0]
    basis = jnp.zeros((_LANCZOS_STEPS, size), jnp.float32).at[0].set(_unit(_start(size)))

    def extend(step: jax.Array, basis: jax.Array) -> jax.Array:
        vector = _product(matrix, _product(basis[step - 1], matrix))
        scale = jnp.linalg.norm(vector)
        # Two passes suffice (Kahan): one leaves rounding errors along the removed vectors.
        for _ in range(2):
            vector = vector - _product(_product(basis, vector), basis)
        # Only rounding errors remain: the space is exhausted, and zero rows add nothing to it.
        exhausted = jnp.linalg.norm(vector) <= 1e-6 * scale
        return basis.at[step].set(jnp.where(exhausted, 0.0, _unit(vector)))

    return lax.fori_loop(1, _LANCZOS_STEPS, extend, basis)
