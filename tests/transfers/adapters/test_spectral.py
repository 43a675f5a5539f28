import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merge_jax.transfers.adapters.spectral import spectral_norm


def random_matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (20, 10), (64, 100), pytest.param((320, 160), marks=pytest.mark.slow)]
)
def test_norm_and_gradient_equal_those_of_the_svd(shape):
    matrix = random_matrix(shape)
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    norm, gradient = jax.jit(jax.value_and_grad(spectral_norm))(matrix)
    np.testing.assert_allclose(norm, s[0], rtol=1e-6)
    # The vectors are as well determined as the gap between the two largest singular values is wide.
    np.testing.assert_allclose(gradient, np.outer(u[:, 0], vt[0]), atol=2e-5)


def test_a_zero_matrix_has_norm_and_gradient_zero():
    norm, gradient = jax.value_and_grad(spectral_norm)(jnp.zeros((4, 3)))
    assert norm == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("matrix", [np.eye(6, 4), np.ones((40, 50)), np.diag([3.0, 3.0, 1.0])])
def test_degenerate_matrices_have_their_norm(matrix):
    matrix = matrix.astype(np.float32)
    norm, gradient = jax.value_and_grad(spectral_norm)(jnp.asarray(matrix))
    np.testing.assert_allclose(norm, np.linalg.norm(matrix, 2), rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_scale_of_the_entries_does_not_matter(scale):
    matrix = random_matrix((30, 40))
    np.testing.assert_allclose(spectral_norm(jnp.asarray(matrix * scale)) / scale, np.linalg.norm(matrix, 2), rtol=1e-5)
