import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax import transfers


def matrix(seed, m, n, *, decay=0.5):
    """A random matrix whose singular values fall as `1 / i^decay`."""
    random = np.random.default_rng(seed)
    left, _ = np.linalg.qr(random.normal(size=(m, m)))
    right, _ = np.linalg.qr(random.normal(size=(n, n)))
    k = min(m, n)
    values = np.arange(1, k + 1.0) ** -decay
    return jnp.asarray((left[:, :k] * values) @ right[:, :k].T, jnp.float32)


row_basis = jax.jit(transfers.row_basis, static_argnums=1)
SHAPES = [(60, 40, 5), (40, 60, 5), (30, 30, 30), (7, 90, 7), (90, 7, 1), (1, 4, 1)]


@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_the_error_is_near_that_of_the_truncated_svd(m, n, rank):
    w = matrix(0, m, n)
    basis = np.asarray(row_basis(w, rank))
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-5)
    error = np.linalg.norm(w - basis @ np.asarray(jax.jit(transfers.encode)(w, basis)))
    best = np.sqrt((np.linalg.svd(w, compute_uv=False)[rank:] ** 2).sum())
    assert error <= 1.02 * best + 1e-5


def test_directions_are_those_of_the_svd_in_order_and_sign():
    w = matrix(2, 30, 20, decay=2.0)
    basis = np.asarray(row_basis(w, 3))
    left = np.linalg.svd(w)[0][:, :3]
    left = left * np.sign(left[np.abs(left).argmax(0), range(3)])
    np.testing.assert_allclose(basis, left, atol=1e-3)
    moved = row_basis(w + 1e-4 * matrix(3, 30, 20), 3)
    np.testing.assert_allclose(basis, moved, atol=1e-2)


def test_decoding_changes_what_the_code_changes_and_keeps_the_rest():
    w = matrix(4, 20, 15)
    basis = row_basis(w, 4)
    code = transfers.encode(w, basis)
    change = jnp.asarray(np.random.default_rng(5).normal(size=code.shape), jnp.float32)
    new = transfers.decode(w, change, basis)
    np.testing.assert_allclose(transfers.encode(new, basis), code + change, atol=1e-5)
    np.testing.assert_allclose(new - basis @ (basis.T @ new), w - basis @ (basis.T @ w), atol=1e-5)
    np.testing.assert_array_equal(transfers.decode(w, jnp.zeros_like(code), basis), w)


@pytest.mark.parametrize("w", [jnp.zeros((6, 8)), jnp.ones((6, 8)), matrix(6, 6, 8) * 1e-25, matrix(7, 8, 6) * 1e25,
                               jnp.eye(6, 8)])  # fmt: skip
def test_gradients_are_finite_also_where_the_rank_is_lower(w):
    def loss(w, change):
        basis = transfers.row_basis(w, 3)
        return jnp.sum(transfers.decode(w, transfers.encode(w, basis) * change, basis))

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(w, 0.5):
        assert np.isfinite(gradient).all()
    basis = np.asarray(row_basis(w, 3))
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-5)


def test_bases_are_constants_to_the_gradient():
    w = matrix(8, 6, 5)
    gradient = jax.grad(lambda w: jnp.sum(transfers.encode(w, transfers.row_basis(w, 2))))(w)
    np.testing.assert_allclose(gradient, transfers.row_basis(w, 2).sum(1, keepdims=True) * jnp.ones((1, 5)), atol=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 6, 1.0, True])
def test_ranks_that_do_not_fit_are_refused(rank):
    with pytest.raises(ValueError, match=r"rank must be a whole number in \[1, 5\] for a matrix \[6, 5\]"):
        transfers.row_basis(matrix(9, 6, 5), rank)


def test_the_dense_layer_is_its_product(next_key):
    layer = transfers.LowRankDense(6, rank=2, alpha=4.0)
    x = jax.random.normal(next_key(), (3, 7, 5))
    params = layer.init(next_key(), x)["params"]
    assert {path: leaf.shape for path, leaf in mj.flatten(params).items()} == {"A": (5, 2), "B": (2, 6), "bias": (6,)}
    kernel = params["A"] @ params["B"] * 4.0 / 2
    np.testing.assert_allclose(layer.apply({"params": params}, x), x @ kernel, atol=1e-5)


