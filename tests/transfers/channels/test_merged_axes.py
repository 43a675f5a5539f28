"""Axes that a model merges, splits or joins: their channels are followed, aligned and refitted; places are not."""

from collections import OrderedDict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.transfers.channels.merged_axes import apart_shape, common_factors, merged_from
from merge_jax.transfers.fitted import compiled

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(3, 4, 4, 2)), jnp.float32)
TOKENS = jnp.asarray(RNG.normal(size=(3, 5, 4)), jnp.float32)
EVERYTHING = {"**": "**"}


def draw(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)}
        for name, shape in shapes.items()
    }


def conv(x, layer):
    return jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def flattened(params, x):
    return jax.nn.relu(conv(x, params["conv"])).reshape(len(x), -1) @ params["fc"]["kernel"]


def flattened_as_torch(params, x):
    x = jnp.tanh(conv(x, params["conv"])).transpose(0, 3, 1, 2)
    return jnp.tanh(x.reshape(len(x), -1)) @ params["fc"]["kernel"]


def decoded(params, x):
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["fc"]["kernel"] + params["fc"]["bias"][None])
    return conv(x.reshape(len(x), 4, 4, -1), params["conv"])


def group_normalised(params, x):
    x = conv(x, params["first"])
    groups = x.reshape(*x.shape[:3], 3, -1)
    x = (groups / jnp.sqrt(jnp.square(groups).mean((1, 2, 4), keepdims=True) + 1e-3)).reshape(x.shape)
    return conv(jnp.tanh(x * params["gain"][None, None, None]), params["last"])


def heads_by_reshape(params, x):
    q, k, v = (one.reshape(*x.shape[:2], 2, -1) for one in jnp.split(x @ params["qkv"]["kernel"], 3, -1))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1) @ params["out"]["kernel"]


