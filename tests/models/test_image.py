import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.models.layers import Conv, DepthwiseConv, _convolution, _product_of_windows

SMALL = {"resnet": mj.models.small_resnet, "mobilenet": mj.models.small_mobilenet_v2}
# Both for what they have in common.
small = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=pytest.mark.slow if name == "mobilenet" else ())
        for name, make in SMALL.items()
    ],
)


@functools.cache
def shapes(model, image):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))["params"]


def parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, (32, 32, 3))))


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def convolution(x, kernel, stride, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def images(size=8, channels=1):
    return jax.random.normal(jax.random.key(0), (4, size, size, channels))


def initialised(model, x):
    """Returns variables with all vectors shaken: what starts at 0 or 1 would hide what it is for."""
    variables = mj.flatten(jax.jit(model.init)(jax.random.key(1), x))
    random = np.random.default_rng(1)
    shaken = {
        path: leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32) if leaf.ndim == 1 else leaf
        for path, leaf in variables.items()
    }
    return mj.replace(jax.eval_shape(model.init, jax.random.key(1), x), shaken)


def outputs_of_layers(model, variables, x):
    """Returns the logits and what each submodule gave, by name."""
    apply = functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    logits, updates = jax.jit(apply)(variables, x)
    return logits, updates["intermediates"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (mj.models.resnet50(100), 23_705_252),
        (mj.models.mobilenet_v2(100), 2_369_380),
        (mj.models.resnet18(100), 11_220_132),
        (mj.models.mobilenet_v2_half(100), 812_836),
        (mj.models.resnet18_imagenet(), 11_689_512),
        (mj.models.resnet34_imagenet(), 21_797_672),
        (mj.models.resnet50_imagenet(), 25_557_032),
        (mj.models.mobilenet_v2_imagenet(), 3_504_872),
        (mj.models.mobilenet_v2_imagenet(width=0.5), 1_968_680),
        (mj.models.mobilenet_v2_imagenet(width=1.4), 6_108_776),
    ],
)
def test_published_models_have_the_published_number_of_parameters(model, expected):
    assert parameters(model) == expected


@pytest.mark.parametrize("width", [0, -1.0, float("inf"), float("nan")])
def test_the_width_of_a_mobilenet_is_above_0(width):
    with pytest.raises(ValueError, match=r"^width must be a finite number above 0, got"):
        mj.models.mobilenet_v2_imagenet(width=width)


def test_a_width_scales_all_channels():
    narrow, wide = (mj.flatten(shapes(mj.models.resnet18(100, width=w), (32, 32, 3))) for w in (0.25, 1.0))
    assert narrow["stem/kernel"].shape == (3, 3, 3, 16)
    assert narrow["stage4_1/conv2/kernel"].shape == (3, 3, 128, 128)
    assert narrow.keys() == wide.keys()
    assert sum(leaf.size for leaf in narrow.values()) == pytest.approx(0.7e6, rel=0.02)


def test_the_published_route_is_there_by_name():
    source = mj.flatten(shapes(mj.models.resnet50(100), (32, 32, 3)))
    target = mj.flatten(shapes(mj.models.mobilenet_v2(100), (32, 32, 3)))
    assert target["stage6_2/project/kernel"].shape == (960, 160)
    assert source["fc/kernel"].shape == (2048, 100)


@pytest.mark.parametrize("implementation", [_convolution, _product_of_windows])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [pytest.param((8, 8), marks=pytest.mark.slow), (5, 7)])
def test_both_convolutions_equal_xlas_in_value_and_gradient(implementation, stride, size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 5, 4))

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(convolve, x, kernel):
        y, pullback = jax.vjp(convolve, x, kernel)
        return y, pullback(jax.random.normal(jax.random.key(2), y.shape))

    expected = value_and_gradient(functools.partial(convolution, stride=stride), x, kernel)
    actual = value_and_gradient(functools.partial(implementation, stride=stride), x, kernel)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), actual, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_convolution_layer_equals_xlas_on_the_device_at_hand(stride):
    x, layer = images(7, 5), Conv(4, stride)
    variables = layer.init(jax.random.key(1), x)
    assert list(variables["params"]) == ["kernel"]
    expected = convolution(x, variables["params"]["kernel"], stride)
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize(("stride", "size", "use_bias"), [(1, 7, True), (2, 7, True), (2, 8, False)])
def test_depthwise_convolution_equals_the_grouped_one(stride, size, use_bias):
    x, layer = images(size, 5), DepthwiseConv(stride, use_bias)
    variables = initialised(layer, x)
    expected = convolution(x, variables["params"]["kernel"], stride, feature_group_count=5)
    if use_bias:
        expected += variables["params"]["bias"][None, None, None]
    else:
        assert list(variables["params"]) == ["kernel"]
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", pytest.param("default", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("stride", "window", "padding"),
    [
        pytest.param(1, 3, "even", marks=pytest.mark.slow),
        (2, 3, "even"),
        pytest.param(1, 5, "same", marks=pytest.mark.slow),
        pytest.param(2, 5, "same", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_a_depthwise_convolution_are_those_of_the_grouped_one(
    stride, window, padding, platform, monkeypatch
):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, **branches: branches[platform](*operands))
    x, layer = images(8, 5), DepthwiseConv(stride, False, size=window, padding=padding)
    kernel = layer.init(jax.random.key(1), x)["params"]["kernel"]
    sides = "SAME" if padding == "same" else ((window // 2,) * 2,) * 2
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 5}
    made = [
        lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x),
        lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (stride, stride), sides, **options),
    ]
    for one in (made, [jax.vmap(function, (None, 0)) for function in made]):  # As seeds side by side have it.
        given = kernel if one is made else jnp.stack([kernel, 2 * kernel])
        slopes = [jax.jit(jax.grad(lambda *a, f=f: jnp.square(f(*a)).sum(), argnums=(0, 1)))(x, given) for f in one]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *slopes)


