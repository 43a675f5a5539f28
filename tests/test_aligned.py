"""Alignment: what it writes, that a fit finds channels which carry all, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from tests.helpers import jitted_init

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8, 8, 1)), jnp.float32)
LARGE, SMALL = mj.models.small_resnet(10, num_stages=2), mj.models.small_resnet(10, num_stages=2, width=0.5)
EVERYTHING = {"**": "**"}


def start(model, seed):
    variables = dict(jitted_init(model, seed, IMAGES))
    params = variables.pop("params")
    variables.pop("intermediates", None)
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32), params)
    return noisy, variables


def reading(model):
    return lambda params, state, inputs: model.apply({"params": params, **state}, inputs)


@functools.cache
def variables_of(model):
    return start(model, (LARGE, SMALL).index(model))


@functools.cache
def wired(model):
    return mj.wiring(reading(model), *variables_of(model), IMAGES)


def aligned(source, target, routes=None):
    return mj.aligned_transfer(routes or EVERYTHING, wired(source), wired(target))


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["last"]["kernel"]


def perceptron(rng, hidden):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"first": {"kernel": normal(5, hidden), "bias": normal(hidden)}, "last": {"kernel": normal(hidden, 3)}}


def test_it_starts_as_weight_selection_with_one_choice_for_a_space():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    merged = transfer.apply(transfer.init(jax.random.key(0), source, target), source, target)
    even = source["stage2_0"]["conv1"]["kernel"][:, :, ::2, ::2]
    np.testing.assert_array_equal(merged["stage2_0"]["conv1"]["kernel"], even)
    np.testing.assert_array_equal(merged["stage2_0"]["norm1"]["scale"], source["stage2_0"]["norm1"]["scale"][::2])
    np.testing.assert_array_equal(merged["fc"]["kernel"], source["fc"]["kernel"][::2])
    np.testing.assert_array_equal(merged["fc"]["bias"], source["fc"]["bias"])


def test_of_equal_models_it_copies():
    (source, _), (target, _) = variables_of(LARGE), start(LARGE, 7)
    transfer = aligned(LARGE, LARGE)
    merged = transfer.apply(transfer.init(jax.random.key(0), source, target), source, target)
    for path, leaf in mj.flatten(merged).items():
        np.testing.assert_array_equal(leaf, mj.flatten(source)[path])


@pytest.mark.parametrize("fitted", [False, True])
def test_a_wider_target_computes_what_the_source_does(fitted):
    (source, state), (target, wide_state) = variables_of(SMALL), variables_of(LARGE)
    transfer = aligned(SMALL, LARGE)
    adapter = transfer.init(jax.random.key(0), source, target)
    if fitted:
        adapter = transfer.fit(mj.input_moments(reading(SMALL), source, state, IMAGES), source, target)
    wide = transfer.apply(adapter, source, target)
    np.testing.assert_allclose(
        reading(LARGE)(wide, wide_state, IMAGES), reading(SMALL)(source, state, IMAGES), rtol=1e-4, atol=1e-5
    )
    rest = wide["stage2_0"]["conv1"]["kernel"][..., 16:]
    np.testing.assert_array_equal(rest, target["stage2_0"]["conv1"]["kernel"][..., 16:])


def test_a_fit_loses_nothing_where_the_source_has_channels_twice():
    rng = np.random.default_rng(0)
    core, x = perceptron(rng, 4), jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)
    # Eight channels of the four, in disorder and scaled, each with a reader of its own.
    of, scale = np.array([2, 0, 0, 3, 1, 2, 1, 3]), jnp.asarray(rng.uniform(0.5, 2, 8), jnp.float32)
    source = {
        "first": {"kernel": core["first"]["kernel"][:, of] * scale[None], "bias": core["first"]["bias"][of] * scale},
        "last": {"kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)},
    }
    target = perceptron(rng, 4)
    wirings = [mj.wiring(mlp, params, x) for params in (source, target)]
    transfer = mj.aligned_transfer(EVERYTHING, *wirings)
    moments = mj.input_moments(mlp, source, x)
    fitted = transfer.apply(jax.jit(transfer.fit)(moments, source, target), source, target)
    even = transfer.apply(transfer.init(jax.random.key(0), source, target), source, target)
    expected = mlp(source, x)
    size = float(jnp.sqrt(jnp.mean(jnp.square(expected))))
    assert float(jnp.sqrt(jnp.mean(jnp.square(mlp(fitted, x) - expected)))) < 2e-3 * size
    assert float(jnp.sqrt(jnp.mean(jnp.square(mlp(even, x) - expected)))) > 0.1 * size


def test_a_fit_keeps_more_of_a_real_model_than_an_even_choice():
    (source, state), (target, small_state) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    moments = mj.input_moments(reading(LARGE), source, state, IMAGES)
    expected = reading(LARGE)(source, state, IMAGES)
    errors = []
    for adapter in (transfer.fit(moments, source, target), transfer.init(jax.random.key(0), source, target)):
        outputs = reading(SMALL)(transfer.apply(adapter, source, target), small_state, IMAGES)
        errors.append(float(jnp.mean(jnp.square(outputs - expected))))
    assert errors[0] < 0.5 * errors[1]


def test_without_moments_a_fit_is_the_start():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    fitted, started = transfer.fit({}, source, target), transfer.init(jax.random.key(0), source, target)
    jax.tree.map(np.testing.assert_array_equal, fitted, started)


def test_leaves_without_a_route_stay_and_jit_changes_nothing():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL, {"stage1_0/**": "stage1_0/**", "stem*/**": "stem*/**"})
    adapter = transfer.init(jax.random.key(0), source, target)
    merged = transfer.apply(adapter, source, target)
    assert merged["fc"]["kernel"] is target["fc"]["kernel"]
    assert merged["stage2_0"]["conv1"]["kernel"] is target["stage2_0"]["conv1"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, jax.jit(transfer.apply)(adapter, source, target), merged)


def test_gradients_reach_every_matrix_of_the_adapter():
    (source, _), (target, state) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    adapter = transfer.init(jax.random.key(0), source, target)

    def loss(adapter):
        logits = reading(SMALL)(transfer.apply(adapter, source, target), state, IMAGES)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(16) % 10).mean()

    grads = jax.jit(jax.grad(loss))(adapter)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


def test_a_larger_window_has_the_sources_at_its_centre_and_a_smaller_its_centre():
    x = jnp.ones((1, 4, 4, 2))

    def wired(window):
        kernel = jnp.asarray(np.random.default_rng(window).normal(size=(window, window, 2, 3)), jnp.float32)
        params = {"conv": {"kernel": kernel}}

        def run(p, x):
            return jax.lax.conv_general_dilated(
                x, p["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        return params, mj.wiring(run, params, x)

    (three, of_three), (one, of_one) = wired(3), wired(1)
    grown = mj.aligned_transfer(EVERYTHING, of_one, of_three)
    larger = grown.apply(grown.init(jax.random.key(0), one, three), one, three)["conv"]["kernel"]
    np.testing.assert_array_equal(larger[1, 1], one["conv"]["kernel"][0, 0])
    assert float(jnp.abs(larger).sum()) == float(jnp.abs(larger[1, 1]).sum())
    shrunk = mj.aligned_transfer(EVERYTHING, of_three, of_one)
    smaller = shrunk.apply(shrunk.init(jax.random.key(0), three, one), three, one)["conv"]["kernel"]
    np.testing.assert_array_equal(smaller[0, 0], three["conv"]["kernel"][1, 1])


def test_a_target_space_that_hears_two_source_spaces_has_a_matrix_for_each():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    routes = {"stage1_0/conv1/kernel": "stage1_0/conv1/kernel", "stage1_0/conv2/kernel": "stage2_0/conv2/kernel"}
    transfer = aligned(LARGE, SMALL, routes)
    adapter = transfer.init(jax.random.key(0), source, target)
    assert adapter["spaces"].keys() == {"stage1_0/conv1/kernel:3", "stage1_0/conv1/kernel:2 from fc/kernel:0"}
    merged = transfer.apply(adapter, source, target)
    np.testing.assert_array_equal(
        merged["stage1_0"]["conv2"]["kernel"], source["stage2_0"]["conv2"]["kernel"][:, :, ::4, ::4]
    )


def test_description_counts_what_the_adapter_has():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    adapter = transfer.init(jax.random.key(0), source, target)
    described = transfer.describe(source, target)
    assert sum(row.parameters for row in described) == sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert len(described) == len(mj.flatten(target))


def test_a_joint_state_starts_from_the_fitted_adapter():
    (source, state), (target, small_state) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    adapter = transfer.fit(mj.input_moments(reading(LARGE), source, state, IMAGES), source, target)
    task = mj.Task(mj.classification_loss(SMALL.apply), optax.sgd(0.0))
    parts = {"source_params": source, "target_params": target, "source_state": state, "target_state": small_state}
    joint = mj.init_joint_state(jax.random.key(0), None, task, transfer, adapter=adapter, **parts)
    step = mj.make_joint_step(None, task, transfer, stop=0.1, num_steps=10)
    batch = {"target": {"image": IMAGES, "label": jnp.arange(16) % 10}}
    joint, _ = jax.jit(step)(joint, batch)
    expected = transfer.apply(adapter, source, target)
    jax.tree.map(np.testing.assert_array_equal, joint.target.params, expected)


def refuse(routes, source, target, wirings, match):
    transfer = mj.aligned_transfer(routes, *wirings)
    with pytest.raises(ValueError, match=match):
        transfer.init(jax.random.key(0), source, target)


def test_labels_of_other_numbers_are_refused():
    x, rng = jnp.ones((2, 5)), np.random.default_rng(0)
    source = perceptron(rng, 4)
    target = {**perceptron(rng, 4), "last": {"kernel": jnp.ones((4, 7))}}
    wirings = [mj.wiring(mlp, params, x) for params in (source, target)]
    refuse(EVERYTHING, source, target, wirings, r"'last/kernel' has 7 entries along axis 1.*has 3.*Leave out the route")


def test_wirings_of_other_models_are_refused():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    x = jnp.ones((2, 5))
    other = mj.wiring(mlp, perceptron(np.random.default_rng(0), 4), x)
    refuse(EVERYTHING, source, target, (other, wired(SMALL)), "wiring is of a model without a leaf")
    flat = mj.wiring(lambda p, x: x @ p["fc"]["kernel"], {"fc": {"kernel": jnp.ones(5)}}, x)
    refuse({"fc/kernel": "fc/kernel"}, source, target, (flat, wired(SMALL)), "has 1 axes there, here 2")


def test_kernels_of_other_layouts_are_refused():
    x, square = jnp.ones((2, 4)), {"k": jnp.ones((4, 4))}
    wirings = mj.wiring(lambda p, x: x @ p["k"].T, square, x), mj.wiring(lambda p, x: x @ p["k"], square, x)
    refuse(
        {"k": "k"}, square, square, wirings, "of other layouts: axis 0 is an input of the target's layer, and axis 0"
    )


def test_leaves_of_other_ranks_and_joined_leaves_are_refused():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    wirings = wired(LARGE), wired(SMALL)
    refuse({"fc/kernel": "fc/bias"}, source, target, wirings, r"2 axes of channels.*1: they cannot be paired")
    joined = {("stage1_0/conv1/kernel", "stage1_0/conv2/kernel"): "stage2_0/conv2/kernel"}
    refuse(joined, source, target, wirings, "joins several leaves")
    with pytest.raises(ValueError, match="the view 'attention'"):
        mj.aligned_transfer([mj.Route("a", "b", view="attention")], *wirings)


def test_an_adapter_or_moments_of_other_models_are_refused():
    (source, state), (target, _) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    other = aligned(LARGE, LARGE).init(jax.random.key(0), source, source)
    with pytest.raises(ValueError, match=r"does not fit.*Expected \(16, 32\), got \(32, 32\)"):
        transfer.apply(other, source, target)
    few = aligned(LARGE, SMALL, {"fc/kernel": "fc/kernel"}).init(jax.random.key(0), source, target)
    with pytest.raises(ValueError, match="the adapter has nothing for"):
        transfer.apply(few, source, target)
    with pytest.raises(ValueError, match="the adapter has nothing for"):
        transfer.apply({}, source, target)
    moments = mj.input_moments(reading(LARGE), source, state, IMAGES)
    with pytest.raises(ValueError, match=r"must be \(16, 16\), got \(3, 3\)"):
        transfer.fit({**moments, "stage1_0/conv1/kernel": jnp.eye(3)}, source, target)