def shuffled(params, x):
    x = conv(x, params["first"]).reshape(len(x), 4, 4, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return conv(jnp.tanh(x.reshape(len(x), 8, 8, -1)), params["last"])


def joined(params, x):
    some = jnp.tanh(conv(x, params["first"]))
    return conv(jnp.concatenate([some, jnp.tanh(conv(some, params["second"]))], -1), params["last"])


def gated(params, x):
    x = x @ params["up"]["kernel"]
    return (x[..., :6] * jnp.tanh(x[..., 6:])) @ params["down"]["kernel"]


def stacked(params, x):
    x = x @ params["up"]["kernel"]
    return (
        jnp.tile(jnp.stack([jnp.sin(x), jnp.cos(x)], -1).reshape(*x.shape[:2], -1), (1, 1, 2))
        @ params["down"]["kernel"]
    )


# A model, its inputs, its leaves, the sizes of its hidden channel groups.
MODELS = {
    "flattened": (flattened, IMAGES, draw(0, conv=(3, 3, 2, 6), fc=(96, 5)), [6]),
    "as torch": (flattened_as_torch, IMAGES, draw(0, conv=(3, 3, 2, 6), fc=(96, 5)), [6]),
    "decoded": (decoded, IMAGES, mj.replace(
        {**draw(0, conv=(3, 3, 6, 2)), "fc": {**draw(1, fc=(32, 96))["fc"], "bias": 0}},
        {"fc/bias": draw(2, bias=(96,))["bias"]["kernel"]}), [6]),
    "group norm": (group_normalised, IMAGES, {
        **draw(0, first=(3, 3, 2, 12), last=(1, 1, 12, 2)), "gain": draw(1, gain=(12,))["gain"]["kernel"]}, [3, 4]),
    "heads": (heads_by_reshape, TOKENS, draw(0, qkv=(4, 36), out=(12, 4)), [2, 6]),
    "pixel shuffle": (shuffled, IMAGES, draw(0, first=(3, 3, 2, 12), last=(1, 1, 3, 2)), [3]),
    "concatenation": (joined, IMAGES, draw(0, first=(3, 3, 2, 4), second=(3, 3, 4, 8), last=(1, 1, 12, 2)), [4]),
    "gate": (gated, TOKENS, draw(0, up=(4, 12), down=(6, 3)), [6]),
    "stack": (stacked, TOKENS, draw(0, up=(4, 6), down=(24, 3)), [6]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_channels_in_merged_axes_may_change_places_and_the_model_stays(name):
    fn, x, params, sizes = MODELS[name]
    graph, leaves = mj.channel_graph(fn, params, x), mj.flatten(params)
    shapes = {path: apart_shape(leaf.shape, graph.factors.get(path)) for path, leaf in leaves.items()}
    orders = {}
    for path, groups in graph.channel_groups.items():
        leaf = leaves[path].reshape(shapes[path])
        for axis, group in enumerate(groups):
            if group in graph.hidden:
                size = shapes[path][axis]
                order = orders.setdefault(group, np.roll(np.arange(size), 1))
                leaf = jnp.take(leaf, order, axis)
        leaves[path] = leaf.reshape(leaves[path].shape)
    assert sorted(len(order) for order in orders.values()) == sizes
    np.testing.assert_allclose(fn(mj.replace(params, leaves), x), fn(params, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["flattened", "heads", *(pytest.param(name, marks=pytest.mark.slow) for name in ("as torch", "group norm"))]
)
def test_an_aligned_target_of_the_source_s_size_computes_what_it_does(name):
    fn, x, source, _ = MODELS[name]
    graph, start = mj.channel_graph(fn, source, x), jax.tree.map(jnp.zeros_like, source)
    aligned = mj.aligned_transfer(EVERYTHING, graph, graph)
    adapter = aligned.fit(mj.input_moments(fn, source, x), source, start)
    np.testing.assert_allclose(fn(aligned.apply(adapter, source, start), x), fn(source, x), rtol=1e-4, atol=1e-5)


def test_of_flattened_maps_places_are_rows_of_the_moments():
    fn, x, params, _ = MODELS["flattened"]
    maps = np.asarray(jax.nn.relu(conv(x, params["conv"]))).reshape(-1, 6)
    found = mj.input_moments(fn, params, x)
    np.testing.assert_allclose(found["fc/kernel"], maps.T @ maps / len(maps), rtol=1e-4, atol=1e-5)


def test_unlike_places_are_refused_with_both_sizes():
    fn, x, source, _ = MODELS["flattened"]
    small, target = x[:, :2, :2], draw(1, conv=(3, 3, 2, 6), fc=(24, 5))
    graphs = mj.channel_graph(fn, source, x), mj.channel_graph(fn, target, small)
    expected = r"'fc/kernel' of the target is \(2, 2, 6, 5\) .*of the source \(4, 4, 6, 5\): 2 places .* with 4 along"
    with pytest.raises(ValueError, match=expected):
        mj.aligned_transfer(EVERYTHING, *graphs).init(jax.random.key(0), source, target)


def test_averaged_and_flattened_maps_are_refused_with_both_shapes():
    fn, x, source, _ = MODELS["flattened"]
    mean = lambda params, x: jax.nn.relu(conv(x, params["conv"])).mean((1, 2)) @ params["fc"]["kernel"]  # noqa: E731
    target = draw(1, conv=(3, 3, 2, 6), fc=(6, 5))
    graphs = mj.channel_graph(fn, source, x), mj.channel_graph(mean, target, x)
    with pytest.raises(ValueError, match=r"target's .*\(6, 5\) has 2 axes .*\(4, 4, 6, 5\) has 4.* apart, without"):
        mj.aligned_transfer(EVERYTHING, *graphs).init(jax.random.key(0), source, target)


def test_places_of_a_convolution_and_of_a_fixed_matrix_are_bound():
    params = draw(0, conv=(3, 3, 2, 6), mix=(16, 16), last=(6, 3))

    def mixed(params, x):
        x = conv(x, params["conv"]).reshape(len(x), 16, 6)
        return (x + jnp.einsum("bti,tu->bui", x, params["mix"]["kernel"])) @ params["last"]["kernel"]

    graph = mj.channel_graph(mixed, params, IMAGES)
    assert graph.hidden == {graph.channel_groups["conv/kernel"][3]}
    assert not graph.factors
    fixed = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
    run = lambda p, x: jnp.tanh(x @ p["a"]) @ fixed @ p["b"]  # noqa: E731
    assert not mj.channel_graph(run, {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 2))}, TOKENS).hidden


def rotary(params, x):
    q, k, v = (x @ params[name]["kernel"] for name in "qkv")
    angles = jnp.arange(5.0)[None, :, None] / 10.0 ** jnp.arange(q.shape[-1] // 2)[None, None]

    def turned(x):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate(
            [a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1
        )

    return jax.nn.softmax(turned(q) @ turned(k).swapaxes(1, 2)) @ v @ params["out"]["kernel"]


def test_channels_that_meet_constants_of_an_order_are_bound():
    params = draw(0, q=(4, 4), k=(4, 4), v=(4, 6), out=(6, 3))
    graph = mj.channel_graph(rotary, params, TOKENS)
    assert graph.hidden == {graph.channel_groups["v/kernel"][1]} == {graph.channel_groups["out/kernel"][0]}
    wider = mj.channel_graph(rotary, wide := draw(1, q=(4, 8), k=(4, 8), v=(4, 6), out=(6, 3)), TOKENS)
    with pytest.raises(ValueError, match=r"'k/kernel' has 8 entries .* has 4 .*angles of rotary positions"):
        mj.aligned_transfer(EVERYTHING, graph, wider).init(jax.random.key(0), params, wide)


def test_statistics_that_a_function_captures_bind_its_channels_and_an_input_does_not():
    def run(params, x, mean):
        return jnp.tanh(x @ params["a"]["kernel"] - mean) @ params["b"]["kernel"]

    small, wide = (draw(0, a=(4, size), b=(size, 3)) for size in (4, 6))
    means = [jnp.arange(size).reshape(1, 1, -1) for size in (4.0, 6.0)]
    free = mj.channel_graph(run, small, TOKENS, means[0])
    assert free.hidden == {free.channel_groups["a/kernel"][1]}
    bound = [
        mj.channel_graph(partial(run, mean=mean), params, TOKENS)
        for params, mean in zip((small, wide), means, strict=True)
    ]
    assert not bound[0].hidden
    with pytest.raises(
        ValueError, match=r"has 6 entries .* has 4 .*running statistics that the function does not take"
    ):
        mj.aligned_transfer(EVERYTHING, *bound).init(jax.random.key(0), small, wide)


CONSTANT = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)


@pytest.mark.parametrize(
    "meet",
    [
        lambda y, x: jnp.einsum("npc,c->npc", y, CONSTANT[0]),
        lambda y, x: y + jnp.einsum("np,c->npc", x[..., 0], CONSTANT[0]),
        lambda y, x: y + x @ CONSTANT,
        lambda y, x: y + CONSTANT[jnp.argmax(x, -1)],
        lambda y, x: y.at[:, 0].set(CONSTANT[0]),
        lambda y, x: jnp.concatenate([y, jnp.broadcast_to(CONSTANT[0], y.shape)], -1)[..., :6],
    ],
)
def test_a_constant_binds_channels_wherever_it_meets_them(meet):
    def run(params, x):
        return meet(x @ params["a"], x) @ params["b"]

    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 2))}
    assert not mj.channel_graph(run, params, TOKENS, strict=False).hidden
    alike = mj.channel_graph(lambda p, x: jnp.einsum("npc,c->npc", x @ p["a"], jnp.ones(6)) @ p["b"], params, TOKENS)
    assert alike.hidden == {"a:1"}