@pytest.mark.parametrize(("window", "strides", "padding"), [((3, 3), (1, 1), "SAME"), ((3, 2), (2, 1), "VALID"),
                                                             ((1, 1), (1, 1), "SAME")])  # fmt: skip
def test_the_convolution_is_its_product(window, strides, padding, next_key):
    """Against a plain loop over the window: `W[(o, y), (i, x)]` of the two factors."""
    layer = transfers.LowRankConv(4, window, rank=2, alpha=3.0, strides=strides, padding=padding)
    x = jax.random.normal(next_key(), (2, 6, 7, 5))
    params = layer.init(next_key(), x)["params"]
    height, width = window
    assert params["A"].shape == (5 * width, 2 * height)
    assert params["B"].shape == (2 * height, 4 * height)
    product = np.asarray(params["B"].T @ params["A"].T) * 3.0 / 2  # [out kh, in kw]
    y = np.asarray(layer.apply({"params": params}, x))
    pads = [(0, 0)] * 2 if padding == "VALID" else [((k - 1) // 2, k // 2) for k in window]
    padded = np.pad(x, [(0, 0), *pads, (0, 0)])
    for b, i, j, o in np.ndindex(y.shape):
        patch = padded[b, i * strides[0] : i * strides[0] + height, j * strides[1] : j * strides[1] + width]
        expected = sum(
            product[o * height + u, c * width + v] * patch[u, v, c]
            for u in range(height) for v in range(width) for c in range(5)
        )  # fmt: skip
        np.testing.assert_allclose(y[b, i, j, o], expected, atol=1e-4)


@pytest.mark.parametrize("alpha", [None, 0.5, 8.0])
def test_low_rank_layers_start_with_outputs_of_the_scale_of_their_inputs(alpha, next_key):
    x = jax.random.normal(next_key(), (64, 128))
    dense = transfers.LowRankDense(128, rank=32, alpha=alpha).init_with_output(next_key(), x)[0]
    assert 0.8 < dense.std() < 1.25
    x = jax.random.normal(next_key(), (4, 8, 8, 64))
    conv = transfers.LowRankConv(64, (3, 3), rank=32, alpha=alpha, padding="VALID").init_with_output(next_key(), x)[0]
    assert 0.8 < conv.std() < 1.25


def test_factors_are_leaves_like_any_other(next_key):
    """The stored factor `A` takes part as the matrix `[r, in]` that the method speaks of."""
    params = {"d": transfers.LowRankDense(6, rank=2).init(next_key(), jnp.ones((1, 5)))["params"]}
    (row,) = mj.share_transfer({"d/A": "d/A"}).describe(params, params)
    assert row.target_matrix == (2, 5)
    conv = {"c": transfers.LowRankConv(6, (3, 3), rank=2).init(next_key(), jnp.ones((1, 4, 4, 5)))["params"]}
    (row,) = mj.share_transfer({"c/A": "c/A"}).describe(conv, conv)
    assert row.target_matrix == (2 * 3, 5 * 3)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (transfers.LowRankDense(6, rank=6), (1, 5)),
        (transfers.LowRankDense(3, rank=4), (1, 5)),
        (transfers.LowRankConv(6, (3, 3), rank=0), (1, 4, 4, 5)),
    ],
)
def test_layers_refuse_ranks_that_do_not_fit(layer, x, next_key):
    with pytest.raises(ValueError, match="rank must be a whole number in"):
        layer.init(next_key(), jnp.ones(x))


def test_layers_refuse_an_alpha_of_zero(next_key):
    with pytest.raises(ValueError, match="alpha must be above 0, got 0"):
        transfers.LowRankDense(6, rank=2, alpha=0.0).init(next_key(), jnp.ones((1, 5)))


def test_layers_compute_in_half_precision(next_key):
    y, variables = transfers.LowRankDense(6, rank=2, dtype=jnp.bfloat16).init_with_output(next_key(), jnp.ones((1, 5)))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
