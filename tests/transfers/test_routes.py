import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.transfers.pairing import resolve, survey
from merge_jax.transfers.routes import as_routes
from merge_jax.transfers.views import proportional


def tree(layers, width=4, kernels=("query", "key")):
    kernel = jnp.ones((width, width))
    return {
        "embed": {"embedding": jnp.ones((9, width))},
        **{f"layer_{i}": {"attention": {name: {"kernel": kernel} for name in kernels},
                          "mlp": {"kernel": kernel}} for i in range(layers)},
        "fc": {"kernel": jnp.ones((width, 3)), "bias": jnp.ones(3)},
    }  # fmt: skip


def pairs(routes, source, target, **options):
    return [(*route.target, *route.source) for route in resolve(as_routes(routes), source, target, **options)]


def test_a_pattern_of_the_target_takes_one_leaf_of_the_source():
    assert pairs({"*/mlp/kernel": "fc/kernel"}, tree(1), tree(2)) == [
        ("layer_0/mlp/kernel", "fc/kernel"),
        ("layer_1/mlp/kernel", "fc/kernel"),
    ]


def test_patterns_of_as_many_leaves_are_paired_in_natural_order():
    routes = {"*/mlp/kernel": re.compile(r"layer_\d+/mlp/kernel")}
    found = pairs(routes, tree(12), tree(12))
    assert found == [(f"layer_{i}/mlp/kernel",) * 2 for i in range(12)]


def test_many_leaves_of_the_source_make_one_matrix():
    (route,) = resolve(as_routes({"fc/kernel": "*/mlp/kernel"}), tree(3), tree(1))
    assert route.source == tuple(f"layer_{i}/mlp/kernel" for i in range(3))
    assert route.source_view.matrix_shape == (12, 4)


def test_tuples_fuse_and_split_kernels():
    """Three kernels into a fused one and back: sharing copies all of it."""
    parts = {name: {"kernel": jnp.full((4, 2), float(i))} for i, name in enumerate("qkv")}
    fused = {"qkv": {"kernel": jnp.zeros((4, 6)) - 1}}
    names = tuple(f"{name}/kernel" for name in "qkv")
    together = mj.share_transfer({"qkv/kernel": names}).apply({}, parts, fused)
    np.testing.assert_array_equal(together["qkv"]["kernel"], np.repeat([[0.0, 1, 2]], 4, 0).repeat(2, 1))
    zeros = jax.tree.map(jnp.zeros_like, parts)
    apart = mj.share_transfer({names: "qkv/kernel"}).apply({}, together, zeros)
    np.testing.assert_array_equal(apart["k"]["kernel"], 1)
    np.testing.assert_array_equal(apart["v"]["kernel"], 2)


def test_match_pairs_layers_in_proportion_and_kinds_with_their_like():
    pattern = "**/attention/*/kernel"
    found = mj.match(tree(12), tree(6), source=pattern, target=pattern)
    assert len(found) == 12
    assert list(found)[:2] == ["layer_0/attention/key/kernel", "layer_0/attention/query/kernel"]
    for i in range(6):
        assert found[f"layer_{i}/attention/query/kernel"] == f"layer_{2 * i + 1}/attention/query/kernel"


def test_match_ignores_the_name_of_an_only_kind_and_deepens():
    target = {f"block{i}": {"proj": {"w": jnp.ones((3, 3))}} for i in range(4)}
    found = mj.match(tree(2), target, source="*/mlp/kernel", target="*/proj/w")
    assert list(found.values()) == [f"layer_{i}/mlp/kernel" for i in (0, 0, 1, 1)]


@pytest.mark.parametrize(("count", "other"), [(1, 1), (1, 7), (7, 1), (5, 3), (3, 5), (6, 6)])
def test_proportional_partners_rise_and_stand_at_their_place(count, other):
    partners = proportional(count, other)
    assert len(partners) == count
    assert partners == sorted(partners)
    for i, j in enumerate(partners):
        assert j / other <= (i + 0.5) / count < (j + 1) / other
    assert count != other or partners == list(range(count))