def test_gradients_of_a_depthwise_convolution_in_bfloat16_are_summed_in_float32():
    x = jnp.ones((300, 4, 4, 2))
    layer = DepthwiseConv(1, False, jnp.bfloat16)
    kernel = layer.init(jax.random.key(1), x)["params"]["kernel"]
    slope = jax.grad(lambda kernel: layer.apply({"params": {"kernel": kernel}}, x).astype(jnp.float32).sum())(kernel)
    np.testing.assert_allclose(slope[1, 1, 0], 300 * 16, rtol=0.01)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_small_models_map_images_to_logits_and_keep_statistics(make):
    model, x = make(10, num_stages=1), images()
    variables = jax.jit(model.init)(jax.random.key(1), x)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    logits, updates = apply(variables, x)
    assert logits.shape == (4, 10)
    assert np.isfinite(logits).all()
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    before, after = mj.flatten(variables["batch_stats"]), mj.flatten(updates["batch_stats"])
    assert all(not np.array_equal(before[path], after[path]) for path in before)


@small
def test_the_logits_are_the_last_layer_of_the_sown_features(make):
    model, x = make(10, num_stages=1, dtype=jnp.bfloat16), images()
    variables = initialised(model, x)
    logits, updates = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(variables, x)
    (features,) = updates["intermediates"]["features"]
    fc = variables["params"]["fc"]
    assert features.shape == (4, fc["kernel"].shape[0])
    assert features.dtype == jnp.float32
    assert features.std() > 0.01
    np.testing.assert_allclose(logits, features @ fc["kernel"] + fc["bias"][None], atol=1e-5)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_in_bfloat16_parameters_statistics_and_logits_stay_float32(make):
    model, x = make(10, num_stages=1, dtype=jnp.bfloat16), images()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert dtypes(variables) == {"float32"}
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, updates = jax.eval_shape(apply, variables, x)
    assert logits.dtype == jnp.float32
    assert dtypes(updates) == {"float32"}


@small
def test_bfloat16_computes_every_layer_but_the_last_and_comes_near_float32(make):
    model, x = make(10, num_stages=1), images()
    variables = initialised(model, x)
    expected, _ = outputs_of_layers(model, variables, x)
    logits, layers = outputs_of_layers(model.clone(dtype=jnp.bfloat16), variables, x)
    outputs_by_path = {path: leaf for path, leaf in mj.flatten(layers).items() if "__call__" in path}
    last = [outputs_by_path.pop(path) for path in ("__call__/0", "fc/__call__/0")]
    assert dtypes(last) == {"float32"}
    assert dtypes(outputs_by_path) == {"bfloat16"}
    # From image to image, the logits differ by a third of their size or more.
    assert 0 < np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.03


@pytest.mark.parametrize(
    ("make", "side"), [(mj.models.mobilenet_v2, 34), (mj.models.mobilenet_v2_half, 16), (mj.models.resnet18, 32)]
)
def test_the_stem_of_images_of_32_pixels_gives_maps_of_the_published_size(make, side):
    model, x = make(100).clone(stages=()), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    apply = functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    _, updates = jax.eval_shape(apply, variables, x)
    assert updates["intermediates"]["stem"]["__call__"][0].shape[1:3] == (side, side)


# Not through sums and products: a depthwise convolution is a sum of slices by steps, and compiles for a GPU.
ENTRY_BY_ENTRY = {"convert_element_type", "custom_jvp_call", "jit", "max", "reshape", "squeeze", "transpose"}


def strided_factors(jaxpr):
    """Returns the first factors of the products with a factor that is a slice by steps, or made of one.

    It does not look into functions that are jitted by themselves.
    """
    found, strided = [], set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        made = any(id(v) in strided for v in equation.invars)
        if name == "dot_general" and made:
            found.append(str(equation.invars[0].aval))
        by_steps = name == "slice" and any(step > 1 for step in equation.params["strides"] or ())
        if by_steps or (made and name in ENTRY_BY_ENTRY):
            strided |= {id(v) for v in equation.outvars}
    return found


@pytest.mark.parametrize("make", ["small_resnet", "resnet18", "resnet50", "small_mobilenet_v2", "mobilenet_v2"])
def test_no_slice_by_steps_is_a_factor_of_a_product_as_it_is(make):
    # XLA's compiler for GPUs aborts there (openxla/xla#47381), and a test without one cannot see it otherwise.
    model, x = getattr(mj.models, make)(10), jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    jaxpr = jax.make_jaxpr(model.apply)(variables, x)
    assert strided_factors(jaxpr.jaxpr) == []


