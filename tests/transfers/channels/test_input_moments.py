"""Moments of what enters each layer: those of the numbers themselves, of heads, of places, of a layer used twice."""

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from merge_jax.transfers.channels.graph import _moments
from tests.transfers.channels.test_graph import MODELS, reading, variables_of


def test_moments_of_a_kernel_that_is_read_from_both_sides_are_those_of_its_channel_groups():
    rng = np.random.default_rng(0)
    params, x = {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}, rng.normal(size=(5, 3)).astype(np.float32)
    found = mj.input_moments(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, params, x)
    hidden = np.tanh(x @ np.asarray(params["w"]))
    assert found.keys() == {"w:0", "w:1"}
    np.testing.assert_allclose(found["w:1"], hidden.T @ hidden / 5, rtol=1e-5, atol=1e-6)


def test_moments_of_an_attention_are_those_of_products_and_of_heads_and_channels_together():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(3, 2, 4)).astype(np.float32) for name in ("q", "k", "v")}
    params["out"], x = rng.normal(size=(2, 4, 5)).astype(np.float32), rng.normal(size=(6, 7, 3)).astype(np.float32)

    def run(p, x):
        q, k, v = (jnp.einsum("bli,ihd->blhd", x, p[name]) for name in ("q", "k", "v"))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("blhd,hdo->blo", jnp.einsum("bhqk,bkhd->bqhd", weights, v), p["out"]), weights

    graph, found = mj.channel_graph(run, params, x), mj.input_moments(run, params, x)
    (heads, channels), (_, weights) = graph.leaf_groups("q")[1:], run(params, x)
    assert graph.within == {channels: heads, graph.leaf_groups("v")[2]: heads}
    queries, keys = (np.einsum("bli,ihd->blhd", x, params[name]).reshape(-1, 2, 4) for name in ("q", "k"))
    expected = [np.einsum("nhd,nhe->hde", one, one) / len(one) for one in (queries, keys)]
    np.testing.assert_allclose(found[channels], expected[0] * expected[1], rtol=1e-4, atol=1e-5)
    mixed = np.einsum("bhqk,bki,ihd->bqhd", weights, x, params["v"]).reshape(-1, 2, 4)
    np.testing.assert_allclose(
        found["out"], np.einsum("nhd,ngf->hdgf", mixed, mixed) / len(mixed), rtol=1e-4, atol=1e-5
    )


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


def test_moments_hold_the_activations_once():
    value = jax.ShapeDtypeStruct((2048, 256), jnp.float32)
    plan = jax.jit(lambda one: _moments(jnp.tanh(one), (1,))).lower(value).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 1.5 * 2048 * 256 * 4