def test_match_refuses_a_kind_that_the_source_has_not():
    target = tree(2, kernels=("query", "value"))
    pattern = "**/attention/*/kernel"
    with pytest.raises(ValueError, match=r"kind 'attention/value/kernel', the source has none: did you mean"):
        mj.match(tree(2), target, source=pattern, target=pattern)


def attention(width, heads, d):
    kernels = {name: {"kernel": jnp.ones((width, heads, d))} for name in ("query", "key", "value")}
    return {**kernels, "out": {"kernel": jnp.ones((heads, d, width))}}


def test_blocks_of_attention_are_found_and_matched():
    source = {f"layer_{i}": {"attention": attention(8, 2, 4)} for i in range(4)}
    target = {f"layer_{i}": {"self": attention(6, 3, 2)} for i in range(2)}
    found = mj.match(source, target, source="*/attention", target="*/self", view="attention")
    assert found == {"layer_0/self": "layer_1/attention", "layer_1/self": "layer_3/attention"}
    routes = resolve(as_routes(found), source, target, view="attention")
    assert [route.target_view.matrix_shape for route in routes] == [(8, 6), (8, 6)]
    assert routes[1].source[3] == "layer_3/attention/out/kernel"


def test_attention_of_torch_has_its_heads_named():
    names = ("q", "k", "v", "o")
    source = {name: {"weight": jnp.arange(32.0).reshape(8, 4) if name != "o" else jnp.ones((4, 8))} for name in names}
    paths = tuple(f"{name}/weight" for name in names)
    route = mj.Route("a", paths, view="attention", source_heads=2)
    (resolved,) = resolve(as_routes([route]), source, {"a": attention(4, 2, 4)})
    kernel = resolved.source_view.to_kernel([source[name]["weight"] for name in names])
    np.testing.assert_array_equal(kernel[1, 0], source["q"]["weight"][4:])
    merged = mj.share_transfer([route]).apply({}, source, {"a": attention(4, 2, 4)})
    np.testing.assert_array_equal(merged["a"]["query"]["kernel"].reshape(4, 8).T, source["q"]["weight"])


def test_heads_are_shared_in_proportion():
    source = {"a": jax.tree.map(lambda x: x, attention(4, 4, 2))}
    heads = jnp.arange(4.0)
    source["a"]["query"]["kernel"] = jnp.ones((4, 4, 2)) * heads[None, :, None]
    merged = mj.share_transfer({"a": "a"}, view="attention").apply({}, source, {"a": attention(4, 2, 2)})
    np.testing.assert_array_equal(merged["a"]["query"]["kernel"][0, :, 0], [1, 3])