def test_a_pruned_target_has_the_rows_of_the_chosen_channels_at_all_places():
    fn, x, source, _ = MODELS["flattened"]
    target = draw(1, conv=(3, 3, 2, 2), fc=(32, 5))
    graphs = [mj.channel_graph(fn, params, x) for params in (source, target)]
    pruned = mj.aligned_transfer(EVERYTHING, *graphs, choice="magnitude")
    made = pruned.apply(pruned.fit({}, source, target), source, target)
    rows = source["fc"]["kernel"].reshape(4, 4, 6, 5)
    sizes = jnp.square(source["conv"]["kernel"]).sum((0, 1, 2)) + jnp.square(rows).sum((0, 1, 3))
    best = jnp.argsort(-sizes)[:2]
    np.testing.assert_allclose(made["fc"]["kernel"], rows[:, :, best].reshape(32, 5), rtol=1e-6)
    np.testing.assert_allclose(made["conv"]["kernel"], source["conv"]["kernel"][..., best], rtol=1e-6)


def both_ways(params, x):
    """A convolution that is flattened for a dense layer, whose outputs become maps again."""
    x = jax.nn.relu(conv(x, params["conv"])).reshape(len(x), -1)
    x = jax.nn.relu(x @ params["fc"]["kernel"] + params["fc"]["bias"][None]).reshape(len(x), 2, 2, -1)
    return jax.lax.conv_transpose(x, params["last"]["kernel"], (2, 2), "SAME")


