"""The LPKA's functions: parameters, masks, chunks, layers in a loop, and matrices padded with zeros."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import merge_jax as mj
from merge_jax.transfers.adapters import lpka, matrix_layers
from merge_jax.transfers.adapters.lpka import LPKAOptions, attention_widths
from merge_jax.transfers.network import Dropout, Place, Sizes, draw_mask, draw_masks

SIZES = Sizes(6, 8, 5, 7)
SMALL = LPKAOptions(num_layers=1, num_heads=2)


init = jax.jit(lpka.init, static_argnums=(1, 2))
apply = jax.jit(lpka.apply, static_argnames="options")


def matrices(sizes, seed=0):
    random = np.random.default_rng(seed)
    return (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in (sizes[:2], sizes[2:]))


@functools.cache
def made(sizes, options, seed=0):
    """Returns parameters of an LPKA whose norms are not the identity either."""
    params = init(jax.random.key(seed), sizes, options)
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(random.normal(size=leaf.shape) * 0.1), params)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 0.999999])
def test_the_mask_keeps_as_many_as_the_rate_says(rate):
    kept = np.asarray(draw_mask(jax.random.key(0), (3, 101, 333), rate))
    expected = 1 - min(round(rate * 2**16), 2**16 - 1) / 2**16
    deviation = (expected * (1 - expected) / kept.size) ** 0.5
    assert abs(kept.mean() - expected) <= 4 * deviation


def test_neighbours_in_the_mask_are_independent():
    # Two entries come from one random word, so neighbours are where a fault would show.
    kept = np.asarray(draw_mask(jax.random.key(0), (1000, 1000), 0.5)).ravel() - 0.5
    for distance in (1, 2, 3):
        correlation = 4 * np.mean(kept[:-distance] * kept[distance:])
        assert abs(correlation) < 4 / kept.size**0.5
    assert not np.array_equal(kept[::2], kept[1::2])


def test_masks_of_one_draw_are_independent():
    specs = {"a": Dropout((2, 500), 0.5), "b": Dropout((2, 500), 0.5), "c": Dropout((3, 500), 0.5, whole=False)}
    masks = draw_masks(jax.random.key(0), specs)
    assert masks["c"].shape == (3,)  # Keys, one a layer.
    drawn = [*masks["a"], *masks["b"], *(draw_mask(key, (500,), 0.5) for key in masks["c"])]
    signs = np.array([np.asarray(mask, np.float32) - 0.5 for mask in drawn])
    correlations = 4 * signs @ signs.T / 500
    np.testing.assert_allclose(correlations, np.eye(len(drawn)), atol=5 / 500**0.5)


def test_initial_values_are_those_of_torch():
    """Uniform in +-1/sqrt(fan in), of each attention on its own; norms are the identity."""
    sizes = Sizes(160, 240, 100, 320)
    params = init(jax.random.key(0), sizes, LPKAOptions(max_width=None))
    widths = attention_widths(sizes, LPKAOptions(max_width=None))
    start = 0
    for i, name in enumerate(("rows_rows", "rows_cols")):
        out = params["target_rows"]["out"]
        for leaf in (out["kernel"][:, start : start + widths[name]], out["bias"][:, i]):
            bound = widths[name] ** -0.5
            assert 0.98 * bound < np.abs(leaf).max() <= bound
        np.testing.assert_allclose(out["kernel"].std(), bound / 3**0.5, rtol=0.2)
        start += widths[name]
    for side, fan_in in (("target_rows", 240), ("target_cols", 160)):
        assert 0.99 * fan_in**-0.5 < np.abs(params[side]["query"]["kernel"]).max() <= fan_in**-0.5
        np.testing.assert_array_equal(params[side]["norm"]["scale"], 1)
        np.testing.assert_array_equal(params[side]["norm"]["bias"], 0)
    for side, fan_in in (("source_rows", 320), ("source_cols", 100)):
        assert 0.99 * fan_in**-0.5 < np.abs(params[side]["key_value"]["kernel"]).max() <= fan_in**-0.5


def test_there_are_about_twenty_arrays_however_many_layers():
    for layers in (1, 4):
        options = LPKAOptions(num_layers=layers, num_heads=2)
        leaves = jax.tree.leaves(jax.eval_shape(lambda key, o=options: lpka.init(key, SIZES, o), jax.random.key(0)))
        assert len(leaves) == 22
        assert {leaf.shape[0] for leaf in leaves} == {layers}


@pytest.mark.slow
def test_layers_in_a_loop_are_layers_one_after_the_other():
    options = LPKAOptions(num_layers=3, num_heads=2)
    params, (target, source) = made(SIZES, options), matrices(SIZES)
    masks = jax.jit(lambda key: draw_masks(key, lpka._masks(SIZES, options)))(jax.random.key(1))
    expected = target
    for i in range(3):
        of_layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i : i + 1], (params, masks))
        expected = apply(of_layer[0], expected, source, of_layer[1], options=SMALL)
    np.testing.assert_allclose(apply(params, target, source, masks, options=options), expected, atol=1e-5)


@pytest.mark.parametrize("sizes", [SIZES, pytest.param(Sizes(300, 5, 7, 260), marks=pytest.mark.slow)])
def test_chunks_change_no_value_without_dropout(sizes):
    """Of two attentions that run as one, and of some that run apart."""
    params, (target, source) = made(sizes, SMALL), matrices(sizes)
    few = LPKAOptions(num_layers=1, num_heads=2, max_scores=40)
    whole, chunked = (apply(params, target, source, options=options) for options in (SMALL, few))
    np.testing.assert_allclose(chunked, whole, atol=1e-5)


def test_dropout_leaves_the_mean_of_attention_as_it_is():
    shapes = ((1, 2, 2, 4), (1, 64, 2, 4))
    queries, keys = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    options = LPKAOptions(attention_dropout=0.3)

    def mixed(mask):
        return lpka._attend(queries, keys, keys, mask, None, options)

    masks = draw_mask(jax.random.key(2), (4000, 1, 2, 2, 64), 0.3)
    dropped = jax.vmap(mixed)(masks)
    error = dropped.std(axis=0) / dropped.shape[0] ** 0.5
    assert np.all(error > 0)
    assert np.all(np.abs(dropped.mean(axis=0) - mixed(None)) < 5 * error)


def test_the_flax_module_is_the_function():
    module, (target, source) = mj.LPKA(SMALL), matrices(SIZES)
    variables = jax.jit(module.init)(jax.random.key(3), target, source)
    expected = jax.eval_shape(lambda key: lpka.init(key, SIZES, SMALL), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(variables["params"], expected)
    new = jax.jit(module.apply)(variables, target, source)
    np.testing.assert_array_equal(new, apply(variables["params"], target, source, options=SMALL))
    with_dropout = jax.jit(functools.partial(module.apply, deterministic=False))
    dropped = with_dropout(variables, target, source, rngs={"dropout": jax.random.key(0)})
    assert np.abs(dropped - new).max() > 1e-3
    with pytest.raises(Exception, match="shape"):
        module.apply(variables, target[:, :5], source)


def embedded(params, true, padded, options):
    """Returns the parameters of true matrices among zeros, head by head: written apart from what draws them."""
    heads = options.num_heads
    narrow, wide = attention_widths(true, options), attention_widths(padded, options)

    def at(features, parts):
        """Returns the places of parts `[(true width, padded width), ...]` of an axis, in heads where they are ones."""
        places, start = [], 0
        for width, new, in_heads in parts:
            blocks = heads if in_heads else 1
            for head in range(blocks):
                places += [start + head * (new // blocks) + j for j in range(width // blocks)]
            start += new
        assert len(places) == features
        return np.array(places), start

    def put(leaf, *axes):
        new = np.zeros((*leaf.shape[: leaf.ndim - len(axes)], *(size for _, size in axes)), np.float32)
        new[(..., *np.ix_(*(places for places, _ in axes)))] = leaf
        return jnp.asarray(new)

    def plain(old, new):
        return at(old, [(old, new, False)])

    new = {}
    for tokens, features in (("rows", (true.n, padded.n)), ("cols", (true.m, padded.m))):
        names = [name for name in narrow if name.startswith(f"{tokens}_")]
        width = at(sum(narrow[a] for a in names), [(narrow[a], wide[a], True) for a in names])
        of, each = params[f"target_{tokens}"], plain(len(names), len(names))
        new[f"target_{tokens}"] = {
            "query": {
                "kernel": put(of["query"]["kernel"], plain(*features), width),
                "bias": put(of["query"]["bias"], width),
            },
            "out": {
                "kernel": put(of["out"]["kernel"], width, plain(*features)),
                "bias": put(of["out"]["bias"], each, plain(*features)),
            },
            "norm": {name: put(leaf, each, plain(*features)) for name, leaf in of["norm"].items()},
        }
    for tokens, features in (("rows", (true.q, padded.q)), ("cols", (true.p, padded.p))):
        names = [name for name in narrow if name.endswith(f"_{tokens}") for _ in range(2)]
        width = at(sum(narrow[a] for a in names), [(narrow[a], wide[a], True) for a in names])
        of = params[f"source_{tokens}"]["key_value"]
        new[f"source_{tokens}"] = {
            "key_value": {"kernel": put(of["kernel"], plain(*features), width), "bias": put(of["bias"], width)}
        }
    of, n, f = params["feed_forward"], plain(true.n, padded.n), plain(2 * true.n, 2 * padded.n)
    new["feed_forward"] = {
        "up": {"kernel": put(of["up"]["kernel"], n, f), "bias": put(of["up"]["bias"], f)},
        "down": {"kernel": put(of["down"]["kernel"], f, n), "bias": put(of["down"]["bias"], n)},
        "norm": {name: put(leaf, n) for name, leaf in of["norm"].items()},
    }
    return new


def kernels(sizes, seed):
    """Returns a source and a target with one dense kernel for each sizes."""
    trees = {}, {}
    for i, one in enumerate(sizes):
        target, source = matrices(one, seed + i)
        trees[0][f"layer_{i}"], trees[1][f"layer_{i}"] = {"kernel": source.T}, {"kernel": target.T}
    return trees


edges = st.integers(1, 12)
wide_edges = st.one_of(edges, st.sampled_from([130, 150]))  # From 128 on, heads widen with the matrices.


class Double:
    """`jax.numpy` with double precision where a module asks for single, as norms and softmax do."""

    float32 = jnp.float64

    def __getattr__(self, name):
        return getattr(jnp, name)


# A case compiles four programs; shrinking one that fails would compile hundreds.
@pytest.mark.slow
@settings(max_examples=2, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.lists(st.builds(Sizes, edges, edges, wide_edges, wide_edges), min_size=2, max_size=2, unique=True),
    *(st.sampled_from([1, 2]), st.sampled_from(["published", "warm"]), st.integers(0, 100)),
)
def test_any_routes_padded_to_one_program_are_the_routes_apart(sizes, num_layers, output, seed):
    # Several layers, and the norm of a few numbers that are nearly the same, make more of float32's rounding.
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        for module in (lpka, matrix_layers):
            patch.setattr(module, "jnp", Double())
        check_padded(sizes, num_layers, output, seed, jnp.float64)


def test_routes_padded_to_one_program_are_the_routes_apart():
    check_padded([Sizes(6, 8, 5, 130), Sizes(4, 3, 9, 7)], 1, "warm", 0, gradients=False)


@pytest.mark.slow
def test_so_are_their_gradients():
    check_padded([Sizes(6, 8, 5, 130), Sizes(4, 3, 9, 7)], 1, "warm", 0)


def check_padded(sizes, num_layers, output, seed, dtype=jnp.float32, gradients=True):
    """Outputs, and gradients in the parameters and both models, to rounding; nothing reaches the zeros around."""
    options = {"num_layers": num_layers, "num_heads": 2, "dtype": dtype}
    routes = {f"layer_{i}/kernel": f"layer_{i}/kernel" for i in range(len(sizes))}
    trees = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), kernels(sizes, seed))
    together, apart = (mj.lpka_transfer(routes, output=output, padding=p, **options) for p in (1e9, 1.0))
    own = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), jax.jit(apart.init)(jax.random.key(1), *trees))
    assert len(own) == len(sizes)
    padded = Sizes(*map(max, zip(*sizes, strict=True)))

    def joined(adapter):
        parts = []
        for path, true in zip(routes, sizes, strict=True):
            params = adapter[path] if output == "published" else adapter[path]["proposal"]
            params = embedded(params, true, padded, LPKAOptions(**options))
            parts.append(params if output == "published" else {"gate": adapter[path]["gate"], "proposal": params})
        return {next(iter(routes)): jax.tree.map(lambda *leaves: np.stack(leaves), *parts)}

    def merged_and_gradients(transfer, adapter):
        merged, pullback = jax.vjp(transfer.apply, adapter, *trees)
        return merged, pullback(jax.tree.map(jnp.sin, merged))

    def rounding(tree):  # Sums over other lengths round otherwise.
        return 2e-5 * max(1.0, *(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree)))

    shapes = jax.eval_shape(together.init, jax.random.key(1), *trees)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, joined(own))
    if not gradients:
        merged, expected = jax.jit(together.apply)(joined(own), *trees), jax.jit(apart.apply)(own, *trees)
        chex.assert_trees_all_close(merged, expected, atol=rounding(expected))
        return
    expected, (of_own, *of_trees) = jax.jit(functools.partial(merged_and_gradients, apart))(own)
    merged, (of_joined, *of_trees_joined) = jax.jit(functools.partial(merged_and_gradients, together))(joined(own))

    chex.assert_trees_all_close(merged, expected, atol=rounding(expected))
    wanted = joined(of_own), of_trees
    chex.assert_trees_all_close((of_joined, of_trees_joined), wanted, atol=rounding((of_own, of_trees)))


def test_initial_values_of_padded_matrices_are_zero_outside_of_the_true_ones():
    true, padded = (Sizes(6, 8, 5, 130), Sizes(4, 3, 9, 7)), Sizes(6, 8, 9, 150)
    options = LPKAOptions(num_heads=2)
    place = {"routes": Place(padded, true, True)}
    network = mj.transfers.lpka_network(options)
    ((_, drawn),) = jax.jit(lambda key: network.init(key, place))(jax.random.key(0)).items()
    drawn = jax.device_get(drawn)
    for i, sizes in enumerate(true):
        shapes = jax.eval_shape(lambda key, sizes=sizes: lpka.init(key, sizes, options), jax.random.key(0))
        ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
        inside = embedded(ones, sizes, padded, options)
        for path, leaf in mj.flatten(drawn).items():
            if path.endswith("norm/scale"):
                continue  # 1 everywhere: what it scales is 0 there.
            outside = np.asarray(mj.flatten(inside)[path]) == 0
            assert not np.asarray(leaf[i])[outside].any(), path
            assert path.endswith("norm/bias") or np.asarray(leaf[i])[~outside].all(), path


def test_large_unlike_matrices_stay_apart():
    sizes = (Sizes(300, 300, 300, 300), Sizes(40, 30, 50, 60), Sizes(280, 290, 300, 300), Sizes(30, 20, 20, 20))
    trees = kernels(sizes, 0)
    routes = {f"layer_{i}/kernel": f"layer_{i}/kernel" for i in range(len(sizes))}
    names = {
        padding: list(jax.eval_shape(mj.lpka_transfer(routes, padding=padding).init, jax.random.key(0), *trees))
        for padding in (1.0, 2.0, 1e9)
    }
    assert names == {
        1.0: [f"layer_{i}/kernel" for i in range(4)],
        2.0: ["layer_0/kernel", "layer_1/kernel"],
        1e9: ["layer_0/kernel"],
    }


@pytest.mark.parametrize("padding", [0.5, "2", True, float("nan")])
def test_a_bad_padding_is_refused(padding):
    with pytest.raises(ValueError, match="padding must be a number of at least 1, got"):
        mj.lpka_transfer({"a": "a"}, padding=padding)


def test_a_description_counts_what_is_learned_and_no_padding():
    sizes = (Sizes(6, 8, 5, 7), Sizes(4, 3, 9, 7))
    trees = kernels(sizes, 0)
    routes = {f"layer_{i}/kernel": f"layer_{i}/kernel" for i in range(2)}
    together, apart = (mj.lpka_transfer(routes, padding=padding) for padding in (2.0, 1.0))
    own = jax.eval_shape(apart.init, jax.random.key(0), *trees)
    padded = jax.eval_shape(together.init, jax.random.key(0), *trees)
    count = [sum(leaf.size for leaf in jax.tree.leaves(adapter)) for adapter in (own, padded)]
    assert count[0] < count[1]
    for transfer in (together, apart):
        assert sum(row.parameters for row in transfer.describe(*trees)) == count[0]