def test_taps_of_a_window_are_tokens():
    kernel = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    (route,) = resolve(as_routes({"conv": "conv"}), {"conv": kernel}, {"conv": kernel}, view="convolution")
    view = route.target_view
    matrix = view.to_matrix(view.to_kernel([kernel]))
    assert matrix.shape == view.matrix_shape == (5 * 6, 4)
    types = view.token_types.by_row()
    for row, (output, tap) in enumerate((o, t) for o in range(5) for t in range(6)):
        assert types[row] == tap
        np.testing.assert_array_equal(matrix[row], kernel[tap // 3, tap % 3, :, output])
    np.testing.assert_array_equal(view.to_leaves(view.from_matrix(matrix))[0], kernel)


SOURCE, TARGET = tree(3), {**tree(2), "a": attention(6, 3, 2), "count": jnp.ones(3, jnp.int32)}


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (
            ("*/mpl/kernel", "fc/kernel"),
            r"target pattern '\*/mpl/kernel' matches no leaf; did you mean .*'layer_1/mlp/kernel'",
        ),
        (("fc/kernel", re.compile("fc/kernels")), r"source pattern 'fc/kernels' matches no leaf; .*did you mean"),
        (("fc/kernal", "fc/kernel"), "unknown target path 'fc/kernal'; did you mean 'fc/kernel'"),
        (
            ("*/mlp/kernel", "*/mlp/kernel"),
            r"the source leaf 'layer_2/mlp/kernel' has no partner of its path in the target \(match pairs .*'skip'",
        ),
        (
            ("*/mlp/kernel", re.compile("layer_./mlp/kernel")),
            r"'\*/mlp/kernel' names 2 leaves of the target \(layer_0/mlp.* names 3 of the source",
        ),
        (("coun*", "fc/kernel"), "target leaf 'count' must be a float array, got an array of int32"),
        (("fc/bias", ("fc/kernel", "fc/*")), "names the source leaf 'fc/kernel' twice"),
        (("fc/bias", ("fc/kernel", "layer_0/mlp/kernel", "embed/embedding", "fc/bias")), "the same inputs and window"),
        (mj.Route("fc/kernel", "fc/kernel", rank=4), r"'fc/kernel' is a matrix \[3, 4\], too small for the rank 4"),
        (("embed/embed*ing", "fc/kernel"), None),
        (("*kernel", "fc/kernel"), r"'\*' stays inside one part of a path, so try '\*\*/\*kernel'"),
        (("params/**", "fc/kernel"), r"paths here have no 'params/', so try '\*\*'"),
        ((re.compile("kernel"), "fc/kernel"), "a regular expression has to match whole paths; did you mean"),
        (mj.Route("fc/kernel", "fc/kernel", rank="whole"), None),
        (mj.Route("fc/kernel", "fc/kernel", rank=2, view="convolution"), "has a rank and the view 'convolution'"),
        (mj.Route("b", "fc", view="attention"), "unknown target path 'b/query/kernel'; did you mean"),
        (mj.Route("a", ("fc/kernel",) * 3, view="attention"), "got 3 of them"),
        (mj.Route("a", ("fc/kernel",) * 4, view="attention"), "cannot take part: its kernels have no axis of heads"),
        (mj.Route("a", "a", view="attention", target_heads=2), "2 heads are given, .* has 3"),
        (mj.Route("a", "a", mj.MatrixSpec((0,), (1, 2)), view="attention"), "it takes no spec"),
        (
            mj.Route("a", ("layer_0/mlp/kernel",) * 4, view="attention", source_heads=3),
            "3 heads do not divide the 4 features",
        ),
        (
            mj.Route("a", ("fc/kernel",) + ("layer_0/mlp/kernel",) * 3, view="attention", source_heads=1),
            r"must be matrices \[h d, w\], .*got \[3, 4\], \[4, 4\]",
        ),
    ],
)
def test_routes_that_do_not_fit_are_refused(route, message):
    if message is None:
        resolve(as_routes([route]), SOURCE, TARGET, rank=4 if isinstance(route, mj.Route) else None)
        return
    with pytest.raises(ValueError, match=message):
        resolve(as_routes([route]), {**SOURCE, "a": attention(6, 3, 2)}, TARGET)


def test_a_leaf_matched_twice_is_refused():
    routes = as_routes({"layer_0/mlp/kernel": "fc/kernel", "**/mlp/*": "embed/embedding"})
    message = "'layer_0/mlp/kernel' is routed twice, from 'fc/kernel' and from 'embed/embedding'"
    with pytest.raises(ValueError, match=message):
        resolve(routes, SOURCE, TARGET)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ([mj.Route("a", "b", rank=0)], "rank must be a whole number of at least 1, got 0"),
        ([mj.Route("a", "b", rank=True)], "rank must be a whole number of at least 1, got True"),
        ([mj.Route("a", "b", view="conv")], "unknown view 'conv'; did you mean 'convolution'"),
        ({"a": ()}, "a route is a pair"),
        (None, "routes are a mapping or a sequence of pairs, got None"),
        ("a/kernel", "routes are a mapping or a sequence of pairs, got 'a/kernel'"),
        ([3], "a route is a pair"),
        ({"a": ("b", 1)}, "a route is a pair"),
    ],
)
def test_bad_routes_are_refused_without_the_models(routes, message):
    with pytest.raises(ValueError, match=message):
        as_routes(routes)


