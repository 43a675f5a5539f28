"""One table of transfers, and what holds for each of them.

A row makes a transfer with options; every row gets every contract, but for those that a table names. Matrices have the
same few small shapes in all rows, so that most of what runs outside of jit is compiled once. An LPKA compiles for
seconds, so that each of its options stands in one row, which has several; combinators have an adapter that compiles
fast.
"""

import functools
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def attention(seed, width, heads, d):
    inputs = {name: {"kernel": normal(seed + i, width, heads, d)} for i, name in enumerate(("query", "key", "value"))}
    return {**inputs, "out": {"kernel": normal(seed + 3, heads, d, width)}}


# Every target kernel is a matrix 6x8, every source kernel one of 5x7, but for attention blocks.
def source_tree(seed):
    return {
        "dense": [{"kernel": normal(seed + i, 7, 5)} for i in range(3)],
        "conv": {"kernel": normal(seed + 10, 1, 7, 1, 5)},
        "attention": attention(seed + 20, 7, 3, 2),
        "steps": jnp.arange(3),
    }


SOURCE = source_tree(0)
TARGET = {
    "dense": [{"kernel": normal(100 + i, 8, 6), "bias": normal(110 + i, 6)} for i in range(2)],
    "conv": {"kernel": normal(120, 2, 2, 2, 6)},
    "attention": attention(130, 8, 2, 3),
    "norm": (normal(140, 8), normal(141, 8)),
    "count": jnp.arange(4),
}
DENSE = {"dense/0/kernel": "dense/0/kernel", "dense/1/kernel": "dense/2/kernel"}
ONE = {"dense/0/kernel": "dense/0/kernel"}
CONV = {"conv/kernel": "conv/kernel"}
ATTENTION = {"attention": "attention"}
OF_DENSE, OF_ONE, OF_CONV = tuple(DENSE), tuple(ONE), tuple(CONV)
OF_ATTENTION = tuple(f"attention/{name}/kernel" for name in ("query", "key", "value", "out"))
TINY = {"num_layers": 1, "num_heads": 1, "attentions": ("rows_rows",)}


class Mean(nn.Module):
    """A module of a user's own: the target plus a learned multiple of the source's mean."""

    @nn.compact
    def __call__(self, target, source, *, deterministic=True):
        return target + self.param("weight", nn.initializers.ones, ()) * jnp.mean(source)


@dataclass(frozen=True)
class Row:
    transfer: mj.Transfer
    routed: tuple[str, ...]
    random: bool = True
    source: Any = field(default_factory=lambda: SOURCE)


def channels_of(params, last):
    """Returns the channel graph of a residual block of two dense layers, behind one without a route."""
    first = {"first": jnp.ones((1, params["dense"][0]["kernel"].shape[0])), **params}

    def run(params, x):
        x = x @ params["first"]
        return x + jnp.tanh(x @ params["dense"][0]["kernel"]) @ params["dense"][last]["kernel"].T

    return mj.channel_graph(run, first, jnp.ones((1, 1)))


RAMP = optax.linear_schedule(0.25, 1.0, 4)


def lpka(routes, **options):
    return mj.lpka_transfer(routes, **TINY, **options)


