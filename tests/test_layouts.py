import operator

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
    # Other libraries, and names that are not our own.
    ("embed/embeddings", (11, 4), (11, 4)),
    ("batch_norm/offset", (1, 5), (1, 5)),
    ("batch_norm/scale", (1, 1, 1, 5), (1, 5)),
    ("conv/bias", (5, 1, 1), (1, 5)),
    ("class_token", (1, 1, 5), (1, 5)),
    ("pos_embedding", (1, 11, 4), (11, 4)),
    ("wte/weight", (11, 4), (11, 4)),
    ("conv2_d/w", (3, 3, 4, 6), (6, 36)),
    ("conv2_d_transpose/w", (3, 3, 6, 4), (6, 36)),
    ("conv2d_transpose_1/kernel", (3, 3, 6, 4), (6, 36)),
    ("ConvTranspose_0/kernel", (3, 3, 4, 6), (6, 36)),
    ("depthwise_conv2d/kernel", (3, 3, 6, 1), (6, 9)),
    ("depthwise_conv2d/kernel", (3, 3, 3, 2), (6, 9)),
    ("depthwise_conv2_d/w", (3, 3, 1, 6), (6, 9)),
    ("separable_conv2d/depthwise_kernel", (3, 3, 6, 1), (6, 9)),
    ("conv3d/kernel", (2, 3, 3, 4, 6), (6, 72)),
    ("CheckpointConv_0/kernel", (5, 4, 6), (6, 20)),
    ("downsample/0/weight", (6, 4, 1, 1), (6, 4)),
    ("conv/0/weight", (6, 4, 3), (6, 12)),
    ("stage1_0/shortcut/kernel", (1, 1, 4, 6), (6, 4)),
    ("attention_output/kernel", (2, 3, 8), (8, 6)),
]