class Variable:
    """As one of Keras: it has a shape and a dtype, and is no array."""

    shape, dtype = (3, 4), "float32"


def test_variables_in_a_list_are_refused_by_their_path():
    arrays, variables = {"fc": {"kernel": jnp.ones((3, 4))}}, [Variable()]
    message = r"the {} leaf '0' must be a float array, got Variable: give its numbers \(jnp\.asarray\)"
    with pytest.raises(ValueError, match=message.format("target")):
        mj.share_transfer({"0": "fc/kernel"}).apply({}, arrays, variables)
    with pytest.raises(ValueError, match=message.format("source")):
        mj.share_transfer({"fc/kernel": "0"}).apply({}, variables, arrays)


def test_one_pattern_on_both_sides_pairs_by_path_and_skips_what_has_no_partner():
    """In the order of paths `b` would get the source's `c`."""
    source = {"a": jnp.ones(2), "c": jnp.ones(2), "count": jnp.arange(3), "s": jnp.ones(())}
    target = {"a": jnp.zeros(2), "b": jnp.zeros(2), "count": jnp.arange(3), "s": jnp.zeros(())}
    merged = mj.share_transfer([mj.Route("**", "**", unmatched="skip")]).apply({}, source, target)
    np.testing.assert_array_equal(merged["a"], 1)
    assert all(merged[name] is target[name] for name in ("b", "count", "s"))
    with pytest.raises(
        ValueError, match=r"^the target leaf 'b' has no partner .*\(and 3 more\)\. .*unmatched='skip'\)"
    ):
        mj.share_transfer({"**": "**"}).apply({}, source, target)


def test_a_path_without_a_pattern_is_skipped_only_where_it_says_so():
    source, target = {"s": jnp.ones(()), "w": jnp.ones(2)}, {"s": jnp.zeros(()), "w": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"^the target leaf 's' cannot take part: .*rank of 1 or more and elements$"):
        survey(as_routes({"s": "s"}), source, target)
    with pytest.raises(ValueError, match=r"^nothing is left to pair: the target leaf 's' cannot take part"):
        resolve(as_routes([mj.Route("s", "s", unmatched="skip")]), source, target)
    assert pairs([mj.Route("s", "s", unmatched="skip"), mj.Route("w", "w")], source, target) == [("w", "w")]


def test_match_skips_what_cannot_be_paired_and_says_why():
    def layers(count, extra, words):
        block = {"kernel": jnp.ones((2, 2)), "step": jnp.arange(3), extra: jnp.ones(2)}
        return {**{f"layer_{i}": dict(block) for i in range(count)}, "word": {"embedding": jnp.ones((words, 2))}}

    source, target = layers(4, "old", 5), layers(2, "new", 6)
    with pytest.raises(ValueError, match=r"of the kind 'new', the source has none: .*unmatched='skip' leaves them out"):
        mj.match(source, target, source="**", target="**")
    found = mj.match(source, target, source="**", target="**", unmatched="skip")
    assert found == {"layer_0/kernel": "layer_1/kernel", "layer_1/kernel": "layer_3/kernel"}
    assert found.left_out.keys() == {
        "word/embedding",
        *(f"layer_{i}/{name}" for i in (0, 1) for name in ("step", "new")),
    }
    assert "must be a float array" in found.left_out["layer_0/step"]
    assert "Rows.by_name" in found.left_out["word/embedding"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "last"}, "rows must be a Rows, 'first' or None, got 'last'"),
        ({"rows": [0, 1]}, "rows must be a Rows, 'first' or None"),
        ({"unmatched": "drop"}, "unknown way with unmatched leaves 'drop'; there is 'error', 'skip'"),
    ],
)
def test_wrong_ways_to_pair_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        as_routes([mj.Route("a", "b", **options)])
