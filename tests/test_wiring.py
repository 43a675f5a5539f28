"""Wiring: axes that are said to be one space are one, in models of ours, of Linen and NNX, and in plain functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import merge_jax as mj
from tests.helpers import jitted_init

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 1)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 20, size=(3, 6)), jnp.int32)
MODELS = {
    "resnet": (mj.models.small_resnet(10), IMAGES),
    "mobilenet": (mj.models.small_mobilenet_v2(10), IMAGES),
    "vit": (mj.models.ImageClassifier(mj.models.tiny_vit(8, patch_size=2), 10), IMAGES),
    "distilbert": (mj.models.TextClassifier(mj.models.small_distilbert(20, separator=1), 3), TOKENS),
}


def variables_of(model, inputs):
    """Returns parameters, each entry other than the rest, and the model's state."""
    variables = dict(jitted_init(model, 0, inputs))
    params, rng = variables.pop("params"), np.random.default_rng(1)
    variables.pop("intermediates", None)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), params), variables


def reading(model):
    return lambda params, state, inputs: model.apply({"params": params, **state}, inputs)


def members(wiring):
    found = {}
    for path, names in wiring.spaces.items():
        for axis, name in enumerate(names):
            found.setdefault(name, []).append((path, axis))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_channels_of_a_space_may_change_places_and_the_model_stays(name):
    model, inputs = MODELS[name]
    params, state = variables_of(model, inputs)
    read = jax.jit(reading(model))
    wiring = mj.wiring(read, params, state, inputs)
    state = jax.tree.map(jnp.ones_like, state)  # Statistics are alike for all channels.
    leaves, outputs, tried = mj.flatten(params), read(params, state, inputs), 0
    for axes in members(wiring).values():
        makes = any(axis not in wiring.inputs[path] for path, axis in axes)
        reads = any(axis in wiring.inputs[path] for path, axis in axes)
        if not (makes and reads):
            continue  # They come from outside, or leave the model.
        (size,) = {leaves[path].shape[axis] for path, axis in axes}
        order = np.random.default_rng(tried).permutation(size)
        changed = dict(leaves)
        for path, axis in axes:
            changed[path] = jnp.take(changed[path], order, axis)
        moved = read(mj.replace(params, changed), state, inputs)
        np.testing.assert_allclose(*jax.tree.leaves((moved, outputs)), rtol=2e-3, atol=2e-3)
        tried += 1
    assert tried == {"resnet": 6, "mobilenet": 7, "vit": 7, "distilbert": 8}[name]


def test_residual_sums_norms_and_biases_are_one_space():
    model, images = MODELS["resnet"]
    wiring = mj.wiring(reading(model), *variables_of(model, images), images)
    of_stream = {
        *(("stem/kernel", 3), ("stem_norm/scale", 0), ("stem_norm/bias", 0)),
        *(("stage1_0/conv1/kernel", 2), ("stage1_0/conv2/kernel", 3)),
        *(("stage1_0/norm2/scale", 0), ("stage1_0/norm2/bias", 0)),
        *(("stage2_0/conv1/kernel", 2), ("stage2_0/shortcut/kernel", 0)),
    }
    assert of_stream in [set(axes) for axes in members(wiring).values()]
    assert wiring.inputs["stage1_0/conv1/kernel"] == (2,)
    assert wiring.inputs["stem_norm/scale"] == ()


def test_what_attention_multiplies_is_read_too():
    model, images = MODELS["vit"]
    wiring = mj.wiring(reading(model), *variables_of(model, images), images)
    (of_query,) = {wiring.spaces["encoder/layer_0/attention/query/kernel"][2]}
    assert wiring.spaces["encoder/layer_0/attention/key/kernel"][2] == of_query
    assert of_query in wiring.read
    assert wiring.spaces["classifier/kernel"][1] not in wiring.read


def test_depthwise_convolutions_pass_channels_on():
    model, images = MODELS["mobilenet"]
    wiring = mj.wiring(reading(model), *variables_of(model, images), images)
    (space,) = {wiring.spaces["stage2_0/expand/kernel"][1]}
    assert wiring.spaces["stage2_0/depthwise/kernel"][3] == space
    assert wiring.spaces["stage2_0/project/kernel"][0] == space


class Grouped(nn.Module):
    """A grouped convolution of XLA's own, depthwise or in two groups."""

    groups: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name="first")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=self.groups, name="grouped")(x)
        return nn.Conv(2, (1, 1), name="last")(nn.max_pool(x, (2, 2)))


def test_groups_that_are_no_single_channels_tie_nothing():
    wirings = []
    for groups in (4, 2):
        model = Grouped(groups)
        params, state = variables_of(model, IMAGES)
        wirings.append(mj.wiring(reading(model), params, state, IMAGES))
    depthwise, two = wirings
    assert (
        depthwise.spaces["first/kernel"][3] == depthwise.spaces["grouped/kernel"][3] == depthwise.of("last/kernel")[2]
    )
    assert two.spaces["first/kernel"][3] != two.spaces["grouped/kernel"][3]
    assert two.inputs["grouped/kernel"] == ()
    narrowing = jnp.ones((3, 3, 2, 4)), jnp.ones((1, 5, 5, 8))  # As many groups as outputs, but two inputs in each.

    def run(p, x):
        return jax.lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )

    assert mj.wiring(run, {"k": narrowing[0]}, narrowing[1]).inputs == {"k": ()}


