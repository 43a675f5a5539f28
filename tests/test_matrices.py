import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj

# path, shape -> the matrix that the method works on
LEAVES = [
    ("fc/kernel", (3, 5), (5, 3)),
    ("conv/kernel", (3, 3, 4, 6), (6, 36)),
    ("conv1d/kernel", (3, 4, 6), (6, 12)),
    ("depthwise/kernel", (3, 3, 1, 6), (6, 9)),
    ("attention/query/kernel", (8, 2, 3), (6, 8)),
    ("attention/key/kernel", (8, 2, 3), (6, 8)),
    ("attention/value/kernel", (8, 2, 3), (6, 8)),
    ("attention/out/kernel", (2, 3, 8), (8, 6)),
    ("attention/query/bias", (2, 3), (1, 6)),
    ("tokens/embedding", (11, 4), (11, 4)),
    ("fc/bias", (5,), (1, 5)),
    ("norm/scale", (5,), (1, 5)),
    ("w", (7,), (1, 7)),
]


def numbered(shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


@pytest.mark.parametrize(("path", "shape", "matrix_shape"), LEAVES)
def test_any_leaf_is_a_matrix_and_back_exactly(path, shape, matrix_shape):
    leaf = numbered(shape)
    spec = mj.matrix_spec(path, shape)
    matrix = mj.as_matrix(leaf, spec)
    assert matrix.shape == matrix_shape == spec.matrix_shape(shape)
    np.testing.assert_array_equal(mj.from_matrix(matrix, spec, shape), leaf)


def test_convolution_has_the_order_of_torch():
    leaf = np.asarray(numbered((3, 2, 4, 6)))
    as_torch = leaf.transpose(3, 2, 0, 1)  # [out, in, kh, kw]
    matrix = mj.as_matrix(jnp.asarray(leaf), mj.matrix_spec("conv/kernel", leaf.shape))
    np.testing.assert_array_equal(matrix, as_torch.reshape(6, -1))


def test_row_of_a_dense_kernel_is_what_makes_one_output():
    kernel, x = numbered((3, 5)), jnp.array([1.0, -2.0, 0.5])
    matrix = mj.as_matrix(kernel, mj.matrix_spec("fc/kernel", kernel.shape))
    np.testing.assert_allclose(matrix @ x, x @ kernel)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Dense(5, use_bias=False), (3,)),
        (nn.DenseGeneral((2, 4), use_bias=False, name="query"), (3,)),
        (nn.DenseGeneral(3, axis=(-2, -1), use_bias=False, name="out"), (2, 4)),
        (nn.Conv(5, (1, 1), use_bias=False), (1, 1, 3)),
        (nn.Conv(5, (3, 3), use_bias=False, padding="VALID"), (3, 3, 2)),
        (nn.Conv(4, (3, 3), use_bias=False, padding="VALID", feature_group_count=4), (3, 3, 4)),
    ],
    ids=["dense", "query", "out", "pointwise", "convolution", "depthwise"],
)
def test_rows_are_the_outputs_of_the_real_layers(module, x, next_key):
    """A layer's output is its matrix times its input, the input laid out as inputs, then window."""
    x = jax.random.normal(next_key(), (1, *x))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return module.clone(parent=self, name=module.name or "layer")(x)

    params = Model().init(next_key(), x)["params"]
    ((path, kernel),) = mj.flatten(params).items()
    matrix = mj.as_matrix(kernel, mj.matrix_spec(path, kernel.shape))
    output = Model().apply({"params": params}, x)[0].reshape(-1)
    if x.ndim == 4 and kernel.shape[-2] == 1:  # Depthwise: each row sees one channel.
        expected = (matrix * x[0].reshape(-1, x.shape[-1]).T).sum(axis=1)
    elif x.ndim == 4:
        expected = matrix @ jnp.moveaxis(x[0], -1, 0).reshape(-1)
    else:
        expected = matrix @ x.reshape(-1)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_attention_and_embedding_of_flax_have_their_matrices(next_key):
    x = jnp.ones((1, 4, 6))
    attention = nn.MultiHeadDotProductAttention(num_heads=3).init(next_key(), x)["params"]
    embedding = nn.Embed(11, 4).init(next_key(), jnp.zeros(1, jnp.int32))["params"]
    leaves = mj.flatten({"attention": attention, "embed": embedding})
    shapes = {path: mj.matrix_spec(path, leaf.shape).matrix_shape(leaf.shape) for path, leaf in leaves.items()}
    assert shapes == {
        **{f"attention/{name}/kernel": (6, 6) for name in ("query", "key", "value", "out")},
        **{f"attention/{name}/bias": (1, 6) for name in ("query", "key", "value", "out")},
        "embed/embedding": (11, 4),
    }


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_leaves_that_are_no_matrix_are_refused(shape):
    with pytest.raises(ValueError, match="is no matrix"):
        mj.matrix_spec("x", shape)


@pytest.mark.parametrize("spec", [mj.MatrixSpec((0,), (0,)), mj.MatrixSpec((0,), ()), mj.MatrixSpec((0,), (1, 2))])
def test_a_spec_must_name_each_axis_once(spec):
    with pytest.raises(ValueError, match=r"must name each axis of the shape \(2, 3\) once"):
        mj.as_matrix(numbered((2, 3)), spec)


def overlap(target, target_path, source, source_path):
    specs = mj.matrix_spec(target_path, target.shape), mj.matrix_spec(source_path, source.shape)
    return mj.copy_overlap(target, source, *specs)


def test_overlap_of_equal_shapes_is_the_source():
    target, source = jnp.zeros((3, 3, 4, 6)), numbered((3, 3, 4, 6))
    np.testing.assert_array_equal(overlap(target, "c/kernel", source, "c/kernel"), source)


def test_overlap_is_the_leading_block_and_the_rest_stays():
    target, source = -jnp.ones((4, 3)), numbered((2, 5))
    merged = np.asarray(overlap(target, "a/kernel", source, "b/kernel"))
    np.testing.assert_array_equal(merged[:2, :3], source[:2, :3])
    np.testing.assert_array_equal(merged[2:], -1)


def test_a_pointwise_kernel_is_the_centre_of_a_window():
    window, point = numbered((3, 3, 4, 6)), -jnp.ones((4, 6))
    np.testing.assert_array_equal(overlap(point, "p/kernel", window, "w/kernel"), window[1, 1])
    merged = np.asarray(overlap(window, "w/kernel", point, "p/kernel"))
    np.testing.assert_array_equal(merged[1, 1], point)
    rest = np.ones((3, 3), bool)
    rest[1, 1] = False
    np.testing.assert_array_equal(merged[rest], np.asarray(window)[rest])


def test_overlap_keeps_the_dtype_of_the_target():
    merged = overlap(jnp.zeros((2, 2), jnp.bfloat16), "a/kernel", numbered((2, 2)), "b/kernel")
    assert merged.dtype == jnp.bfloat16
