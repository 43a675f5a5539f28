"""Routes, ranks, heads and depths that are none are refused by one line."""

import re

import jax
import numpy as np

import merge_jax as mj
from merge_jax.transfers.pairing import resolve
from merge_jax.transfers.routes import Route, as_routes
from tests.bad_input import KERNEL, raises, refusals, refused


def _block(heads):
    shapes = {"query": (8, heads, 4), "key": (8, heads, 4), "value": (8, heads, 4), "out": (heads, 4, 8)}
    if heads is None:
        shapes = dict.fromkeys(shapes, (8, 8))
    return {name: {"kernel": np.ones(shape, np.float32)} for name, shape in shapes.items()}


TREE = {
    **KERNEL,
    "scalar": np.float32(1),
    "conv3d": np.ones((2, 2, 2, 3, 4), np.float32),
    "steps": np.ones((3, 3), np.int32),
    "mask": np.ones(3, bool),
    "nothing": np.ones((0, 3), np.float32),
    "attention": _block(2),
    "flat": _block(None),
    "odd": {name: {"kernel": np.ones((2,) * 5, np.float32)} for name in ("query", "key", "value", "out")},
}


def routes(given, **options):
    return raises(lambda _: resolve(as_routes(given), TREE, TREE, **options))


def route(target, source, **options):
    return routes([Route(target, source, **options)])


def lpka(**options):
    return raises(
        lambda _: mj.lpka_transfer({"fc/kernel": "fc/kernel"}, **options).init(jax.random.key(0), KERNEL, KERNEL)
    )


def layers(names):
    return {f"layer_{i}": {name: np.ones((2, 2), np.float32)} for i, name in enumerate(names)}