def test_a_model_of_nnx_and_a_plain_function():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    of_nnx = mj.wiring(lambda params, x: nnx.merge(graph, params)(x), params, jnp.ones((2, 3)))
    plain = {"w": jnp.ones((3, 5)), "v": jnp.ones((2, 5))}
    of_plain = mj.wiring(lambda p, x: jnp.einsum("oi,bi->bo", p["v"], jnp.tanh(x @ p["w"])), plain, jnp.ones((2, 3)))
    assert of_nnx.spaces["first/kernel"][1] == of_nnx.spaces["last/kernel"][0] == of_nnx.spaces["first/bias"][0]
    assert of_plain.spaces["w"][1] == of_plain.spaces["v"][1]
    assert of_plain.inputs == {"w": (0,), "v": (1,)}


def test_shapes_are_enough_and_nothing_is_computed():
    model, images = MODELS["resnet"]
    params, state = variables_of(model, images)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, state, images))
    assert mj.wiring(reading(model), *shapes) == mj.wiring(reading(model), params, state, images)


def test_a_loop_over_layers_ties_nothing_inside_and_still_runs():
    params = {"first": jnp.ones((3, 4)), "layers": jnp.ones((2, 4, 4)), "last": jnp.ones((4, 2))}

    def run(params, x):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x @ params["first"], params["layers"])
        return x @ params["last"]

    wiring = mj.wiring(run, params, jnp.ones((2, 3)))
    assert wiring.inputs == {"first": (0,), "layers": (), "last": (0,)}
    assert set(mj.input_moments(run, params, jnp.ones((2, 3)))) == {"first", "last"}


def test_a_kernel_that_other_leaves_scale_or_make_is_read_still():
    params = {"w": jnp.ones((3, 4)), "g": jnp.ones(4), "a": jnp.ones((4, 2)), "b": jnp.ones((2, 5))}

    def run(p, x):
        return jnp.tanh(x @ (p["w"] * p["g"][None])) @ (p["a"] @ p["b"])

    wiring = mj.wiring(run, params, jnp.ones((2, 3)))
    assert wiring.inputs["w"] == wiring.inputs["a"] == (0,)
    assert wiring.spaces["w"][1] == wiring.spaces["g"][0] == wiring.spaces["a"][0]


def test_a_table_that_is_looked_up_and_multiplied_makes_channels():
    params = {"table": jnp.ones((7, 4)), "position": jnp.ones((2, 4))}
    run = lambda p, x: (p["table"][x] + p["position"]) @ p["table"].T  # noqa: E731
    wiring = mj.wiring(run, params, jnp.zeros(2, jnp.int32))
    assert wiring.inputs["table"] == ()
    assert wiring.spaces["table"][1] == wiring.spaces["position"][1]
    assert wiring.spaces["table"][1] in wiring.read


@pytest.mark.parametrize(
    "change", [jnp.cumsum, lambda h: jnp.sort(h, axis=-1), lambda h: jnp.pad(h, ((0, 0), (1, 0)))[:, :-1]]
)
def test_what_mixes_channels_ties_nothing(change):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    run = lambda p, x: change(x @ p["a"]).reshape(2, 4) @ p["b"]  # noqa: E731
    wiring = mj.wiring(run, params, jnp.ones((2, 3)))
    assert wiring.spaces["a"][1] != wiring.spaces["b"][0]


def test_effects_and_barriers_are_passed():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4))}

    def run(p, x):
        h = x @ p["a"]
        jax.debug.print("{}", h.sum())
        h, b = jax.lax.optimization_barrier((h, p["b"]))
        return h @ b

    wiring = mj.wiring(run, params, jnp.ones((2, 3)))
    assert wiring.inputs == {"a": (0,), "b": (0,)}
    assert wiring.spaces["a"][1] == wiring.spaces["b"][0]


def test_an_unknown_leaf_is_told_with_near_misses():
    wiring = mj.wiring(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((3, 2))}, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"without a leaf 'kernal'.*kernel"):
        wiring.of("kernal")


def test_moments_are_those_of_what_enters():
    rng = np.random.default_rng(0)
    x, params = rng.normal(size=(5, 3)), {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(2, 4))}
    to_jax = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, x))
    found = jax.jit(lambda *given: mj.input_moments(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"].T, *given))(*to_jax)
    hidden = np.tanh(x @ params["a"])
    np.testing.assert_allclose(found["a"], x.T @ x / 5, rtol=1e-5)
    np.testing.assert_allclose(found["b"], hidden.T @ hidden / 5, rtol=1e-5)


def test_moments_of_a_convolution_are_over_all_places():
    model, images = MODELS["resnet"]
    params, state = variables_of(model, images)
    found = mj.input_moments(reading(model), params, state, images)
    pixels = np.asarray(images).reshape(-1, 1)
    np.testing.assert_allclose(found["stem/kernel"], pixels.T @ pixels / len(pixels), rtol=1e-5)
    assert found["stage2_0/conv2/kernel"].shape == (32, 32)
    assert {path for path in mj.flatten(params) if path.endswith("kernel")} == set(found)


def test_moments_of_a_shared_layer_are_summed():
    x = jnp.asarray([[1.0, 2.0]])
    params = {"w": 2 * jnp.eye(2)}
    found = mj.input_moments(lambda p, x: x @ p["w"] @ p["w"], params, x)
    np.testing.assert_allclose(found["w"], (1 + 4) * np.outer([1, 2], [1, 2]), rtol=1e-6)