def test_a_slice_by_steps_that_is_a_factor_is_found():
    jaxpr = jax.make_jaxpr(lambda x, y: jax.nn.relu(x[::2]) @ y)(jnp.ones((8, 4)), jnp.ones((4, 3)))
    assert len(strided_factors(jaxpr.jaxpr)) == 1


def products(jaxpr):
    """Returns the equations of all products of matrices, those of inner functions too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += products(inner)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("make", ["small_resnet", "resnet50", "small_mobilenet_v2", "mobilenet_v2_half"])
def test_products_are_of_matrices_and_sum_over_one_axis_forward_and_backward(make):
    # Over several axes, XLA's compiler for CPUs transposes an operand in memory: a quarter of ResNet50's step.
    model, x = getattr(mj.models, make)(10), jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    params = {"params": shapes(model, (16, 16, 3))}

    def loss(params, x):
        return model.apply(params, x, train=True, mutable=["batch_stats"])[0].sum()

    equations = products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x).jaxpr)
    kernels = sum(path.endswith("/kernel") for path in mj.flatten(params["params"]))
    assert len(equations) >= 2 * kernels
    contracted = {len(equation.params["dimension_numbers"][0][0]) for equation in equations}
    ranks = {variable.aval.ndim for equation in equations for variable in equation.invars}
    assert (contracted, ranks) == ({1}, {2})


@pytest.mark.parametrize("stem", ["padded_1x1", "strided_3x3"])
def test_the_stem_is_the_convolution_that_its_name_says(stem):
    model, x = mj.models.small_mobilenet_v2(10, num_stages=0, stem=stem), images(8, 3)
    variables = initialised(model, x)
    _, layers = outputs_of_layers(model, variables, x)
    stem_params = variables["params"]["stem"]
    if stem == "padded_1x1":
        expected = convolution(x, stem_params["kernel"][None, None], 1) + stem_params["bias"][None, None, None]
    else:
        expected = convolution(x, stem_params["kernel"], 2)
    np.testing.assert_allclose(layers["stem"]["__call__"][0], expected, atol=1e-5)


def test_an_unknown_stem_is_refused():
    model = mj.models.small_mobilenet_v2(10, stem="strided_3x4")
    with pytest.raises(ValueError, match="unknown stem 'strided_3x4'; did you mean 'strided_3x3'"):
        model.init(jax.random.key(0), images())


def test_the_network_of_half_width_has_no_biases_before_its_norms():
    paths = mj.flatten(shapes(mj.models.mobilenet_v2_half(100), (32, 32, 3)))
    kernels, biases = ({p.rpartition("/")[0] for p in paths if p.endswith(end)} for end in ("/kernel", "/bias"))
    assert kernels & biases == {"fc"}


@pytest.mark.parametrize("clipped", [True, False])
def test_activations_are_clipped_at_6_or_not_at_all(clipped):
    model, x = mj.models.small_mobilenet_v2(10, num_stages=0, clipped=clipped), images()
    variables = initialised(model, x)
    variables["params"]["head_norm"]["bias"] += 10
    _, layers = outputs_of_layers(model, variables, x)
    assert (layers["features"][0].max() <= 6) == clipped
    assert not mj.models.mobilenet_v2_half(100).clipped
    assert mj.models.mobilenet_v2(100).clipped


@pytest.mark.slow
def test_a_start_is_that_of_the_models_own_init():
    model, images = mj.models.small_mobilenet_v2(10), jnp.zeros((1, 8, 8, 1))
    expected = jax.jit(model.init)(jax.random.key(3), images)
    chex.assert_trees_all_close(mj.models.initialize(model, jax.random.key(3), images), expected, rtol=1e-5)
    inside = jax.jit(lambda key: mj.models.initialize(model, key, images))(jax.random.key(3))
    chex.assert_trees_all_close(inside, expected, rtol=1e-5)
    closed_over = jax.jit(lambda: mj.models.initialize(model, jax.random.key(3), images))()
    chex.assert_trees_all_close(closed_over, expected, rtol=1e-5)
    shapes = jax.eval_shape(lambda key: mj.models.initialize(model, key, images), jax.random.key(3))
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, expected)
    assert not np.array_equal(
        mj.models.initialize(model, jax.random.key(4), images)["params"]["fc"]["kernel"],
        expected["params"]["fc"]["kernel"],
    )


@pytest.mark.slow
def test_a_flag_of_the_call_is_part_of_the_program_of_a_start():
    class Flagged(nn.Module):
        @nn.compact
        def __call__(self, x, deep, name=None):
            return nn.Dense(2, name=name)(nn.Dense(3, name="first")(x) if deep else x)

    key, x = jax.random.key(0), jnp.ones((1, 4))
    for inputs in ((x, True), (x, False), (x, False, "named")):
        found = mj.models.initialize(Flagged(), key, *inputs)
        chex.assert_trees_all_close(found, Flagged().init(key, *inputs), rtol=1e-5)