ROWS = {
    # Routes.
    "route: no pair": (
        refused("cross_structure", "--routes", "fc/kernel"),
        "a route must be target=source, such as fc/kernel=fc/kernel, got 'fc/kernel'",
    ),
    "route: unknown path": (
        routes({"fc/kernal": "fc/kernel"}),
        "unknown target path 'fc/kernal'; did you mean 'fc/kernel' or 'flat/out/kernel' or 'flat/key/kernel'?",
    ),
    "route: unknown source": (
        routes({"fc/kernel": "fc/kernl"}),
        "unknown source path 'fc/kernl'; did you mean 'fc/kernel' or 'flat/out/kernel' or 'flat/key/kernel'?",
    ),
    "route: unknown path in a run": (
        refused("cross_structure", "smoke", "--methods", "share", "--routes", "fc/kernal=fc/kernel"),
        "unknown target path 'fc/kernal'; did you mean 'fc/kernel' or 'stem/kernel' or 'head/kernel'?",
    ),
    "route: a module": (
        routes({"fc": "fc/kernel"}),
        re.compile("unknown target path 'fc'; there is 'attention/key/kernel', .*, 'fc/bias', 'fc/kernel', .*'steps'"),
    ),
    "route: no leaf matches": (
        routes({"x/*": "fc/kernel"}),
        re.compile("the target pattern 'x/\\*' matches no leaf; there is 'attention/key/kernel', .*"),
    ),
    "route: a star inside a part": (
        routes({"*kernel": "fc/kernel"}),
        "the target pattern '*kernel' matches no leaf; '*' stays inside one part of a path, so try '**/*kernel'",
    ),
    "route: part of a path": (
        routes({re.compile("kernel"): "fc/kernel"}),
        "the target pattern 'kernel' matches no leaf; a regular expression has to match whole paths; did you mean"
        " 'fc/kernel' or 'odd/out/kernel' or 'odd/key/kernel'?",
    ),
    "route: a glob that is none": (
        routes({"fc/[z-a]": "fc/kernel"}),
        "the pattern 'fc/[z-a]' cannot be read: bad character range z-a",
    ),
    "route: none": (routes({}), "no routes: give at least one pair of a target and a source path"),
    "route: none in a run": (
        refused("cross_structure", "--routes"),
        "no routes: give at least one pair of a target and a source path",
    ),
    "route: a word": (
        routes(["ab"]),
        "a route is a pair (target path, source path) of strings or patterns, got 'ab'",
    ),
    "route: a route of nothing": (
        route((), "fc/kernel"),
        "a route is a pair (target path, source path) of strings or patterns, got ((), 'fc/kernel')",
    ),
    "route: a route of None": (
        route("fc/kernel", None),
        "a route is a pair (target path, source path) of strings or patterns, got ('fc/kernel', None)",
    ),
    "route: doubled": (
        routes([("fc/kernel", "fc/kernel"), ("fc/kernel", "fc/bias")]),
        "the target path 'fc/kernel' is routed twice, from 'fc/kernel' and from 'fc/bias'",
    ),
    "route: doubled by a pattern": (
        routes([("fc/kernel", "fc/kernel"), ("fc/*", "fc/bias")]),
        "the target path 'fc/kernel' is routed twice, from 'fc/kernel' and from 'fc/bias'",
    ),
    "route: a scalar": (
        routes({"scalar": "fc/kernel"}),
        "the target leaf 'scalar' cannot take part: 'scalar' of shape () is not a matrix: it needs a rank of 1 or more "
        "and elements",
    ),
    "route: no elements": (
        routes({"fc/kernel": "nothing"}),
        "the source leaf 'nothing' cannot take part: 'nothing' of shape (0, 3) is not a matrix: it needs a rank of 1 or"
        " more"
        " and elements",
    ),
    "route: five axes for attention": (
        route("odd", "attention", view="attention"),
        "the target leaves 'odd/query/kernel + odd/key/kernel + odd/value/kernel + odd/out/kernel' cannot take part:"
        " 'odd/query/kernel' of shape (2, 2, 2, 2, 2) is not a kernel of an attention block",
    ),
    "route: five axes beside two": (
        route(("fc/kernel", "conv3d"), "fc/kernel"),
        "the target leaves 'fc/kernel + conv3d' cannot take part: leaves that make one matrix together need the same"
        " inputs"
        " and window, got (4, 3) and (2, 2, 2, 3, 4)",
    ),
    "route: integers": (
        routes({"steps": "fc/kernel"}),
        "the target leaf 'steps' must be a float array, got an array of int32",
    ),
    "route: from flags": (
        routes({"fc/kernel": "mask"}),
        "the source leaf 'mask' must be a float array, got an array of bool",
    ),
    "route: unequal numbers": (
        routes({"fc/*": "attention/*/kernel"}),
        "'fc/*' names 2 leaves of the target (fc/bias, fc/kernel), 'attention/*/kernel' names 4 of the source ("
        "attention/key/kernel, attention/out/kernel, attention/query/kernel, ...); a pairing needs as many, or one of"
        " the"
        " source (match pairs models of different depth)",
    ),
    "route: keys that collide": (
        raises(lambda _: resolve(as_routes({"a/b": "a/b"}), KERNEL, {"a": {"b": np.ones(2)}, "a.b": np.ones(2)})),
        "the paths 'a/b' and 'a.b' of the tree collide; rename one of the keys",
    ),
    # Transfers: rank, heads, depth.
    "rank 0": (lpka(rank=0), "rank must be a whole number of at least 1, got 0"),
    "rank of a route": (
        route("fc/kernel", "fc/kernel", rank=1.5),
        "rank must be a whole number of at least 1, got 1.5",
    ),
    "rank above the matrix": (
        lpka(rank=9),
        "the target leaf 'fc/kernel' is a matrix [3, 4], too small for the rank 9; its route may have a rank of its"
        " own,"
        " or rank='whole'",
    ),
    "heads that do not divide": (
        route("flat", "attention", view="attention", target_heads=3),
        "the target leaves 'flat/query/kernel + flat/key/kernel + flat/value/kernel + flat/out/kernel' cannot take"
        " part: 3"
        " heads do not divide the 8 features of the attention",
    ),
    "heads not told": (
        route("flat", "attention", view="attention"),
        "the target leaves 'flat/query/kernel + flat/key/kernel + flat/value/kernel + flat/out/kernel' cannot take"
        " part:"
        " its kernels have no axis of heads; give target_heads or source_heads",
    ),
    "heads of another number": (
        route("attention", "attention", view="attention", source_heads=4),
        "the source leaves 'attention/query/kernel + attention/key/kernel + attention/value/kernel +"
        " attention/out/kernel'"
        " cannot take part: 4 heads are given, 'attention/query/kernel' of shape (8, 2, 4) has 2",
    ),
    "heads of another type": (
        route("flat", "attention", view="attention", target_heads="2"),
        "target_heads must be a whole number of at least 1, got '2'",
    ),
    "a spec that is none": (
        route("fc/kernel", "fc/kernel", target_spec="rows"),
        "target_spec must be a MatrixSpec, got 'rows'",
    ),
    "depth: another kind": (
        raises(lambda _: mj.match(layers(["up", "down"]), layers(["up", "across"]), source="*/*", target="*/*")),
        "the target has leaves of the kind 'across', the source has none: there is 'up', 'down'. Where kinds have"
        " other names,"
        " match them one at a time; unmatched='skip' leaves them out",
    ),
    "a dropout that is none": (lpka(attention_dropout="0.1"), "attention_dropout must lie in [0, 1), got '0.1'"),
    "an output form": (lpka(output="warn"), "unknown output form 'warn'; did you mean 'warm'?"),
}


test_bad_input_is_refused_in_one_line_that_names_it = refusals(ROWS)