def test_a_refit_solves_both_ways_and_comes_nearer_than_alignment():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(200, 2, 2, 2)), jnp.float32)

    def variables(seed, width):
        params = draw(seed, conv=(1, 1, 2, width), fc=(4 * width, 4 * width), last=(3, 3, width, 3))
        return {**params, "fc": {**params["fc"], "bias": draw(seed + 5, b=(1, 4 * width))["b"]["kernel"][0]}}

    source, target = variables(0, 16), variables(1, 4)
    made = mj.refit(EVERYTHING, both_ways, both_ways, source, target, images, ridge=1e-4)
    assert set(made.solved) == {"conv/kernel", "fc/kernel", "last/kernel"}
    assert not made.kept
    aligned = mj.aligned_transfer(EVERYTHING, *(mj.channel_graph(both_ways, one, images) for one in (source, target)))

    @jax.jit
    def write():
        adapter = aligned.fit(mj.input_moments(both_ways, source, images), source, target)
        return aligned.apply(adapter, source, target)

    wanted = both_ways(source, images)
    left = [float(jnp.mean(jnp.square(both_ways(one, images) - wanted))) for one in (made.variables, write())]
    assert left[0] < 0.6 * left[1]


def test_a_second_refit_of_the_same_functions_and_shapes_compiles_nothing(monkeypatch):
    monkeypatch.setattr(compiled, "_programs", programs := OrderedDict())

    def run(params, x):
        return jnp.tanh(x @ params["first"]["kernel"]) @ params["last"]["kernel"]

    def refit(seed, fn=run):
        source, target = draw(seed, first=(5, 8), last=(8, 3)), draw(seed + 1, first=(5, 4), last=(4, 3))
        x = jnp.asarray(np.random.default_rng(seed).normal(size=(40, 5)), jnp.float32)
        return mj.refit(EVERYTHING, fn, fn, source, target, x, key=jax.random.key(seed)).variables["last"]["kernel"]

    refit(0)
    (first,) = programs.values()
    second = refit(7)
    (kept,) = programs.values()
    assert kept is first
    assert kept.compiled._cache_size() == 1
    other = refit(7, lambda *of: run(*of))  # Another function is another program.
    assert len(programs) == 2
    np.testing.assert_allclose(second, other, rtol=1e-5)


def test_functions_with_traced_arrays_or_keys_in_them_are_refitted_and_not_kept(monkeypatch):
    monkeypatch.setattr(compiled, "_programs", programs := OrderedDict())
    source, target = draw(0, first=(5, 4), last=(4, 3)), draw(1, first=(5, 2), last=(2, 3))
    x, seed = jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)), jnp.float32), jax.random.key(0)

    def refit(scale):
        def run(params, x):
            x = x * scale + jax.random.normal(seed, (1, 5))
            return jnp.tanh(x @ params["first"]["kernel"]) @ params["last"]["kernel"]

        # A key that is given is not traced, as the default one would be: only the constant is.
        return mj.refit(EVERYTHING, run, run, source, target, x, key=seed).variables["last"]["kernel"]

    made = jax.jit(refit)(2.0)
    assert not programs
    np.testing.assert_allclose(made, refit(2.0), rtol=1e-4, atol=1e-5)


def test_functions_with_large_arrays_in_them_are_not_kept(monkeypatch):
    monkeypatch.setattr(compiled, "_programs", programs := OrderedDict())
    monkeypatch.setattr(compiled, "_MOST_CONSTANTS", 100)
    params, x = draw(0, first=(5, 4), last=(4, 3)), jnp.ones((8, 5))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, params, [x]))
    options = compiled.RefitOptions(1e-2, 8, 100, "moments", None)
    routes = (mj.Route("**", "**"),)
    for large in (x[:1] * 2, jnp.ones((1, 5)) * jnp.ones((9, 1))):
        run = lambda p, x, c=large: jnp.tanh((x + c[:1]) @ p["first"]["kernel"]) @ p["last"]["kernel"]  # noqa: E731
        compiled.prepared(run, run, routes, shapes, options, keep=True)
    assert len(programs) == 1


def test_factors():
    assert common_factors((8, 4), (2, 16)) == (2, 4, 4)
    assert common_factors((6, 4), (4, 6)) is None
    assert merged_from((2, 3, 4), (6, 4)) == [(0, 1), (2,)]
    assert merged_from((6, 4), (2, 12)) is None