def numbered(shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


@pytest.mark.parametrize(("path", "shape", "matrix_shape"), LEAVES)
def test_any_leaf_is_a_matrix_and_back_exactly(path, shape, matrix_shape):
    leaf = numbered(shape)
    spec = mj.layouts.matrix_spec(path, shape)
    matrix = mj.layouts.as_matrix(leaf, spec)
    assert matrix.shape == matrix_shape == spec.matrix_shape(shape)
    np.testing.assert_array_equal(mj.layouts.from_matrix(matrix, spec, shape), leaf)


def test_convolution_has_the_order_of_torch():
    leaf = np.asarray(numbered((3, 2, 4, 6)))
    as_torch = leaf.transpose(3, 2, 0, 1)  # [out, in, kh, kw]
    matrix = mj.layouts.as_matrix(jnp.asarray(leaf), mj.layouts.matrix_spec("conv/kernel", leaf.shape))
    np.testing.assert_array_equal(matrix, as_torch.reshape(6, -1))


def test_row_of_a_dense_kernel_is_what_makes_one_output():
    kernel, x = numbered((3, 5)), jnp.array([1.0, -2.0, 0.5])
    matrix = mj.layouts.as_matrix(kernel, mj.layouts.matrix_spec("fc/kernel", kernel.shape))
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
    matrix = mj.layouts.as_matrix(kernel, mj.layouts.matrix_spec(path, kernel.shape))
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
    shapes = {path: mj.layouts.matrix_spec(path, leaf.shape).matrix_shape(leaf.shape) for path, leaf in leaves.items()}
    assert shapes == {
        **{f"attention/{name}/kernel": (6, 6) for name in ("query", "key", "value", "out")},
        **{f"attention/{name}/bias": (1, 6) for name in ("query", "key", "value", "out")},
        "embed/embedding": (11, 4),
    }


@pytest.mark.parametrize(
    ("path", "shape", "likely"),
    [
        ("block/qkv/kernel", (8, 3, 2, 4), "MatrixSpec(rows=(1, 2, 3), inputs=(0,))"),
        ("qkv/kernel", (3, 3, 2, 4), "MatrixSpec(rows=(1, 2, 3), inputs=(0,))"),
        ("moe/experts/kernel", (4, 8, 16), "taken apart first"),
        ("mlp/experts/gate_up_proj", (8, 16), "MatrixSpec(rows=(0,), inputs=(1,)) ([out, in])"),
        ("attn/q_einsum/w", (2, 8, 4), "MatrixSpec(rows=(0, 2), inputs=(1,))"),
        ("attn/kv_einsum/w", (2, 2, 8, 4), "MatrixSpec(rows=(0, 1, 3), inputs=(2,))"),
        ("DenseGeneral_0/kernel", (8, 2, 4), "MatrixSpec(rows=(1, 2), inputs=(0,))"),
        ("up/weight", (8, 4, 2, 2), "MatrixSpec(rows=(1,), inputs=(0,), window=(2, 3))"),
        ("deconv/kernel", (2, 2, 8, 4), "MatrixSpec(rows=(2,), inputs=(3,), window=(0, 1))"),
        ("layers/kernel", (12, 4, 4), "taken apart first"),
        ("layers/bias", (12, 4), "taken apart first"),
        ("layers/norm/scale", (12, 4), "taken apart first"),
        ("layers/weight", (12, 4, 4), "taken apart first"),
        ("layers/conv1d/kernel", (12, 3, 4, 4), "taken apart first"),
        ("layers/Conv_0/kernel", (12, 3, 3, 4, 4), "taken apart first"),
        ("layers/attention/query/kernel", (4, 4, 2, 2), "taken apart first"),
    ],
)
def test_a_rank_alone_is_no_layout(path, shape, likely):
    with pytest.raises(ValueError, match=r"^give its route a target_spec or source_spec") as error:
        mj.layouts.matrix_spec(path, shape)
    assert likely in str(error.value)
    assert repr(path) in str(error.value)


def test_a_spec_of_the_route_says_what_the_name_does_not():
    """A fused kernel `[in, 3, h, d]` of another width: inputs by the first, outputs whole."""
    source, target = ({"qkv": {"kernel": numbered((width, 3, 2, 4)) * sign}} for width, sign in ((8, 1), (5, -1)))
    spec = mj.MatrixSpec(rows=(1, 2, 3), inputs=(0,))
    with pytest.raises(
        ValueError, match=r"^the target leaf 'qkv/kernel' cannot take part: give its route a target_spec"
    ):
        mj.share_transfer({"qkv/kernel": "qkv/kernel"}).apply({}, source, target)
    route = mj.Route("qkv/kernel", "qkv/kernel", target_spec=spec, source_spec=spec)
    merged = mj.share_transfer([route]).apply({}, source, target)
    np.testing.assert_array_equal(merged["qkv"]["kernel"], source["qkv"]["kernel"][:5])


def test_layers_in_one_leaf_are_refused_and_right_when_taken_apart():
    layer = jnp.arange(12.0)
    ones = {"kernel": jnp.ones((12, 4, 4)), "bias": jnp.ones((12, 4))}
    source = jax.tree.map(lambda leaf: leaf * layer.reshape(-1, *(1,) * (leaf.ndim - 1)), ones)
    target = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:4]), source)
    for name in ones:
        with pytest.raises(ValueError, match="taken apart first"):
            mj.share_transfer({name: name}).apply({}, source, target)

    def apart(layers, count):
        return [jax.tree.map(operator.itemgetter(i), layers) for i in range(count)]

    merged = mj.share_transfer({"**": "[0-3]/*"}).apply({}, apart(source, 12), apart(target, 4))
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *merged)
    np.testing.assert_array_equal(together["kernel"][:, 0, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(together["bias"][:, 0], [0, 1, 2, 3])


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_leaves_that_are_no_matrix_are_refused(shape):
    with pytest.raises(ValueError, match="is not a matrix"):
        mj.layouts.matrix_spec("x", shape)


@pytest.mark.parametrize("spec", [mj.MatrixSpec((0,), (0,)), mj.MatrixSpec((0,), ()), mj.MatrixSpec((0,), (1, 2))])
def test_a_spec_must_name_each_axis_once(spec):
    with pytest.raises(ValueError, match=r"must name each axis of the shape \(2, 3\) once"):
        mj.layouts.as_matrix(numbered((2, 3)), spec)


def overlap(target, target_path, source, source_path):
    specs = mj.layouts.matrix_spec(target_path, target.shape), mj.layouts.matrix_spec(source_path, source.shape)
    return mj.layouts.copy_overlap(target, source, *specs)


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
