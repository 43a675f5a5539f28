"""Channel graphs: axes said to be one channel group are one, in models of ours, of Linen and NNX, and in functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import merge_jax as mj
from merge_jax.transfers.channels.trace import FOLLOWED

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 1)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 20, size=(3, 6)), jnp.int32)
MODELS = {
    "resnet": (mj.models.small_resnet(10), IMAGES),
    "mobilenet": (mj.models.small_mobilenet_v2(10), IMAGES),
    "vit": (mj.models.ImageClassifier(mj.models.tiny_vit(8, patch_size=2), 10), IMAGES),
    "distilbert": (mj.models.TextClassifier(mj.models.small_distilbert(20, separator=1), 3), TOKENS),
}


def ones(shapes):
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)


def variables_of(model, inputs):
    """Returns parameters, each entry other than the rest, and the model's state, alike for all channels."""
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), inputs))
    params, rng = variables.pop("params"), np.random.default_rng(1)
    variables.pop("intermediates", None)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), params), ones(
        variables
    )


def reading(model):
    return lambda params, state, inputs: model.apply({"params": params, **state}, inputs)


def members(graph):
    found = {}
    for path, names in graph.channel_groups.items():
        for axis, name in enumerate(names):
            found.setdefault(name, []).append((path, axis))
    return found


@pytest.mark.parametrize(
    "name",
    ["resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet", "vit", "distilbert"))],
)
def test_channels_of_a_group_may_change_places_and_the_model_stays(name):
    model, inputs = MODELS[name]
    params, state = variables_of(model, inputs)
    read = jax.jit(reading(model))
    graph = mj.channel_graph(read, params, state, inputs)
    leaves, outputs, tried = mj.flatten(params), read(params, state, inputs), 0
    for axes in members(graph).values():
        makes = any(axis not in graph.inputs[path] for path, axis in axes)
        reads = any(axis in graph.inputs[path] for path, axis in axes)
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


def test_residual_sums_norms_and_biases_are_one_channel_group():
    model, images = MODELS["resnet"]
    graph = mj.channel_graph(reading(model), *variables_of(model, images), images)
    stream = {
        *(("stem/kernel", 3), ("stem_norm/scale", 0), ("stem_norm/bias", 0)),
        *(("stage1_0/conv1/kernel", 2), ("stage1_0/conv2/kernel", 3)),
        *(("stage1_0/norm2/scale", 0), ("stage1_0/norm2/bias", 0)),
        *(("stage2_0/conv1/kernel", 2), ("stage2_0/shortcut/kernel", 0)),
    }
    assert stream in [set(axes) for axes in members(graph).values()]
    assert graph.inputs["stage1_0/conv1/kernel"] == (2,)
    assert graph.inputs["stem_norm/scale"] == ()


def test_what_attention_multiplies_is_read_too():
    model, images = MODELS["vit"]
    graph = mj.channel_graph(reading(model), *variables_of(model, images), images)
    (query_channels,) = {graph.channel_groups["encoder/layer_0/attention/query/kernel"][2]}
    assert graph.channel_groups["encoder/layer_0/attention/key/kernel"][2] == query_channels
    assert query_channels in graph.consumed
    assert graph.channel_groups["classifier/kernel"][1] not in graph.consumed


def test_depthwise_convolutions_pass_channels_on():
    model, images = MODELS["mobilenet"]
    graph = mj.channel_graph(reading(model), *variables_of(model, images), images)
    (group,) = {graph.channel_groups["stage2_0/expand/kernel"][1]}
    assert graph.channel_groups["stage2_0/depthwise/kernel"][3] == group
    assert graph.channel_groups["stage2_0/project/kernel"][0] == group


class Grouped(nn.Module):
    """A grouped convolution of XLA's own, depthwise or in two groups."""

    groups: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name="first")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=self.groups, name="grouped")(x)
        return nn.Conv(2, (1, 1), name="last")(nn.max_pool(x, (2, 2)))


def test_groups_that_are_no_single_channels_tie_nothing():
    graphs = []
    for groups in (4, 2):
        model = Grouped(groups)
        params, state = variables_of(model, IMAGES)
        if groups == 2:
            with pytest.raises(ValueError, match=r"conv_general_dilated in groups.*channels of 'first/kernel'"):
                mj.channel_graph(reading(model), params, state, IMAGES)
        graphs.append(mj.channel_graph(reading(model), params, state, IMAGES, strict=False))
    depthwise, two = graphs
    assert (
        depthwise.channel_groups["first/kernel"][3]
        == depthwise.channel_groups["grouped/kernel"][3]
        == depthwise.leaf_groups("last/kernel")[2]
    )
    assert two.channel_groups["first/kernel"][3] != two.channel_groups["grouped/kernel"][3]
    assert two.inputs["grouped/kernel"] == ()
    narrowing = jnp.ones((3, 3, 2, 4)), jnp.ones((1, 5, 5, 8))  # As many groups as outputs, but two inputs in each.

    def run(p, x):
        return jax.lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )

    assert mj.channel_graph(run, {"k": narrowing[0]}, narrowing[1], strict=False).inputs == {"k": ()}