generator = mj.parameter_generator_transfer
TABLE = {
    "lpka published form": lambda: Row(
        mj.lpka_transfer(DENSE, num_layers=1, num_heads=2, output="published"), OF_DENSE
    ),
    "lpka residual, shared, rank, bfloat16": lambda: Row(
        lpka(DENSE, output="residual", shared=True, rank=3, dtype=jnp.bfloat16), OF_DENSE
    ),
    "lpka warm, of a pattern and two shapes": lambda: Row(
        lpka({"dense/*/kernel": "dense/1/kernel", "norm/0": "dense/1/kernel"}, output="warm"), (*OF_DENSE, "norm/0")
    ),
    "lpka of several leaves, narrow, gate on a schedule, without norms and dropout": lambda: Row(
        lpka(
            {"dense/0/kernel": "dense/*/kernel"},
            **{"max_width": 4, "max_hidden": 3, "gate": RAMP},
            **{"spectral": False, "attention_dropout": 0.0, "feed_forward_dropout": 0.0},
        ),
        OF_ONE,
        random=False,
    ),
    "lpka convolution, gate fixed, in chunks": lambda: Row(
        lpka(CONV, view="convolution", gate=0.5, output="residual", max_scores=30), OF_CONV
    ),
    "lpka attention": lambda: Row(lpka(ATTENTION, view="attention", output="published"), OF_ATTENTION),
    "lpka published": lambda: Row(mj.published_transfer(ONE, num_layers=1, num_heads=1), OF_ONE),
    "mlp": lambda: Row(mj.mlp_transfer(ONE, num_layers=1, width=8), OF_ONE),
    "a module of one's own": lambda: Row(
        mj.adapter_transfer(DENSE, Mean(), output="published"), OF_DENSE, random=False
    ),
    "share": lambda: Row(mj.share_transfer({**DENSE, **CONV}), (*OF_DENSE, *OF_CONV), random=False),
    "share attention": lambda: Row(mj.share_transfer(ATTENTION, view="attention"), OF_ATTENTION, random=False),
    "weight selection": lambda: Row(
        mj.weight_selection_transfer({**DENSE, **CONV}), (*OF_DENSE, *OF_CONV), random=False
    ),
    "linear operators": lambda: Row(
        mj.linear_operator_transfer({**DENSE, **CONV}), (*OF_DENSE, *OF_CONV), random=False
    ),
    "linear operators shared": lambda: Row(
        mj.linear_operator_transfer(DENSE, start="selection", shared=True), OF_DENSE, random=False
    ),
    "parameter generator": lambda: Row(mj.parameter_generator_transfer(DENSE), OF_DENSE),
    "parameter generator of several leaves": lambda: Row(
        mj.parameter_generator_transfer({"dense/0/kernel": "dense/*/kernel"}, output="warm"), OF_ONE
    ),
    # Vectors and a convolution too; at a regularisation at which no plan is a permutation.
    "optimal transport": lambda: Row(
        mj.optimal_transport_transfer({**ONE, "norm/0": "dense/1/kernel", **CONV}, regularisation=0.2),
        (*OF_ONE, "norm/0", *OF_CONV),
        random=False,
    ),
    "aligned": lambda: Row(
        mj.aligned_transfer(DENSE, channels_of(SOURCE, 2), channels_of(TARGET, 1)), OF_DENSE, random=False
    ),
    "identity": lambda: Row(mj.identity_transfer(), (), random=False),
    "chain": lambda: Row(mj.chain(mj.share_transfer(CONV), generator(ONE)), (*OF_ONE, *OF_CONV)),
    "scheduled": lambda: Row(mj.scheduled(generator(ONE, output="published"), RAMP), OF_ONE),
    "several sources": lambda: Row(
        mj.several_sources({"a": generator(ONE), "b": mj.share_transfer(DENSE)}),
        OF_DENSE,
        source={"a": SOURCE, "b": source_tree(50)},
    ),
    "without source": lambda: Row(mj.without_source(generator(ONE, output="residual")), OF_ONE, random=False),
    "self": lambda: Row(mj.self_transfer(generator({"dense/0/kernel": "dense/1/kernel"})), OF_ONE),
    "replayed": lambda: Row(
        mj.replayed(generator(ONE), mj.training.replay_evenly(2, 3)),
        OF_ONE,
        source=jax.tree.map(lambda *leaves: jnp.stack(leaves), SOURCE, source_tree(50)),
    ),
}
# Without jit an LPKA is hundreds of programs: one row of it is run so.
IN_CHUNKS = "lpka convolution, gate fixed, in chunks"
WITHOUT_JIT = [name for name in TABLE if not name.startswith("lpka") or name == IN_CHUNKS]
# One of each factory and of each kind of combinator is quick.
SLOW_WITHOUT_JIT = ["optimal transport", "mlp", "without source", "replayed", "scheduled", "self"]
SLOW_SIDE_BY_SIDE = ["lpka attention", "mlp", "parameter generator", "optimal transport", "chain", "replayed"]


def slow(names, *slow_ones):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow_ones else name for name in names]


# Of each kind of transfer and of combinator that can hold a seed's numbers apart, one.
SIDE_BY_SIDE = [
    "lpka published",
    "lpka attention",
    "mlp",
    "weight selection",
    "linear operators",
    "parameter generator",
]
SIDE_BY_SIDE += ["optimal transport", "aligned", "chain", "several sources", "replayed"]

every_row = pytest.mark.parametrize("name", TABLE)
# Of an LPKA by its published form and of one by attention blocks, the golden files and sharing are quick.
compiled_row = pytest.mark.parametrize("name", slow(TABLE, "lpka published", "lpka attention"))


@functools.cache
def made(name):
    """Returns the row, its transfer's apply at step 2, and its adapter with open gates, so that all of it matters."""
    row = TABLE[name]()
    adapter = jax.jit(row.transfer.init)(jax.random.key(7), row.source, TARGET)
    leaves = {p: leaf + 0.5 if p.endswith("gate") else leaf for p, leaf in mj.flatten(adapter).items()}
    return row, functools.partial(row.transfer.apply, step=2), mj.replace(adapter, leaves)


@functools.cache
def compiled(name):
    """Returns `(adapter, source, target) -> (merged, gradients of adapter and target)`, and how often it is traced."""
    row, apply, _ = made(name)
    traces = []

    @jax.jit
    def run(adapter, source, target):
        traces.append(name)
        floats = {path: leaf for path, leaf in mj.flatten(target).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}

        def loss(adapter, floats):
            merged = apply(adapter, source, mj.replace(target, floats))
            leaves = mj.select(merged, row.routed).values()
            # Squares against noise, since the plain sum of a normalised row is a constant.
            return sum(jnp.sum((leaf - normal(i, *leaf.shape)) ** 2) for i, leaf in enumerate(leaves)), merged

        (_, merged), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(adapter, floats)
        return merged, *gradients

    # A loss of no leaf is the integer 0, which has no gradient.
    return run if row.routed else None, traces


