"""One table of what is saved, one of how it is saved and read, and what holds for each of them."""

import functools
import gc
import itertools
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import merge_jax as mj
from benchmarks.damage import array_file, flip
from merge_jax.checkpoints import Checkpoints
from merge_jax.transfers import export_published_adapter, load_published_adapter
from tests import helpers

WHOLE = ("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32")
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
OF_JAX = (*WHOLE, *FLOAT8, "float16", "bfloat16", "float32", "complex64")


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array | None


class Layers(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))])


def filled(make, *arguments):
    """Returns what a function makes with random numbers in it: nothing is compiled for them."""

    def fill(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(7)
        random = np.random.default_rng(list(jax.tree_util.keystr(path).encode()))
        return jnp.asarray(random.normal(size=leaf.shape) * 100, leaf.dtype)

    return jax.tree.map_with_path(fill, jax.eval_shape(make, *arguments))


def joint_state(**options):
    return filled(lambda: helpers.initial_state(mj.linear_operator_transfer(helpers.ROUTES), **options))


def adapter(transfer):
    source, target = {"w": jnp.ones((5, 3))}, {"w": jnp.ones((4, 3)), "v": jnp.ones((2, 2))}
    return filled(transfer.init, jax.random.key(0), source, target)


def numbers(*names):
    """Returns a matrix of each dtype, and what is special of float32."""
    special = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    return {"special": special, **{name: np.array([[0, 1, 2], [1, 0, 1]]).astype(jnp.dtype(name)) for name in names}}


THINGS = {
    "joint state": joint_state,
    "joint state of a frozen source": lambda: joint_state(frozen=True),
    "train state": lambda: made("joint state").target,
    "adapter": lambda: adapter(mj.chain(mj.linear_operator_transfer({"w": "w"}), mj.mlp_transfer({"v": "w"}))),
    "published adapter": lambda: adapter(mj.published_transfer({"w": "w"}))["w"],
    "variables": lambda: filled(helpers.Tiny(400).init, jax.random.key(0), jnp.zeros((1, 6))),
    "state of NNX": lambda: nnx.state(Layers()),
    "lists and tuples": lambda: {
        "list": [np.arange(6, dtype=np.float32).reshape(2, 3).T, *(np.full(2, i, np.int32) for i in range(11))],
        "tuple": (jnp.float32(3), {"x": np.int32(2)}),
        "pair": Pair(jnp.ones(1), None),
    },
    "keys": lambda: {"one": jax.random.key(1), "two": jax.random.split(jax.random.key(2, impl="rbg"))},
    "numbers of JAX": lambda: jax.tree.map(jnp.asarray, numbers(*OF_JAX, "int4")),
    "numbers of NumPy": lambda: numbers(*OF_JAX, "int64", "uint64", "float64") | {"none": np.zeros((0, 3))},
}


@dataclass(frozen=True)
class Way:
    """How a thing is saved and read, and what is said of a leaf that does not fit, is not wanted, or is not there."""

    save: Callable
    read: Callable
    unlike: str = ""
    surplus: str = ""
    missing: str = ""


def save_step(place, thing):
    with Checkpoints(place) as checkpoints:
        checkpoints.save(1, {"thing": thing, "rest": jnp.ones(2)}, score=0.5)


def of_step(read):
    def opened(place, like):
        with Checkpoints(place, read_only=True) as checkpoints:
            return read(checkpoints, {"thing": like})["thing"]

    messages = "{0} is saved as {1}, wanted as {2}", "{0} is saved, but not wanted", "{0} is not saved"
    return Way(save_step, opened, *messages)


def of_file(save):
    messages = "{0} is {1}, the model's is {2}", "{0} is there, but not in the model", "{0} is missing"
    return Way(save, mj.load_params, *messages)


def first_of_trajectory(checkpoints, like):
    return jax.tree.map(lambda leaf: leaf[0], mj.load_trajectory(checkpoints, like).parts)


def read_published(place, like):
    with np.load(place) as arrays:
        found = load_published_adapter(dict(arrays))
    assert (found.num_layers, found.num_heads) == (2, 8)
    return found.params


def save_published(place, thing):
    with place.open("wb") as file:
        np.savez(file, **export_published_adapter(thing, prefix="layer."))


def save_by_library(place, thing):
    save_file({path.replace("/", "."): leaf for path, leaf in mj.flatten(thing).items()}, place)


REST = {"rest": jnp.zeros(2)}
WAYS = {
    "newest step": of_step(lambda checkpoints, like: checkpoints.restore_latest(like | REST)[1]),
    "best step": of_step(lambda checkpoints, like: checkpoints.restore_best(like | REST)[1]),
    "part of a step": of_step(lambda checkpoints, like: checkpoints.restore_parts(1, like)),
    "trajectory": of_step(first_of_trajectory),
    "all of a step": Way(save_step, of_step(lambda checkpoints, like: checkpoints.restore_arrays(1)).read),
    "file": of_file(mj.save_safetensors),
    "file of others": of_file(save_by_library),
    "published": Way(save_published, read_published),
}
CASES = [
    *(("newest step", thing) for thing in THINGS if thing not in ("published adapter", "numbers of NumPy")),
    *((way, "variables") for way in ("best step", "part of a step", "trajectory", "all of a step")),
    *(("file", thing) for thing in ("adapter", "variables", "lists and tuples", "numbers of NumPy")),
    ("file of others", "numbers of NumPy"),
    ("published", "published adapter"),
]
# An NNX variable whose value is a tree is not asked for.
FITTED = [(way, name) for way, name in CASES if WAYS[way].unlike and name != "state of NNX"]
OF_VARIABLES = [way for way, name in CASES if name == "variables"]


@functools.cache
def made(name):
    return THINGS[name]()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns where a thing is, saved once for all ways to read it."""

    @functools.cache
    def place_of(save, name):
        place = tmp_path_factory.mktemp("saved") / "place"
        save(place, made(name))
        for lock in place.glob("run.lock"):  # That of this process, which would hide that a reader takes it.
            lock.unlink()
        return place

    return lambda way, name: place_of(WAYS[way].save, name)


def contents(place):
    return {path: path.read_bytes() for path in (place, *place.rglob("*")) if path.is_file()}


def assert_same(found, expected):
    """Asserts that two trees are the same to the bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    others = mj.flatten(expected)
    for path, leaf in mj.flatten(found).items():
        assert leaf.dtype == others[path].dtype, path
        assert leaf.shape == others[path].shape, path
        one, other = (jax.random.key_data(x) if "key" in str(x.dtype) else x for x in (leaf, others[path]))
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), path