def test_a_model_of_nnx_and_a_plain_function():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    nnx_graph = mj.channel_graph(lambda params, x: nnx.merge(graph, params)(x), params, jnp.ones((2, 3)))
    plain = {"w": jnp.ones((3, 5)), "v": jnp.ones((2, 5))}
    plain_graph = mj.channel_graph(
        lambda p, x: jnp.einsum("oi,bi->bo", p["v"], jnp.tanh(x @ p["w"])), plain, jnp.ones((2, 3))
    )
    assert (
        nnx_graph.channel_groups["first/kernel"][1]
        == nnx_graph.channel_groups["last/kernel"][0]
        == nnx_graph.channel_groups["first/bias"][0]
    )
    assert plain_graph.channel_groups["w"][1] == plain_graph.channel_groups["v"][1]
    assert plain_graph.inputs == {"w": (0,), "v": (1,)}


def test_shapes_are_enough_and_nothing_is_computed():
    model, images = MODELS["resnet"]
    params, state = variables_of(model, images)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, state, images))
    assert mj.channel_graph(reading(model), *shapes) == mj.channel_graph(reading(model), params, state, images)


def test_a_loop_over_layers_ties_nothing_inside_and_still_runs():
    params = {"first": jnp.ones((3, 4)), "layers": jnp.ones((2, 4, 4)), "last": jnp.ones((4, 2))}

    def run(params, x):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x @ params["first"], params["layers"])
        return x @ params["last"]

    with pytest.raises(
        ValueError, match=r"'scan' cannot be followed: its input has the channels of 'first', along axis 1"
    ):
        mj.channel_graph(run, params, jnp.ones((2, 3)))
    graph = mj.channel_graph(run, params, jnp.ones((2, 3)), strict=False)
    assert graph.inputs == {"first": (0,), "layers": (), "last": (0,)}
    assert set(mj.input_moments(run, params, jnp.ones((2, 3)))) == {"first", "last"}


def test_a_kernel_that_other_leaves_scale_or_make_is_read_still():
    params = {"w": jnp.ones((3, 4)), "g": jnp.ones(4), "a": jnp.ones((4, 2)), "b": jnp.ones((2, 5))}

    def run(p, x):
        return jnp.tanh(x @ (p["w"] * p["g"][None])) @ (p["a"] @ p["b"])

    graph = mj.channel_graph(run, params, jnp.ones((2, 3)))
    assert graph.inputs["w"] == graph.inputs["a"] == (0,)
    assert graph.channel_groups["w"][1] == graph.channel_groups["g"][0] == graph.channel_groups["a"][0]


def test_a_kernel_that_is_divided_by_its_norm_is_read_still():
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    run = lambda p, u, x: jnp.tanh(x @ (p["w"] / (u @ p["w"] @ p["w"].T @ u.T))) @ p["v"]  # noqa: E731
    graph = mj.channel_graph(run, params, jnp.ones((1, 3)), jnp.ones((2, 3)))
    assert (0 in graph.summed_axes("w"), graph.inputs["v"]) == (True, (0,))
    assert graph.hidden == {graph.channel_groups["w"][1]}


def test_a_table_that_is_looked_up_and_multiplied_makes_channels():
    params = {"table": jnp.ones((7, 4)), "position": jnp.ones((2, 4))}
    run = lambda p, x: (p["table"][x] + p["position"]) @ p["table"].T  # noqa: E731
    graph = mj.channel_graph(run, params, jnp.zeros(2, jnp.int32))
    assert graph.inputs["table"] == ()
    assert graph.both["table"] == (1,)
    assert graph.hidden == {graph.channel_groups["table"][1]}
    assert graph.channel_groups["table"][1] == graph.channel_groups["position"][1]
    assert graph.channel_groups["table"][1] in graph.consumed


