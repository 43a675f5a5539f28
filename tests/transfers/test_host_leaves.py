"""A source whose leaves are mapped from shards is moved leaf by leaf, and to the same numbers."""

import json
import sys
import weakref
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import merge_jax as mj
from merge_jax.transfers.channels import graph
from merge_jax.transfers.fitted import walk
from merge_jax.transfers.host_leaves import on_device

WIDTH, SMALL, DEPTH = 96, 64, 3
LAYER = 4 * WIDTH * WIDTH
EVERYTHING = {"**": "**"}


def model(params, x):
    for i in range(DEPTH):
        x = jax.nn.relu(x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"][None])
    return x @ params["last"]["kernel"]


def draw(width, seed):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[0])  # noqa: E731
    sizes = [8, *[width] * DEPTH]
    layers = {f"layer_{i}": {"kernel": normal(*sizes[i : i + 2]), "bias": normal(width)} for i in range(DEPTH)}
    return {**layers, "last": {"kernel": normal(width, 3)}}


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """The source as it comes from two shards and their index."""
    folder = tmp_path_factory.mktemp("source")
    named = {path.replace("/", "."): leaf for path, leaf in mj.flatten(draw(WIDTH, 0)).items()}
    shards = {"a.safetensors": list(named)[::2], "b.safetensors": list(named)[1::2]}
    for file, names in shards.items():
        save_file({name: named[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return mj.load_weights(folder)


def live_bytes(work: Callable[[], object]) -> tuple[object, int]:
    """Returns what some work gives, and the most bytes that JAX's arrays had beyond those before it and at its end."""
    most = 0

    def look(frame, event, argument):
        nonlocal most
        if event == "return" and "merge_jax" in frame.f_code.co_filename:
            most = max(most, sum(array.nbytes for array in jax.live_arrays()))

    before = sum(array.nbytes for array in jax.live_arrays())
    sys.setprofile(look)
    try:
        made = work()
    finally:
        sys.setprofile(None)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(made) if isinstance(leaf, jax.Array))
    return made, most - before - kept


def transfers(source, target, inputs):
    graphs = mj.channel_graph(model, source, inputs), mj.channel_graph(model, target, inputs)
    return {
        "copies": mj.share_transfer(EVERYTHING),
        "selection": mj.weight_selection_transfer(EVERYTHING),
        "aligned": mj.aligned_transfer(EVERYTHING, *graphs),
    }


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("copies", "selection")), "aligned"]
)
def test_one_layer_is_on_the_device_at_a_time(mapped, name):
    target, inputs = jax.tree.map(jnp.asarray, draw(SMALL, 1)), jnp.ones((4, 8))
    transfer = transfers(mapped, target, inputs)[name]
    adapter = transfer.init(jax.random.key(0), mapped, target)
    merged, most = live_bytes(lambda: transfer.apply(adapter, mapped, target))
    assert most < 2 * LAYER
    expected = transfer.apply(adapter, jax.tree.map(jnp.asarray, mapped), target)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), merged, expected)


@pytest.mark.slow
def test_moments_are_taken_with_one_layer_on_the_device(mapped):
    inputs = jnp.asarray(np.random.default_rng(2).normal(size=(32, 8)), jnp.float32)
    moments, most = live_bytes(lambda: mj.input_moments(model, mapped, inputs))
    assert most < 2 * LAYER
    target = jax.tree.map(jnp.asarray, draw(SMALL, 1))
    transfer = transfers(mapped, target, inputs)["aligned"]
    fitted, most = live_bytes(lambda: transfer.fit(moments, mapped, target))
    assert most < 4 * LAYER  # Moments of a layer that are taken apart, and parts of it.
    expected = transfer.fit(moments, jax.tree.map(jnp.asarray, mapped), target)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), fitted, expected)


@pytest.fixture
def taken(monkeypatch):
    """Collects the shapes of the inputs whose moments are computed."""
    found, moments = [], graph._moments
    monkeypatch.setattr(graph, "_moments", lambda value, *axes: found.append(value.shape) or moments(value, *axes))
    return found


def test_an_alignment_that_writes_once_takes_the_moments_of_what_is_reduced(mapped, taken):
    inputs = jnp.asarray(np.random.default_rng(2).normal(size=(32, 8)), jnp.float32)
    target, narrow = draw(WIDTH, 1), draw(SMALL, 1)
    target["layer_1"] = {"kernel": target["layer_1"]["kernel"][:, :SMALL], "bias": narrow["layer_1"]["bias"]}
    target["layer_2"]["kernel"] = target["layer_2"]["kernel"][:SMALL]
    target = jax.tree.map(jnp.asarray, target)
    graphs = [mj.channel_graph(model, one, inputs) for one in (mapped, target)]
    moments = mj.transfers.layer_moments(model, mapped, inputs)
    merged, most = live_bytes(lambda: mj.transfers.align(EVERYTHING, *graphs, mapped, target, moments))
    assert taken == [(32, WIDTH)] * 2  # What layer_2 reads: for the choice, and for its map. Not the other three.
    assert most < 4 * LAYER  # The moments of one layer, and its matrices.
    transfer = mj.aligned_transfer(EVERYTHING, *graphs)
    expected = transfer.apply(transfer.fit(mj.input_moments(model, mapped, inputs), mapped, target), mapped, target)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), merged, expected)


@pytest.mark.slow
def test_a_refit_reads_the_source_layer_by_layer(mapped, monkeypatch, taken):
    """It gives back a source that the target has room for, and of the source's leaves those of one site are there."""
    alive, paths, most = [], set(), 0
    named = {leaf.tobytes(): path for path, leaf in mj.flatten(mapped).items()}

    def counted(tree):
        nonlocal most
        put = on_device(tree)
        for leaf, own in zip(jax.tree.leaves(tree), jax.tree.leaves(put), strict=True):
            if isinstance(leaf, np.ndarray) and leaf.tobytes() in named:
                alive.append(weakref.ref(own))
                paths.add(named[leaf.tobytes()])
        most = max(most, sum(one().nbytes for one in alive if one() is not None))
        return put

    monkeypatch.setattr(walk, "on_device", counted)
    inputs = jnp.asarray(np.random.default_rng(2).normal(size=(128, 8)), jnp.float32)
    start = jax.tree.map(lambda leaf: 0.5 * jnp.asarray(leaf) + 0.1, mapped)
    made, held = live_bytes(lambda: mj.refit(EVERYTHING, model, model, mapped, start, inputs, ridge=1e-5))
    assert not taken  # No channels are left out, so no moments are needed.
    # Activations at two depths of both models (5.3), a leaf, and a matrix: no other copy of the target's kernels (2).
    assert held < 7.5 * LAYER
    assert paths == set(named.values())
    assert most < 1.1 * LAYER
    wanted = jax.jit(model)(jax.tree.map(jnp.asarray, mapped), inputs)
    np.testing.assert_allclose(jax.jit(model)(made.variables, inputs), wanted, atol=2e-2 * float(jnp.std(wanted)))
