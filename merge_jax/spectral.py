"""The spectral norm of a matrix inside a compiled function, without state."""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["spectral_norm"]


def spectral_norm(matrix: jax.Array, *, steps: int = 32) -> jax.Array:
    """Returns the largest singular value of `matrix [a, b]`, a scalar: `sigma = max |W v| over |v| = 1`.

    Our choice where the published code keeps a power iteration's vectors as state: a Lanczos iteration on
    `W^T W` from a fixed start. It needs no state, so a transfer stays a pure function of its parameters; it is
    exact where `min(a, b) <= steps`, and far nearer than as many power iterations elsewhere. As there, the
    singular vectors are constants to the gradient: `d sigma / d W = u v^T`.

    A zero matrix has the norm 0 and the gradient 0.
    """
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T  # The same norm, and the iteration runs in the smaller of the two spaces.
    # Scaled to its largest entry, so that squares neither overflow nor vanish.
    largest = lax.stop_gradient(jnp.max(jnp.abs(matrix)))
    scale = jnp.where(largest > 0, largest, 1.0)
    scaled = matrix / scale
    v = lax.stop_gradient(_leading_right_vector(lax.stop_gradient(scaled), steps))
    product = scaled @ v
    u = lax.stop_gradient(product / _positive(jnp.linalg.norm(product)))
    return (u @ product) * scale


def _positive(norm: jax.Array) -> jax.Array:
    return jnp.where(norm > 0, norm, 1.0)


def _leading_right_vector(matrix: jax.Array, steps: int) -> jax.Array:
    """Returns the right singular vector `[b]` of the largest singular value of `matrix [a, b]`."""
    size = matrix.shape[1]
    steps = min(steps, size)
    start = jax.random.normal(jax.random.key(0), (size,), matrix.dtype)
    basis = jnp.zeros((steps, size), matrix.dtype).at[0].set(start / jnp.linalg.norm(start))

    def extend(step: jax.Array, basis: jax.Array) -> jax.Array:
        vector = matrix.T @ (matrix @ basis[step - 1])
        scale = jnp.linalg.norm(vector)
        # Twice is enough (Kahan): one pass leaves rounding along the vectors it removed.
        vector = vector - basis.T @ (basis @ vector)
        vector = vector - basis.T @ (basis @ vector)
        norm = jnp.linalg.norm(vector)
        # What remains is rounding: the space is exhausted, and zero rows add nothing to it.
        exhausted = norm <= 1e-6 * scale
        return basis.at[step].set(jnp.where(exhausted, 0.0, vector / _positive(norm)))

    basis = lax.fori_loop(1, steps, extend, basis)
    image = matrix @ basis.T
    _, vectors = jnp.linalg.eigh(image.T @ image)
    return vectors[:, -1] @ basis