@pytest.mark.parametrize(
    ("operation", "change"),
    {
        "cumsum": lambda h: jnp.cumsum(h, 1),
        "sort": lambda h: jnp.sort(h, 1),
        "pad": lambda h: jnp.pad(h, ((0, 0), (1, 0)))[:, :-1],
        "rev": lambda h: h[:, ::-1],
        "slice": lambda h: jnp.pad(h[:, :3], ((0, 0), (0, 1))),
        "split": lambda h: sum(jnp.split(h, [1], 1)).repeat(2, 1)[:, :4],
        "gather": lambda h: h[:, jnp.array([3, 2, 1, 0])],
        "scatter": lambda h: h.at[:, jnp.array([1, 3])].set(0.0),
        "dynamic_update_slice": lambda h: jax.lax.dynamic_update_slice(h, jnp.ones((2, 2)), (0, 0)),
        "concatenate": lambda h: jnp.concatenate([h, jnp.ones((2, 1))], 1)[:, :4],
        "reshape": lambda h: (h[:, :, None] * jnp.ones((1, 1, 3))).reshape(2, 3, 4).sum(1),
        "reduce_window_max": lambda h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "SAME"),
        "scan": lambda h: jax.lax.scan(lambda h, _: (2 * h, None), h, length=2)[0],
        "while": lambda h: jax.lax.while_loop(lambda h: h.sum() < 0, lambda h: h, h),
        "cond": lambda h: jax.lax.cond(h.sum() < 0, lambda h: h, lambda h: -h, h),
        "fft": lambda h: jnp.fft.fft(h, axis=1).real,
    }.items(),
)
def test_channels_that_cannot_be_followed_are_refused_by_operation_and_leaf(operation, change):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    run = lambda p, x: change(x @ p["a"]) @ p["b"]  # noqa: E731
    match = (
        rf"operation '{operation}' cannot be followed: its input has the channels of 'a', along axis 1, .*strict=False"
    )
    with pytest.raises(ValueError, match=match):
        mj.channel_graph(run, params, jnp.ones((2, 3)))
    apart = mj.channel_graph(run, params, jnp.ones((2, 3)), strict=False)
    assert apart.channel_groups["a"][1] != apart.channel_groups["b"][0]
    assert apart.hidden == set()


@pytest.mark.parametrize(
    "change",
    [
        lambda h: jnp.cumsum(h, 0),
        lambda h: jnp.sort(h, 0),
        lambda h: jnp.pad(h, ((1, 0), (0, 0)))[:-1],
        lambda h: h[::-1],
        lambda h: jnp.concatenate([h[:1], h], 0),
        lambda h: sum(jnp.split(h, 2, 0)),
        lambda h: h[jnp.array([1, 0])],
        lambda h: h.at[0].set(h[1]),
        lambda h: jax.lax.dynamic_update_slice(h, h[:1], (0, 0)),
        lambda h: h.reshape(2, 1, 4).swapaxes(0, 1).reshape(-1, 4),
    ],
)
def test_what_changes_other_axes_keeps_channels(change):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    graph = mj.channel_graph(lambda p, x: change(x @ p["a"]) @ p["b"], params, jnp.ones((2, 3)))
    assert graph.channel_groups["a"][1] == graph.channel_groups["b"][0]
    assert graph.hidden == {"a:1"}


@pytest.mark.parametrize(
    "change",
    {
        "slice": lambda w: w[:, :4],
        "concatenate": lambda w: jnp.concatenate([w, w], 1)[:, :4],
        "sort": lambda w: jnp.sort(w, 1)[:, :4],
    }.values(),
)
def test_a_leaf_that_is_cut_before_it_makes_channels_is_refused(change):
    params = {"a": jnp.ones((3, 8)), "b": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=r"channels of 'a', along axis 1"):
        mj.channel_graph(lambda p, x: (x @ change(p["a"])) @ p["b"], params, jnp.ones((2, 3)))


def test_what_comes_from_outside_may_go_anywhere_before_a_leaf_reads_it():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    run = lambda p, x: jnp.tanh(jnp.sort(x, 1)[:, 1:] @ p["a"]) @ p["b"]  # noqa: E731
    graph = mj.channel_graph(run, params, jnp.ones((2, 4)))
    assert graph.hidden == {"a:1"}


