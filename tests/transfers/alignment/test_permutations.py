"""Alignment goes by what channels do: a source whose channels changed places gives the target the same function."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_jax as mj
from tests.helpers import jitted_init

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(48, 8, 8, 1)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(3, 20, size=(48, 6)), jnp.int32)
ENCODER = functools.partial(mj.models.TextEncoder, 20, max_length=8, separator=3)
VISION = functools.partial(mj.models.VisionTransformer, 8, 4)
TEXT = {2: ENCODER(16, 1, 4, 24), 1: ENCODER(8, 1, 2, 12)}
SEEN = {2: VISION(16, 1, 4, 24), 1: VISION(8, 1, 2, 12)}
# Each family of the library by size, 2 the source's and 1 the target's, and what it reads.
PAIRS = {
    "resnet": (lambda size: mj.models.small_resnet(3, 2, width=size / 2), (IMAGES,)),
    "bottleneck": (lambda size: mj.models.ResNet((mj.models.ResNetStage(4 * size, 1, 2),), 3, 8 * size), (IMAGES,)),
    "mobilenet": (
        lambda size: mj.models.MobileNetV2(
            (mj.models.InvertedResidualStage(2, 4 * size, 2, 1),), 3, stem_width=4 * size, head_width=8 * size
        ),
        (IMAGES,),
    ),
    "encoder": (TEXT.get, (TOKENS,)),
    "narrow heads": (lambda size: ENCODER(8 * size, 1, 2, 12 * size), (TOKENS,)),
    "one head": (lambda size: ENCODER(8 * size, 1, size**2, 12 * size), (TOKENS,)),
    "text": (lambda size: mj.models.TextClassifier(TEXT[size], 3), (TOKENS,)),
    "answers": (lambda size: mj.models.VisualAnswerer(SEEN[size], TEXT[size], 3, 1, 2), (IMAGES, TOKENS)),
    "retrieval": (lambda size: mj.models.DualEncoder(SEEN[size], TEXT[size], 6), (IMAGES, TOKENS)),
}
# A scalar is no matrix; a last layer of the target's own reads channels by their places.
ROUTES = {"retrieval": {"*/**": "*/**"}, "mobilenet": {"st*/**": "st*/**", "head*/**": "head*/**"}}


def params_of(model, seed, inputs):
    """Returns parameters, each entry other than the rest, and a state that is alike for all channels."""
    variables = dict(jitted_init(model, seed, *inputs))
    params, rng = variables.pop("params"), np.random.default_rng(seed)
    variables.pop("intermediates", None)
    start = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    return start, jax.tree.map(jnp.ones_like, variables)


def permuted(channels, params, seed):
    """Returns the parameters with hidden channels in another order, those of each head in their own."""
    leaves, rng, orders = dict(mj.flatten(params)), np.random.default_rng(seed), {}
    for path, leaf_groups in channels.channel_groups.items():
        for axis, group in enumerate(leaf_groups):
            if group in channels.hidden:
                size, around = leaves[path].shape[axis], channels.within.get(group)
                rows = leaves[path].shape[leaf_groups.index(around)] if around else 1
                orders.setdefault(group, np.stack([rng.permutation(size) for _ in range(rows)]))
    for path, leaf_groups in channels.channel_groups.items():
        leaf = np.asarray(leaves[path])
        for axis, group in sorted(enumerate(leaf_groups), key=lambda one: one[1] not in channels.within):
            if group in channels.within:  # First inside of the heads, then the heads.
                outer = leaf_groups.index(channels.within[group])
                rows = [
                    np.take(one, order, axis - (outer < axis))
                    for one, order in zip(np.moveaxis(leaf, outer, 0), orders[group], strict=True)
                ]
                leaf = np.moveaxis(np.stack(rows), 0, outer)
            elif group in orders:
                leaf = np.take(leaf, orders[group][0], axis)
        leaves[path] = jnp.asarray(leaf)
    return mj.replace(params, leaves)


def moved(run, variables, inputs, routes):
    """Returns by how much the source's outputs, and the written target's, change with the order of its channels."""
    graphs = [mj.channel_graph(one, *given, *inputs) for one, given in zip(run, variables, strict=True)]
    transfer = mj.aligned_transfer(routes, *graphs)
    (source, source_state), (target, target_state) = variables

    @jax.jit
    def outputs(params):
        moments = mj.input_moments(run[0], params, source_state, *inputs)
        written = transfer.apply(transfer.fit(moments, params, target), params, target)
        return run[0](params, source_state, *inputs), run[1](written, target_state, *inputs)

    results = [outputs(params) for params in (source, permuted(graphs[0], source, 0))]
    changes = jax.tree.map(lambda one, two: jnp.abs(one - two).max() / jnp.abs(one).max(), *results)
    return [max(map(float, jax.tree.leaves(of_model))) for of_model in changes]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_the_order_of_channels_and_heads_does_not_matter(name):
    make, inputs = PAIRS[name]
    models = [make(size) for size in (2, 1)]
    variables = [params_of(model, seed, inputs) for seed, model in enumerate(models)]
    run = [lambda p, s, *inputs, m=m: m.apply({"params": p, **s}, *inputs) for m in models]
    of_source, of_target = moved(run, variables, inputs, ROUTES.get(name, {"**": "**"}))
    assert of_source < 1e-4 or isinstance(models[0], mj.models.TextEncoder)  # Its outputs are channels.
    assert of_target < 1e-4


WIDTHS = (4, 6)
STEPS = st.one_of(
    st.tuples(st.just("dense"), st.integers(0, 9), st.sampled_from(WIDTHS)),
    st.tuples(st.sampled_from(["sum", "product", "together", "both"]), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.sampled_from(["turned", "rows", "parts"]), st.integers(0, 9), st.none()),
)


def graph(steps, scale):
    """Returns a random graph of small layers on `[B, 4, 3]`, its parameters, and what of it mixes channels."""
    rng, params, widths, mixed, program = np.random.default_rng(scale), {}, [], set(), []

    def kernel(name, rows, columns):
        params[name] = jnp.asarray(rng.normal(size=(rows, columns)) / np.sqrt(rows), jnp.float32)

    def add(step, *of, width):
        program.append((step, *of))
        widths.append(width)
        kernel(f"read{len(widths) - 1}", width // scale, 2)

    kernel("first", 3, WIDTHS[0] // scale)
    add("first", width=WIDTHS[0])
    for step, one, other in steps:
        one %= len(widths)
        if step == "dense":
            kernel(f"dense{len(widths)}", widths[one] // scale, other // scale)
            add(step, one, width=other)
        elif step in ("turned", "rows", "parts"):
            mixed.update({"reshape"} if step == "parts" else ())
            add(step, one, width=widths[one])
        elif widths[one] == widths[other % len(widths)] or step == "both":
            mixed.update({"concatenate"} if step == "both" else ())
            add(step, one, other % len(widths), width=widths[one] + widths[other % len(widths)] * (step == "both"))
            widths[-1] = widths[one] if step != "both" else widths[-1]

    def run(params, state, x):
        values = []
        for number, (step, *of) in enumerate(program):
            taken = [values[i] for i in of]
            values.append(
                {
                    "first": lambda _: jnp.tanh(x @ params["first"]),
                    "dense": lambda h, n=number: jnp.tanh(h[0] @ params[f"dense{n}"]),
                    "sum": lambda h: h[0] + h[1],
                    "product": lambda h: h[0] * h[1],
                    "together": lambda h: jnp.concatenate(h, 1)[:, 2:6],
                    "both": lambda h: jnp.concatenate(h, 2),
                    "turned": lambda h: h[0][:, ::-1],
                    "rows": lambda h: h[0].reshape(-1, 2, 2, h[0].shape[-1]).swapaxes(1, 2).reshape(h[0].shape),
                    "parts": lambda h: (
                        h[0].reshape(*h[0].shape[:2], -1, 1, h[0].shape[-1] // 2).sum(-2).reshape(h[0].shape)
                    ),
                }[step](taken)
            )
        return sum(value.mean(1) @ params[f"read{i}"] for i, value in enumerate(values))

    return run, params, mixed


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.lists(STEPS, max_size=4))
def test_random_graphs_are_followed_or_refused(steps):
    (of_source, source, mixed), (of_target, target, _) = graph(steps, 1), graph(steps, 2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(24, 4, 3)), jnp.float32)
    try:
        if mj.channel_graph(of_source, source, {}, x).factors:
            return  # Of merged axes, which test_merged_axes has.
        changes = moved([of_source, of_target], [(source, {}), (target, {})], (x,), {"**": "**"})
    except ValueError as error:
        if re.search(f"operation '({'|'.join(mixed)})' cannot be followed", str(error)) and mixed:
            return
        raise
    assert max(changes) < 1e-4


def test_units_of_a_tied_autoencoder_are_not_chosen_by_their_places():
    def run(params, state, x):
        return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["w"].T

    def tree(units):
        rng = np.random.default_rng(units)
        return {
            "w": jnp.asarray(rng.normal(size=(5, units)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=units), jnp.float32),
        }

    x = jnp.asarray(np.random.default_rng(0).normal(size=(24, 5)), jnp.float32)
    assert max(moved([run, run], [(tree(8), {}), (tree(4), {})], (x,), {"**": "**"})) < 1e-4
