"""Alignment: what it writes, that a fit finds channels which carry all, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from merge_jax.transfers.alignment import fit
from merge_jax.transfers.alignment.aligned import free_memory

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8, 8, 1)), jnp.float32)
LARGE, SMALL = mj.models.small_resnet(10, num_stages=2), mj.models.small_resnet(10, num_stages=2, width=0.5)
EVERYTHING = {"**": "**"}


def start(model, seed):
    """Returns random parameters, of gains around 1, and statistics of mean 0 and variance 1."""
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    shapes, rng = variables.pop("params"), np.random.default_rng(seed)
    variables.pop("intermediates", None)

    def leaf(path, shape):
        size = 0.1 if len(shape) == 1 else np.prod(shape[:-1]) ** -0.5
        return jnp.asarray(path.endswith("scale") + size * rng.normal(size=shape), jnp.float32)

    params = mj.replace(shapes, {path: leaf(path, one.shape) for path, one in mj.flatten(shapes).items()})
    state = {path: jnp.full(one.shape, float(path.endswith("var"))) for path, one in mj.flatten(variables).items()}
    return params, mj.replace(variables, state)


@functools.cache
def reading(model):
    return jax.jit(lambda params, state, inputs: model.apply({"params": params, **state}, inputs))


@functools.cache
def variables_of(model):
    return start(model, (LARGE, SMALL).index(model))


@functools.cache
def channels_of(model):
    return mj.channel_graph(reading(model), *variables_of(model), IMAGES)


def aligned(source, target, routes=None):
    return mj.aligned_transfer(routes or EVERYTHING, channels_of(source), channels_of(target))


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["last"]["kernel"]


def perceptron(rng, hidden):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"first": {"kernel": normal(5, hidden), "bias": normal(hidden)}, "last": {"kernel": normal(hidden, 3)}}


def test_it_starts_as_weight_selection_with_one_choice_for_a_channel_group():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    merged = jax.jit(transfer.apply)(transfer.init(jax.random.key(0), source, target), source, target)
    even = source["stage2_0"]["conv1"]["kernel"][:, :, ::2, ::2]
    np.testing.assert_array_equal(merged["stage2_0"]["conv1"]["kernel"], even)
    np.testing.assert_array_equal(merged["stage2_0"]["norm1"]["scale"], source["stage2_0"]["norm1"]["scale"][::2])
    np.testing.assert_array_equal(merged["fc"]["kernel"], source["fc"]["kernel"][::2])
    np.testing.assert_array_equal(merged["fc"]["bias"], source["fc"]["bias"])


def test_of_equal_models_it_copies():
    (source, _), (target, _) = variables_of(LARGE), start(LARGE, 7)
    transfer = aligned(LARGE, LARGE)
    merged = jax.jit(transfer.apply)(transfer.init(jax.random.key(0), source, target), source, target)
    for path, leaf in mj.flatten(merged).items():
        np.testing.assert_array_equal(leaf, mj.flatten(source)[path])


@pytest.mark.parametrize("fitted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_wider_target_computes_what_the_source_does(fitted):
    (source, state), (target, wide_state) = variables_of(SMALL), variables_of(LARGE)
    transfer = aligned(SMALL, LARGE)
    adapter = transfer.init(jax.random.key(0), source, target)
    if fitted:
        adapter = jax.jit(transfer.fit)(mj.input_moments(reading(SMALL), source, state, IMAGES), source, target)
    wide = jax.jit(transfer.apply)(adapter, source, target)
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
    graphs = [mj.channel_graph(mlp, params, x) for params in (source, target)]
    transfer = mj.aligned_transfer(EVERYTHING, *graphs)
    moments = mj.input_moments(mlp, source, x)
    fitted = jax.jit(transfer.apply)(jax.jit(transfer.fit)(moments, source, target), source, target)
    even = jax.jit(transfer.apply)(transfer.init(jax.random.key(0), source, target), source, target)
    expected = mlp(source, x)
    size = float(jnp.sqrt(jnp.mean(jnp.square(expected))))
    assert float(jnp.sqrt(jnp.mean(jnp.square(mlp(fitted, x) - expected)))) < 2e-3 * size
    assert float(jnp.sqrt(jnp.mean(jnp.square(mlp(even, x) - expected)))) > 0.1 * size


def test_channels_may_be_chosen_by_magnitude_or_at_random():
    """By all leaves that a channel is tied in, and with what reads it reconstructed where there are moments."""
    rng = np.random.default_rng(0)
    source, target, x = perceptron(rng, 8), perceptron(rng, 3), jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)
    scale = jnp.asarray([1, 9, 1, 1, 1, 5, 1, 1], jnp.float32)
    source["first"]["kernel"] *= scale[None]
    source["last"]["kernel"] = source["last"]["kernel"].at[3].multiply(30.0)
    graphs = [mj.channel_graph(mlp, params, x) for params in (source, target)]

    def chosen(moments, **options):
        transfer = mj.aligned_transfer(EVERYTHING, *graphs, **options)
        written = transfer.apply(jax.jit(transfer.fit)(moments, source, target), source, target)
        found = [np.flatnonzero((row == np.asarray(source["first"]["kernel"]).T).all(axis=1))
                 for row in np.asarray(written["first"]["kernel"]).T]  # fmt: skip
        return np.concatenate(found).tolist(), written

    places, pruned = chosen({}, choice="magnitude")
    assert places == [3, 1, 5]
    np.testing.assert_allclose(pruned["last"]["kernel"], source["last"]["kernel"][np.array(places)], rtol=1e-6)
    again, solved = chosen(mj.input_moments(mlp, source, x), choice="magnitude")
    assert again == places
    assert np.any(solved["last"]["kernel"] != pruned["last"]["kernel"])
    assert chosen({}, choice="even")[0] == [0, 2, 5]
    drawn = {tuple(chosen({}, choice="random", key=jax.random.key(seed))[0]) for seed in range(4)}
    assert len(drawn) > 2
    assert all(len(set(one)) == 3 for one in drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choice": "largest"}, "unknown choice of channels 'largest'"),
        ({"choice": "random"}, "a key is for the random choice of channels, and needed there; the choice is 'random'"),
        ({"key": 0}, "the choice is 'moments'"),
    ],
)
def test_choices_of_channels_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        mj.aligned_transfer(EVERYTHING, channels_of(LARGE), channels_of(SMALL), **options)


@pytest.mark.slow
def test_a_fit_keeps_more_of_a_real_model_than_an_even_choice():
    (source, state), (target, small_state) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    moments = mj.input_moments(reading(LARGE), source, state, IMAGES)
    expected = reading(LARGE)(source, state, IMAGES)
    errors = []
    for adapter in (jax.jit(transfer.fit)(moments, source, target), transfer.init(jax.random.key(0), source, target)):
        outputs = reading(SMALL)(jax.jit(transfer.apply)(adapter, source, target), small_state, IMAGES)
        errors.append(float(jnp.mean(jnp.square(outputs - expected))))
    assert errors[0] < 0.5 * errors[1]


def test_without_moments_a_fit_is_the_start():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    fitted, started = transfer.fit({}, source, target), transfer.init(jax.random.key(0), source, target)
    jax.tree.map(np.testing.assert_array_equal, fitted, started)


def test_a_larger_window_has_the_sources_at_its_centre_and_a_smaller_its_centre():
    x = jnp.ones((1, 4, 4, 2))

    def channels_of(window):
        kernel = jnp.asarray(np.random.default_rng(window).normal(size=(window, window, 2, 3)), jnp.float32)
        params = {"conv": {"kernel": kernel}}

        def run(p, x):
            return jax.lax.conv_general_dilated(
                x, p["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        return params, mj.channel_graph(run, params, x)

    (three, of_three), (one, of_one) = channels_of(3), channels_of(1)
    grown = mj.aligned_transfer(EVERYTHING, of_one, of_three)
    larger = grown.apply(grown.init(jax.random.key(0), one, three), one, three)["conv"]["kernel"]
    np.testing.assert_array_equal(larger[1, 1], one["conv"]["kernel"][0, 0])
    assert float(jnp.abs(larger).sum()) == float(jnp.abs(larger[1, 1]).sum())
    shrunk = mj.aligned_transfer(EVERYTHING, of_three, of_one)
    smaller = shrunk.apply(shrunk.init(jax.random.key(0), three, one), three, one)["conv"]["kernel"]
    np.testing.assert_array_equal(smaller[0, 0], three["conv"]["kernel"][1, 1])


def test_a_target_group_made_of_two_source_groups_has_a_matrix_for_each():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    routes = {"stage1_0/conv1/kernel": "stage1_0/conv1/kernel", "stage1_0/conv2/kernel": "stage2_0/conv2/kernel"}
    transfer = aligned(LARGE, SMALL, routes)
    adapter = transfer.init(jax.random.key(0), source, target)
    assert adapter["outputs"].keys() == {"stage1_0/conv1/kernel:3", "stage1_0/conv1/kernel:2 from fc/kernel:0"}
    merged = jax.jit(transfer.apply)(adapter, source, target)
    np.testing.assert_array_equal(
        merged["stage1_0"]["conv2"]["kernel"], source["stage2_0"]["conv2"]["kernel"][:, :, ::4, ::4]
    )


@pytest.mark.slow
def test_a_joint_state_starts_from_the_fitted_adapter():
    (source, state), (target, small_state) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    adapter = jax.jit(transfer.fit)(mj.input_moments(reading(LARGE), source, state, IMAGES), source, target)
    task = mj.Task(mj.classification_loss(SMALL.apply), optax.sgd(0.0))
    parts = {"source_params": source, "target_params": target, "source_state": state, "target_state": small_state}
    joint = mj.init_joint_state(jax.random.key(0), None, task, transfer, adapter=adapter, **parts)
    step = mj.make_joint_step(None, task, transfer, stop=0.1, num_steps=10)
    batch = {"target": {"image": IMAGES, "label": jnp.arange(16) % 10}}
    joint, _ = jax.jit(step)(joint, batch)
    expected = jax.jit(transfer.apply)(adapter, source, target)
    jax.tree.map(np.testing.assert_array_equal, joint.target.params, expected)


def tied(params, x):
    table = params["table"]["embedding"]
    return (table[x] @ params["dense"]["kernel"]) @ table.T


def of_tied(seed, words, width):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"table": {"embedding": normal(words, width)}, "dense": {"kernel": normal(width, width)}}


@pytest.mark.parametrize("fitted", [False, True])
def test_an_embedding_that_is_the_last_layer_too_is_written_in_one_way(fitted):
    words = jnp.arange(11)
    graphs = {width: mj.channel_graph(tied, of_tied(0, 11, width), words) for width in (6, 10)}

    def new(source, target):
        sizes = [params["dense"]["kernel"].shape[0] for params in (source, target)]
        transfer = mj.aligned_transfer(EVERYTHING, *(graphs[size] for size in sizes))
        moments = mj.input_moments(tied, source, words) if fitted else {}
        adapter = jax.jit(transfer.fit)(moments, source, target)
        return adapter, jax.jit(transfer.apply)(adapter, source, target)

    narrow, wide = of_tied(0, 11, 6), of_tied(1, 11, 10)
    _, wider = new(narrow, wide)
    np.testing.assert_allclose(tied(wider, words), tied(narrow, words), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(wider["table"]["embedding"][:, 6:], 0.0)
    np.testing.assert_array_equal(wider["dense"]["kernel"][:6, 6:], wide["dense"]["kernel"][:6, 6:])
    adapter, narrower = new(wide, narrow)
    chosen = jnp.argmax(next(iter(adapter["outputs"].values())), 1)
    np.testing.assert_array_equal(narrower["table"]["embedding"], wide["table"]["embedding"][:, chosen])


def test_what_reads_channels_together_is_not_kept_by_a_wider_target():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)

    def off(change):
        """Returns how far a wider target is from its source, as a part of that."""

        def run(params, x):
            return change(x @ params["first"]["kernel"]) @ params["last"]["kernel"]

        rng, trees = np.random.default_rng(1), []
        for width in (4, 6):
            shapes = {"first": (3, width), "last": (width, 2)}
            trees.append(
                {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}
            )
        transfer = mj.aligned_transfer(EVERYTHING, *(mj.channel_graph(run, params, x) for params in trees))
        outputs = run(jax.jit(transfer.apply)(transfer.init(jax.random.key(0), *trees), *trees), x), run(trees[0], x)
        return float(jnp.abs(outputs[0] - outputs[1]).max() / jnp.abs(outputs[1]).max())

    assert off(jnp.tanh) < 1e-6
    assert off(lambda h: h / jnp.std(h, 1, keepdims=True)) > 0.05
    assert off(lambda h: jax.nn.softmax(h, 1)) > 0.05


def test_tokens_meet_one_by_one_without_a_matrix_of_the_vocabulary():
    def read(params, x):
        return jnp.tanh(params["word"]["embedding"][x]) @ params["last"]["kernel"]

    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    trees = [{"word": {"embedding": normal(3000, w)}, "last": {"kernel": normal(w, 3)}} for w in (32, 16)]
    path = "word/embedding"
    graphs = [mj.channel_graph(read, params, jnp.zeros((1, 8), jnp.int32)) for params in trees]
    transfer = mj.aligned_transfer({path: path}, *graphs)
    adapter = transfer.init(jax.random.key(0), *trees)
    assert {name: matrix.shape for name, matrix in mj.flatten(adapter).items()} == {
        f"outputs/{graphs[1].channel_groups[path][1]}": (16, 32)
    }
    table = mj.flatten(jax.jit(transfer.apply)(adapter, *trees))[path]
    np.testing.assert_array_equal(table, mj.flatten(trees[0])[path][:, ::2])
    (row,) = transfer.describe(*trees)
    assert row.parameters == 16 * 32


def test_other_numbers_of_tokens_positions_and_pixels_are_refused():
    def run(params, x):
        return (params["word"]["embedding"][x] + params["place"]["embedding"]) @ params["last"]["kernel"]

    def tree(words, places):
        return {
            "word": {"embedding": jnp.ones((words, 4))},
            "place": {"embedding": jnp.ones((places, 4))},
            "last": {"kernel": jnp.ones((4, 2))},
        }

    def channels_of(words, places):
        return mj.channel_graph(run, tree(words, places), jnp.zeros(places, jnp.int32))

    routes = {"word/embedding": "word/embedding"}
    few = "the target has 5 rows, the source 7, and no number says which belong together"
    refuse(routes, tree(7, 3), tree(5, 3), (channels_of(7, 3), channels_of(5, 3)), few)
    routes = {"place/embedding": "place/embedding"}
    refuse(routes, tree(7, 6), tree(7, 3), (channels_of(7, 6), channels_of(7, 3)), "has 3 rows, the source 6")
    trees = [{"first": {"kernel": jnp.ones((size, 4))}, "last": {"kernel": jnp.ones((4, 2))}} for size in (48, 16)]
    graphs = [
        mj.channel_graph(lambda p, x: x @ p["first"]["kernel"] @ p["last"]["kernel"], params, jnp.ones((1, size)))
        for params, size in zip(trees, (48, 16), strict=True)
    ]
    refuse(EVERYTHING, *trees, graphs, "'first/kernel' has 16 entries along axis 0.* 48 .*come from outside")


def test_positions_that_are_added_and_attended_to_are_no_channels():
    def run(params, x):
        x = x @ params["patch"]["kernel"] + params["place"]["kernel"]
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x))
        return jnp.einsum("bqk,bkd->bqd", weights, x) @ params["last"]["kernel"]

    trees = [
        {
            "patch": {"kernel": jnp.ones((3, 4))},
            "place": {"kernel": jnp.ones((1, n, 4))},
            "last": {"kernel": jnp.ones((4, 2))},
        }
        for n in (9, 4)
    ]
    graphs = [mj.channel_graph(run, params, jnp.ones((2, n, 3))) for params, n in zip(trees, (9, 4), strict=True)]
    spec = mj.MatrixSpec(rows=(2,), inputs=(1,), window=(0,))
    routes = [mj.Route("place/kernel", "place/kernel", target_spec=spec, source_spec=spec)]
    refuse(routes, *trees, graphs, "'place/kernel' has 4 entries along axis 1")


def test_an_adapter_of_more_than_half_of_the_free_memory_is_refused_by_name(monkeypatch):
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    needed = 4 * sum(row.parameters for row in transfer.describe(source, target))
    monkeypatch.setattr("merge_jax.transfers.alignment.aligned.free_memory", lambda: 2 * needed)
    transfer.init(jax.random.key(0), source, target)
    monkeypatch.setattr("merge_jax.transfers.alignment.aligned.free_memory", lambda: 2 * needed - 1)
    match = r"the adapter takes .* GB, more than half of the .*; its largest matrix is 'inputs/.*', of \(16, 32\)"
    with pytest.raises(ValueError, match=match):
        transfer.init(jax.random.key(0), source, target)
    with pytest.raises(ValueError, match=match):
        transfer.fit({}, source, target)
    assert transfer.describe(source, target)  # It tells the size all the same.


def test_free_memory_is_that_of_the_machine():
    assert 0 < free_memory() < 1e14


def refuse(routes, source, target, graphs, match):
    transfer = mj.aligned_transfer(routes, *graphs)
    with pytest.raises(ValueError, match=match):
        transfer.init(jax.random.key(0), source, target)


def test_labels_of_other_numbers_are_refused():
    x, rng = jnp.ones((2, 5)), np.random.default_rng(0)
    source = perceptron(rng, 4)
    target = {**perceptron(rng, 4), "last": {"kernel": jnp.ones((4, 7))}}
    graphs = [mj.channel_graph(mlp, params, x) for params in (source, target)]
    refuse(EVERYTHING, source, target, graphs, "'last/kernel' has 7 .*has 3 .*mj.fit_head.*Leave out the route")


def test_channel_graphs_of_other_models_are_refused():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    x = jnp.ones((2, 5))
    other = mj.channel_graph(mlp, perceptron(np.random.default_rng(0), 4), x)
    refuse(EVERYTHING, source, target, (other, channels_of(SMALL)), "graph is of a model without a leaf")
    flat = mj.channel_graph(lambda p, x: x @ p["fc"]["kernel"], {"fc": {"kernel": jnp.ones(5)}}, x)
    refuse({"fc/kernel": "fc/kernel"}, source, target, (flat, channels_of(SMALL)), "has 1 axes there, here 2")


def test_kernels_of_other_layouts_are_refused():
    x, square = jnp.ones((2, 4)), {"k": jnp.ones((4, 4))}
    graphs = (
        mj.channel_graph(lambda p, x: x @ p["k"].T, square, x),
        mj.channel_graph(lambda p, x: x @ p["k"], square, x),
    )
    refuse({"k": "k"}, square, square, graphs, "of other layouts: axis 0 is an input of the target's layer, and axis 0")


def test_leaves_of_other_ranks_and_joined_leaves_are_refused():
    (source, _), (target, _) = variables_of(LARGE), variables_of(SMALL)
    graphs = channels_of(LARGE), channels_of(SMALL)
    refuse({"fc/kernel": "fc/bias"}, source, target, graphs, r"2 axes of channels.*1: they cannot be paired")
    joined = {("stage1_0/conv1/kernel", "stage1_0/conv2/kernel"): "stage2_0/conv2/kernel"}
    refuse(joined, source, target, graphs, "joins several leaves")
    with pytest.raises(ValueError, match="the view 'attention'"):
        mj.aligned_transfer([mj.Route("a", "b", view="attention")], *graphs)


def test_an_adapter_or_moments_of_other_models_are_refused():
    (source, state), (target, _) = variables_of(LARGE), variables_of(SMALL)
    transfer = aligned(LARGE, SMALL)
    other = aligned(LARGE, LARGE).init(jax.random.key(0), source, source)
    with pytest.raises(ValueError, match=r"does not fit.*Expected \(16, 32\), got \(32, 32\)"):
        transfer.apply(other, source, target)
    few = aligned(LARGE, SMALL, {"fc/kernel": "fc/kernel"}).init(jax.random.key(0), source, target)
    with pytest.raises(ValueError, match="the adapter has no entry for"):
        transfer.apply(few, source, target)
    with pytest.raises(ValueError, match="the adapter has no entry for"):
        transfer.apply({}, source, target)
    moments = mj.input_moments(reading(LARGE), source, state, IMAGES)
    with pytest.raises(ValueError, match=r"must be \(16, 16\), got \(3, 3\)"):
        transfer.fit({**moments, "stage1_0/conv1/kernel": jnp.eye(3)}, source, target)
    with pytest.raises(ValueError, match=r"no such leaf or channel group.*did you mean 'fc/kernel'"):
        transfer.fit({f"params/{name}": one for name, one in moments.items()}, source, target)
    with pytest.raises(ValueError, match="by name, as of input_moments, got PjitFunction"):
        mj.transfers.align(EVERYTHING, channels_of(LARGE), channels_of(SMALL), source, target, reading(LARGE))


@pytest.mark.filterwarnings("error:scatter inputs have incompatible types")
def test_a_choice_of_channels_has_one_type_also_in_64_bits():
    with jax.enable_x64(True):
        jax.eval_shape(functools.partial(fit._choose, count=2), jnp.eye(3), jnp.ones(3))