@pytest.mark.parametrize(("way", "name"), CASES)
def test_what_is_read_is_what_was_saved_and_reading_changes_nothing(way, name, saved):
    thing, place = made(name), saved(way, name)
    before = contents(place)
    for like in (thing, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), thing)):
        assert_same(WAYS[way].read(place, like), thing)
    assert contents(place) == before


@pytest.mark.parametrize(("way", "name"), FITTED)
def test_what_does_not_fit_is_refused_by_its_leaf(way, name, saved):
    *leaves, leaf = jax.tree.leaves(made(name))
    *_, path = mj.flatten(made(name))
    wider = jax.ShapeDtypeStruct((*leaf.shape, 1), leaf.dtype)
    other = jax.ShapeDtypeStruct(leaf.shape, jnp.int16 if leaf.dtype != jnp.int16 else jnp.int8)
    for last, message in (
        (wider, WAYS[way].unlike.format(path, ".*", ".*")),
        (other, WAYS[way].unlike.format(path, ".*", re.escape(f"{other.dtype}{list(other.shape)}"))),
        (None, WAYS[way].surplus.format(path)),
        ({"more": leaf}, WAYS[way].missing.format(f"{path}/more")),
    ):
        like = jax.tree.unflatten(jax.tree.structure(made(name)), [*leaves, last])
        with pytest.raises(ValueError, match=message):
            WAYS[way].read(saved(way, name), like)


@pytest.mark.parametrize("way", ["newest step", "file"])
def test_nothing_is_overwritten(way, saved):
    place = saved(way, "variables")
    before = contents(place)
    with pytest.raises(FileExistsError, match="already"):
        WAYS[way].save(place, jax.tree.map(lambda leaf: leaf + 1, made("variables")))
    assert {path: content for path, content in contents(place).items() if path.name != "run.lock"} == before


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


# Orbax leaves tasks behind when a file that it reads is damaged, and Python says so when it finds them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
def test_what_is_cut_short_or_has_changed_is_refused_in_every_way(saved, tmp_path):
    for way, spoil in itertools.product(OF_VARIABLES, (cut, flip)):
        place, copy = saved(way, "variables"), tmp_path / f"{way}, {spoil.__name__}"
        (shutil.copytree if place.is_dir() else shutil.copy)(place, copy)
        if copy.is_dir() or spoil is cut:  # A file has no digests.
            spoil(array_file(copy) if copy.is_dir() else copy)
            with pytest.raises(ValueError, match=r"damaged checkpoint in|is truncated or no safetensors"):
                WAYS[way].read(copy, made("variables"))
    gc.collect()