def test_every_public_factory_of_a_transfer_has_a_row():
    functions = {name: getattr(mj, name) for name in mj.__all__ if inspect.isfunction(getattr(mj, name))}
    returned = {name: inspect.signature(function).return_annotation for name, function in functions.items()}
    factories = {name for name, kind in returned.items() if kind is mj.Transfer}
    text = Path(__file__).read_text()
    assert len(factories) >= 10
    assert {name for name in factories if f"mj.{name}(" in text} == factories


@every_row
def test_structure_and_dtypes_stay_and_leaves_that_take_no_part_are_the_same_arrays(name):
    row, apply, adapter = made(name)

    def compare(adapter, source, target):
        merged = apply(adapter, source, target)
        before, after = mj.flatten(target), mj.flatten(merged)
        same = {path for path in before if after[path] is before[path]}
        assert same == set(before) - set(row.routed)
        return merged

    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, TARGET)
    for target in (TARGET, half):
        merged = jax.eval_shape(compare, adapter, row.source, target)
        chex.assert_trees_all_equal_shapes_and_dtypes(merged, target)


@compiled_row
def test_it_is_traced_once(name):
    row, _, adapter = made(name)
    run, traces = compiled(name)
    if run is not None:
        run(adapter, row.source, TARGET)
        run(adapter, row.source, jax.tree.map(lambda x: x + 1, TARGET))
        assert len(traces) == 1


@pytest.mark.parametrize("name", slow(WITHOUT_JIT, IN_CHUNKS, *SLOW_WITHOUT_JIT))
def test_jit_equals_no_jit(name):
    row, apply, adapter = made(name)
    run, _ = compiled(name)
    if run is not None:
        merged, *_ = run(adapter, row.source, TARGET)
        chex.assert_trees_all_close(merged, apply(adapter, row.source, TARGET), atol=1e-5)


@compiled_row
def test_gradients_reach_every_adapter_parameter_and_no_other_leaf(name):
    row, _, adapter = made(name)
    run, _ = compiled(name)
    if run is None:
        assert adapter == {}
        return
    _, of_adapter, of_target = run(adapter, row.source, TARGET)
    for path, leaf in mj.flatten(of_adapter).items():
        assert np.isfinite(leaf).all(), path
        # Softmax is blind to a shift of all keys; kernels that read zeros get no gradient.
        assert path.endswith("/key/bias") or name == "without source" or np.abs(leaf).max() > 0, path
    for path, leaf in of_target.items():
        assert np.isfinite(leaf).all(), path
        assert path in row.routed or not leaf.any(), path


@compiled_row
@pytest.mark.parametrize("value", [0.0, 1.0, 1e15, 1e-20])
def test_constant_and_extreme_values_stay_finite(name, value):
    row, _, adapter = made(name)
    run, _ = compiled(name)
    if run is None:
        return
    source, target = (jax.tree.map(lambda x: jnp.full(x.shape, value).astype(x.dtype), t) for t in (row.source, TARGET))
    merged, of_adapter, of_target = run(adapter, source, target)
    # The loss squares what it gets, so at 1e15 its gradients are large; they are no more than that.
    for leaf in jax.tree.leaves((merged, of_adapter, of_target)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", slow(SIDE_BY_SIDE, *SLOW_SIDE_BY_SIDE))
def test_seeds_side_by_side_are_those_alone_and_a_key_decides_all(name):
    row, apply, _ = made(name)

    def of_seed(key):
        adapter = row.transfer.init(key, row.source, TARGET)
        # A gate of 0 would hide the rest.
        opened = {p: leaf + 0.5 for p, leaf in mj.flatten(adapter).items() if p.endswith("gate")}
        merged = apply(mj.replace(adapter, opened), row.source, TARGET, key=key)
        return mj.select(merged, row.routed)

    first, second = keys = jax.random.split(jax.random.key(3), 2)
    # One program for all: what is beside a seed changes nothing of what it gives.
    together = jax.jit(jax.vmap(of_seed))
    mapped, again, twice = (together(jnp.stack(pair)) for pair in (keys, keys, (second, second)))
    chex.assert_trees_all_equal(mapped, again)
    tolerance = 0.05 if "bfloat16" in name else 1e-5
    for leaf, of_second in zip(*map(jax.tree.leaves, (mapped, twice)), strict=True):
        np.testing.assert_allclose(leaf[1], of_second[0], atol=tolerance)
    if name in WITHOUT_JIT:
        alone = jax.jit(of_seed)(first)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], mapped), alone, atol=tolerance)
    if row.random:
        assert any((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(mapped))


@every_row
def test_a_description_names_every_routed_leaf_and_counts_the_adapter(name):
    row, _, adapter = made(name)
    rows = row.transfer.describe(row.source, TARGET)
    assert {path for one in rows for path in one.target.split(" + ")} == set(row.routed)
    assert sum(one.parameters for one in rows) == sum(leaf.size for leaf in jax.tree.leaves(adapter))
    for one in rows:
        assert not one.adapter or any(path.startswith(one.adapter + "/") for path in mj.flatten(adapter))
        assert (one.flops > 0) == (one.parameters > 1 or one.adapter != "") or "own" in name or "transport" in name