@pytest.mark.parametrize(
    ("run", "hidden"),
    [
        (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w:1"}),  # An autoencoder gives back what it has read.
        (lambda p, x: x + jnp.tanh(x @ p["w"]) @ p["w"].T, {"w:1"}),
        (lambda p, x: jnp.tanh(x[:, :1] * p["g"][None] @ p["w"]) @ p["w"].T, {"g:0", "w:1"}),
    ],
)
def test_inputs_that_a_layer_reads_are_bound(run, hidden):
    params = {"w": jnp.ones((3, 4)), "g": jnp.ones(3)}
    assert mj.channel_graph(run, params, jnp.ones((2, 3))).hidden == hidden


def test_channels_of_a_head_are_within_it_and_tokens_are_bound():
    model, tokens = MODELS["distilbert"]
    graph = mj.channel_graph(reading(model), *variables_of(model, tokens), tokens)
    attention = "encoder/layer_0/attention"
    (_, heads, query_channels), (_, same, value_channels) = (
        graph.leaf_groups(f"{attention}/{name}/kernel") for name in ("query", "value")
    )
    assert heads == same
    assert query_channels != value_channels
    found = {group: around for group, around in graph.within.items() if "layer_0" in group}
    assert found == {query_channels: heads, value_channels: heads}
    assert graph.leaf_groups(f"{attention}/out/kernel")[:2] == (heads, value_channels)
    word = graph.channel_groups["encoder/embeddings/word/embedding"]
    assert word[0] not in graph.hidden
    assert word[1] in graph.hidden
    assert graph.channel_groups["classifier/kernel"][1] not in graph.hidden


@pytest.mark.parametrize(
    "run",
    [
        lambda p, x: jnp.einsum("bhd,hdo->bo", jnp.einsum("bi,ihd->bhd", x, p["a"]) * p["g"][None, None], p["b"]),
        lambda p, x: jnp.einsum("bd,hdo->bo", jnp.einsum("bi,ihd->bhd", x, p["a"]).sum(1), p["b"]) * p["g"].sum(),
        lambda p, x: jnp.einsum("bhd,bgd->bhg", *[jnp.einsum("bi,ihd->bhd", x, p["a"])] * 2).sum() * p["g"].sum(),
    ],
)
def test_channels_that_several_heads_share_are_within_none(run):
    params = {"a": jnp.ones((3, 2, 5)), "b": jnp.ones((2, 5, 4)), "g": jnp.ones(5)}
    assert "a:2" not in mj.channel_graph(run, params, jnp.ones((1, 3))).within


FORWARD = {
    **MODELS,
    "resnet50": (mj.models.resnet50(10), IMAGES),
    "mobilenet_half": (mj.models.mobilenet_v2_half(10), IMAGES),
    "mobilenet_paper": (mj.models.mobilenet_v2(10), IMAGES),
    "bert": (mj.models.TextClassifier(mj.models.small_bert(20, 1, separator=1), 3), TOKENS),
    "span": (mj.models.SpanExtractor(mj.models.small_bert(20, 1, separator=1)), TOKENS),
    "answers": (
        mj.models.VisualAnswerer(mj.models.tiny_vit(8, 2, 1), mj.models.small_bert(20, 1, separator=1), 5),
        (IMAGES, TOKENS),
    ),
    "retrieval": (
        mj.models.DualEncoder(mj.models.tiny_vit(8, 2, 1), mj.models.small_bert(20, 1, separator=1), 6),
        (IMAGES, TOKENS),
    ),
}


def primitives(jaxpr):
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for value in jax.tree.leaves(
            dict(eqn.params), is_leaf=lambda one: hasattr(one, "eqns") or hasattr(one, "jaxpr")
        ):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                found |= primitives(inner)
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name.startswith("mobilenet_") else name for name in FORWARD],
)
def test_each_primitive_of_our_models_is_known_and_each_model_can_be_followed(name):
    model, inputs = FORWARD[name]
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    params = variables.pop("params")
    variables.pop("intermediates", None)
    run = lambda params, state, *inputs: model.apply({"params": params, **state}, *inputs)  # noqa: E731
    assert primitives(jax.make_jaxpr(run)(params, variables, *inputs).jaxpr) <= FOLLOWED
    assert mj.channel_graph(run, params, variables, *inputs).hidden


def test_effects_and_barriers_are_passed():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4))}

    def run(p, x):
        h = x @ p["a"]
        jax.debug.print("{}", h.sum())
        h, b = jax.lax.optimization_barrier((h, p["b"]))
        return h @ b

    graph = mj.channel_graph(run, params, jnp.ones((2, 3)))
    assert graph.inputs == {"a": (0,), "b": (0,)}
    assert graph.channel_groups["a"][1] == graph.channel_groups["b"][0]


def test_an_unknown_leaf_is_refused_with_near_misses():
    graph = mj.channel_graph(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((3, 2))}, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"without a leaf 'kernal'.*kernel"):
        graph.leaf_groups("kernal")
