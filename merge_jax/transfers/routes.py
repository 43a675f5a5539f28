"""Routes: which leaves of the target are made from which leaves of the source."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checks import check_at_least_one, check_choice
from merge_jax.layouts import MatrixSpec, matrix_spec
from merge_jax.paths import Pattern, find_paths, flatten, is_pattern, natural_order, near_misses
from merge_jax.transfers.rows import Rows, RowsByNumber, arranged_ends
from merge_jax.transfers.views import AttentionView, KernelView, View, ViewName, proportional
from merge_jax.types import Params

__all__ = [
    "Leaves",
    "LeftOut",
    "Matches",
    "ResolvedRoute",
    "Route",
    "Routes",
    "Unmatched",
    "as_routes",
    "check_rank",
    "check_view",
    "match",
    "resolve",
    "survey",
]

ATTENTION_KERNELS = ("query", "key", "value", "out")

Leaves = Pattern | tuple[Pattern, ...]
"""Leaves of one model: a path, a glob, a compiled regular expression, or a tuple of them."""

Unmatched = Literal["error", "skip"]
"""What becomes of leaves that cannot be paired: all is refused, or they are left out."""


@dataclass(frozen=True)
class Route:
    """One path of knowledge, or by patterns many: which target leaves are made from which source leaves.

    A pattern of the target names leaves that each get a transfer of their own. A pattern of the source must then
    name as many, which are paired in natural order (`match` pairs by depth where there are more on one side), or
    one, which all get. One and the same pattern on both sides, such as `**`, pairs leaves of one path where there are
    any. Where the target is one leaf, all leaves that the source's pattern names are put under each
    other as one matrix. So are, on both sides, the leaves of a tuple: `Route(("q/kernel", "k/kernel"), "qk/kernel")`
    splits a fused kernel. In the view `attention`, a name is that of a block with the kernels `query/kernel`,
    `key/kernel`, `value/kernel` and `out/kernel`, and a tuple is of the paths or patterns of these four. Head `i` of
    `h` then meets head `floor((i + 1/2) k / h)` of the source's `k`.

    Attributes:
      target: leaves in the target's parameters, e.g. `stage6_2/project/kernel`.
      source: leaves in the source's parameters, e.g. `fc/kernel`.
      target_spec: how each target leaf is a matrix; by default what `matrix_spec` says of its path and shape.
      source_spec: the same for source leaves.
      rank: the rank of the re-encoding, `whole` for none, or None for what the transfer has.
      view: what the adapter's tokens are, or None for the transfer's; see `ViewName`.
      target_heads: heads of the target's attention, where its kernels have no axis of heads.
      source_heads: the same for the source.
      rows: which row of an embedding, which pixel of a patch belongs to which, where both models have other numbers of
        them: a `Rows`, or `first` for row `i` from row `i`. None refuses such a route.
      unmatched: `skip` leaves out what the patterns name and what cannot be paired: no partner of the path, a scalar,
        integers, a layout that nothing tells, rows that differ in number. `error` refuses the route. `summarize` lists
        them either way.
    """

    target: Leaves
    source: Leaves
    target_spec: MatrixSpec | None = None
    source_spec: MatrixSpec | None = None
    rank: int | Literal["whole"] | None = None
    view: ViewName | None = None
    target_heads: int | None = None
    source_heads: int | None = None
    rows: Rows | RowsByNumber | None = None
    unmatched: Unmatched = "error"


Routes = Mapping[Any, Leaves] | Sequence[Route | tuple[Leaves, Leaves]]
"""Routes as `{target: source}`, or as a sequence of pairs in that order or of `Route`s."""


@dataclass(frozen=True)
class ResolvedRoute:
    """A route of two models: its leaves by path, and how they become matrices.

    Attributes:
      target: paths of the target's leaves.
      source: paths of the source's leaves.
      target_view: how the target's leaves become a matrix.
      source_view: how the source's leaves do.
      dtypes: of all leaves, the target's first.
      rank: of the re-encoding; None for whole matrices.
    """

    target: tuple[str, ...]
    source: tuple[str, ...]
    target_view: View
    source_view: View
    dtypes: tuple[str, ...]
    rank: int | None

    @property
    def signature(self) -> tuple[Any, ...]:
        """What routes have in common that are computed together."""
        return self.target_view, self.source_view, self.dtypes, self.rank


@dataclass(frozen=True)
class LeftOut:
    """What a route's patterns name and what cannot be paired.

    Attributes:
      target: paths of the target's leaves, joined with ` + `; empty where they are the source's alone.
      source: the same of the source's.
      reason: why, as the text of an error.
      route: whose patterns they are.
    """

    target: str
    source: str
    reason: str
    route: Route


def as_routes(routes: Routes) -> tuple[Route, ...]:
    """Returns the routes as such, checked as far as they can be without the models.

    Raises:
      ValueError: no routes, something that is no route, a target that is named twice, an unknown view, a rank or a
        number of heads below 1, or a spec that is none.
    """
    if not isinstance(routes, (Mapping, Sequence)) or isinstance(routes, str):
        raise ValueError(f"routes are a mapping or a sequence of pairs, got {routes!r}")
    pairs = list(routes.items()) if isinstance(routes, Mapping) else list(routes)
    if not pairs:
        raise ValueError("no routes: give at least one pair of a target and a source path")
    named = tuple(map(_as_route, pairs))
    sources: dict[Leaves, Leaves] = {}
    for route in named:
        if route.target in sources:
            raise _routed_twice(_text(route.target), _text(sources[route.target]), _text(route.source))
        sources[route.target] = route.source
        _check_options(route)
    return named


def _check_options(route: Route) -> None:
    if route.view is not None:
        check_view(route.view)
    if route.rank is not None and route.rank != "whole":
        check_rank(route.rank)
    heads = {"target_heads": route.target_heads, "source_heads": route.source_heads}
    check_at_least_one(**{name: number for name, number in heads.items() if number is not None})
    for name, spec in (("target_spec", route.target_spec), ("source_spec", route.source_spec)):
        if spec is not None and not isinstance(spec, MatrixSpec):
            raise ValueError(f"{name} must be a MatrixSpec, got {spec!r}")
    if route.rows is not None and route.rows != "first" and not isinstance(route.rows, Rows):
        raise ValueError(f"rows must be a Rows, 'first' or None, got {route.rows!r}")
    check_choice("way with unmatched leaves", route.unmatched, get_args(Unmatched))


def check_view(view: str) -> None:
    """Raises ValueError for an unknown view."""
    check_choice("view", view, get_args(ViewName))


def check_rank(rank: int) -> None:
    """Raises ValueError for a rank that fits no matrix."""
    check_at_least_one(rank=rank)


def _as_route(route: Any) -> Route:
    pair: Any = (route.target, route.source) if isinstance(route, Route) else route
    # A bare string is a sequence too; two of its letters would pass as a pair.
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(_are_leaves, pair)):
        raise ValueError(f"a route is a pair (target path, source path) of strings or patterns, got {pair!r}")
    return route if isinstance(route, Route) else Route(*pair)


def _are_leaves(leaves: Any) -> bool:
    if isinstance(leaves, tuple):
        return bool(leaves) and all(isinstance(leaf, (str, re.Pattern)) for leaf in leaves)
    return isinstance(leaves, (str, re.Pattern))


def _text(leaves: Leaves) -> str:
    if isinstance(leaves, tuple):
        return " + ".join(map(_text, leaves))
    return leaves if isinstance(leaves, str) else leaves.pattern


def _some(units: Sequence[tuple[str, ...]]) -> str:
    names = [_text(unit) for unit in units]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _routed_twice(target: str, source: str, other: str) -> ValueError:
    return ValueError(f"the target path {target!r} is routed twice, from {source!r} and from {other!r}")


def resolve(
    routes: Iterable[Route],
    source_params: Params,
    target_params: Params,
    *,
    rank: int | None = None,
    view: ViewName = "matrix",
) -> tuple[ResolvedRoute, ...]:
    """Returns one route for each target that the routes name in two models; `rank` and `view` are their defaults.

    Raises:
      ValueError: as `survey`; or leaves that cannot be paired and that their route does not skip, or no others.
    """
    resolved, left_out = survey(routes, source_params, target_params, rank=rank, view=view)
    refused = [one for one in left_out if one.route.unmatched == "error"]
    if refused:
        route, more = refused[0].route, f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(
            f"{refused[0].reason}{more}. To leave out what cannot be paired, give "
            f"Route({_text(route.target)!r}, {_text(route.source)!r}, unmatched='skip'); summarize lists it"
        )
    if not resolved:
        raise ValueError(f"nothing is left to pair: {left_out[0].reason}")
    return resolved


def survey(
    routes: Iterable[Route],
    source_params: Params,
    target_params: Params,
    *,
    rank: int | None = None,
    view: ViewName = "matrix",
) -> tuple[tuple[ResolvedRoute, ...], tuple[LeftOut, ...]]:
    """Returns the routes from leaf to leaf, and what of the leaves that patterns name cannot be paired, with reasons.

    Raises:
      ValueError: a path or pattern that names no leaf, unequal numbers of leaves to be paired in order, a leaf that is
        routed twice; of a route without a pattern or of joined leaves that does not skip: leaves that cannot be paired.
    """
    leaves = {"target": flatten(target_params), "source": flatten(source_params)}
    resolved: list[ResolvedRoute] = []
    left_out: list[LeftOut] = []
    for route in routes:
        of_route = route.view or view
        pairs, alone = _pairs(route, leaves, of_route)
        left_out += alone
        for target, source in pairs:
            try:
                resolved.append(_resolve_one(route, target, source, leaves, rank, of_route))
            except ValueError as error:
                if route.unmatched == "error" and not is_pattern(route.target):
                    raise
                left_out.append(LeftOut(_text(target), _text(source), str(error), route))
    sources_of: dict[str, str] = {}
    for one in resolved:
        for path in one.target:
            if path in sources_of:
                raise _routed_twice(path, sources_of[path], _text(one.source))
            sources_of[path] = _text(one.source)
    return tuple(resolved), tuple(left_out)


def _pairs(
    route: Route, leaves: Mapping[str, Mapping[str, Any]], view: ViewName
) -> tuple[list[tuple[tuple[str, ...], tuple[str, ...]]], list[LeftOut]]:
    """Returns the pairs of a route, of target and source, and what has no partner."""
    targets = _units("target", leaves["target"], route.target, view)
    sources = _units("source", leaves["source"], route.source, view)
    common = set(targets) & set(sources)
    if route.target == route.source and is_pattern(route.target) and common:
        alone = [
            LeftOut(
                _text(unit) if role == "target" else "",
                "" if role == "target" else _text(unit),
                f"the {role} leaf {_text(unit)!r} has no partner of its path in the {other} (match pairs models of "
                "different depth)",
                route,
            )
            for role, units, other in (("target", targets, "source"), ("source", sources, "target"))
            for unit in units
            if unit not in common
        ]
        return [(unit, unit) for unit in targets if unit in common], alone
    if len(sources) > 1 and len(targets) == 1 and view != "attention":
        sources = [tuple(path for unit in sources for path in unit)]
    if len(sources) == 1:
        sources = sources * len(targets)
    if len(sources) != len(targets):
        raise ValueError(
            f"{_text(route.target)!r} names {len(targets)} leaves of the target ({_some(targets)}), "
            f"{_text(route.source)!r} names {len(sources)} of the source ({_some(sources)}); a pairing needs "
            "as many, or one of the source (match pairs models of different depth)"
        )
    return list(zip(targets, sources, strict=True)), []


def _units(role: str, leaves: Mapping[str, Any], named: Leaves, view: ViewName) -> list[tuple[str, ...]]:
    """Returns the leaves that are named, as tuples of paths that each make one matrix."""
    if view == "attention":
        if isinstance(named, tuple):
            if len(named) != len(ATTENTION_KERNELS):
                raise ValueError(
                    f"an attention block of the {role} is the path of a block, or a tuple of the paths of the "
                    f"kernels of query, key, value and output; got {len(named)} of them"
                )
            patterns = list(named)
        else:
            patterns = [_extended(named, f"/{kernel}/kernel") for kernel in ATTENTION_KERNELS]
        found = [find_paths(leaves, pattern, role=role) for pattern in patterns]
        if len(set(map(len, found))) > 1:
            counts = ", ".join(f"{len(paths)} of {name}" for paths, name in zip(found, ATTENTION_KERNELS, strict=True))
            raise ValueError(f"{_text(named)!r} names unequal numbers of kernels of the {role}: {counts}")
        return list(zip(*found, strict=True))
    if isinstance(named, tuple):
        paths = tuple(path for pattern in named for path in find_paths(leaves, pattern, role=role))
        repeated = [path for path, count in Counter(paths).items() if count > 1]
        if repeated:
            raise ValueError(f"{_text(named)!r} names the {role} leaf {repeated[0]!r} twice")
        return [paths]
    return [(path,) for path in find_paths(leaves, named, role=role)]


def _extended(pattern: Pattern, suffix: str) -> Pattern:
    if isinstance(pattern, str):
        return pattern + suffix
    return re.compile(f"(?:{pattern.pattern}){re.escape(suffix)}", pattern.flags)


def _resolve_one(
    route: Route,
    target: tuple[str, ...],
    source: tuple[str, ...],
    leaves: Mapping[str, Mapping[str, Any]],
    rank: int | None,
    view: ViewName,
) -> ResolvedRoute:
    if route.rank is not None:
        rank = None if route.rank == "whole" else route.rank
    views: list[View] = []
    ends = []
    for role, paths, spec, heads in (
        ("target", target, route.target_spec, route.target_heads),
        ("source", source, route.source_spec, route.source_heads),
    ):
        arrays = [leaves[role][path] for path in paths]
        for path, array in zip(paths, arrays, strict=True):
            _check_float(role, path, array)
        shapes = tuple(tuple(array.shape) for array in arrays)
        try:
            if view == "attention":
                one = _attention_view(paths, shapes, spec, heads)
            else:
                specs = tuple(_spec(path, shape, spec) for path, shape in zip(paths, shapes, strict=True))
                one = KernelView(shapes, specs, taps=view == "convolution")
                ends.append(tuple(zip(paths, shapes, specs, strict=True)))
            one.check()
        except ValueError as error:
            noun = f"leaf {paths[0]!r}" if len(paths) == 1 else f"leaves {_text(paths)!r}"
            raise ValueError(f"the {role} {noun} cannot take part: {error}") from None
        views.append(one)
    target_view, source_view = views
    if isinstance(target_view, KernelView) and isinstance(source_view, KernelView):
        of_target, of_source = arranged_ends(route.rows, *ends)
        target_view = replace(target_view, arrangement=of_target)
        source_view = replace(source_view, arrangement=of_source)
    elif route.rows is not None:
        raise ValueError(f"the route to {_text(target)!r} has rows and the view 'attention', which pairs heads alone")
    if rank is not None:
        _check_rank_fits(rank, view, target, target_view)
    dtypes = tuple(str(leaves[role][path].dtype) for role, paths in
                   (("target", target), ("source", source)) for path in paths)  # fmt: skip
    return ResolvedRoute(target, source, target_view, source_view, dtypes, rank)


def _check_rank_fits(rank: int, view: ViewName, target: tuple[str, ...], target_view: View) -> None:
    if view != "matrix":
        raise ValueError(
            f"the route to {_text(target)!r} has a rank and the view {view!r}; a re-encoded matrix has other rows than "
            "the kinds that this view knows, so choose one of them"
        )
    if rank > min(target_view.matrix_shape):
        m, n = target_view.matrix_shape
        raise ValueError(
            f"the target leaf {_text(target)!r} is a matrix [{m}, {n}], too small for the rank {rank}; "
            "its route may have a rank of its own, or rank='whole'"
        )


def _spec(path: str, shape: tuple[int, ...], given: MatrixSpec | None) -> MatrixSpec:
    if given is None or not shape or 0 in shape:
        return matrix_spec(path, shape)  # Raises for what can be no matrix, whatever is given.
    given.check(shape)
    return given


def _attention_view(
    paths: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], given: MatrixSpec | None, heads: int | None
) -> AttentionView:
    if given is not None:
        raise ValueError("the view 'attention' knows its matrices; it takes no spec")
    specs = []
    for path, shape, kernel in zip(paths, shapes, ATTENTION_KERNELS, strict=True):
        if len(shape) == 3:
            spec = MatrixSpec((2,), (0, 1)) if kernel == "out" else MatrixSpec((1, 2), (0,))
            found = shape[0] if kernel == "out" else shape[1]
            if heads not in (None, found):
                raise ValueError(f"{heads} heads are given, {path!r} of shape {shape} has {found}")
            heads = found
        elif len(shape) == 2:
            spec = matrix_spec(path, shape)
        else:
            raise ValueError(f"{path!r} of shape {shape} is no kernel of an attention block")
        specs.append(spec)
    if heads is None:
        raise ValueError("its kernels have no axis of heads; give target_heads or source_heads")
    return AttentionView(shapes, tuple(specs), heads)


def _check_float(role: str, path: str, leaf: Any) -> None:
    # A variable of Keras has a shape and a dtype too, and is no array.
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
    if not is_array or not jnp.issubdtype(leaf.dtype, jnp.floating):
        found = f"an array of {leaf.dtype}" if is_array else f"{type(leaf).__name__}: give its numbers (jnp.asarray)"
        raise ValueError(f"the {role} leaf {path!r} must be a float array, got {found}")


class Matches(dict[str, str]):
    """Routes `{target path: source path}` that `match` has found.

    Attributes:
      left_out: paths of the target that a pattern names and that have no route, with the reason.
    """

    left_out: Mapping[str, str]

    def __init__(self, routes: Mapping[str, str], left_out: Mapping[str, str]) -> None:  # noqa: D107
        super().__init__(routes)
        self.left_out = dict(left_out)


def match(
    source_params: Params,
    target_params: Params,
    *,
    source: Pattern,
    target: Pattern,
    view: ViewName = "matrix",
    unmatched: Unmatched = "error",
) -> Matches:
    """Returns routes `{target path: source path}` between layers of models of different depth, in proportion.

    Layers are in natural order of their paths. Target layer `i` of `n` is paired with source layer
    `floor((i + 1/2) m / n)` of `m`, so six layers get every second one of twelve, and twelve layers share six. Where a
    layer has several leaves, each gets its like: leaves are of one kind where their paths agree after the last
    part with a number in it (`attention/query/kernel` of `encoder/layer_3/attention/query/kernel`). Where both
    models have one kind only, its name does not matter.

    In the view `attention` the patterns name blocks instead of leaves.

    With `unmatched="skip"`, leaves that cannot be paired get no route: kinds that the source has not, scalars,
    integers, layouts that nothing tells, embeddings whose rows differ in number. They stand in `.left_out` of what is
    returned, with reasons.

    >>> import jax.numpy as jnp
    >>> layers = lambda n: {f"layer_{i}": {"kernel": jnp.ones((2, 2))} for i in range(n)}
    >>> match(layers(4), layers(2), source="*/kernel", target="*/kernel")
    {'layer_0/kernel': 'layer_1/kernel', 'layer_1/kernel': 'layer_3/kernel'}

    Raises:
      ValueError: a pattern that names nothing; kinds of the target's leaves that the source has not, unless they are
        to be skipped, or nothing else.
    """
    check_view(view)
    check_choice("way with unmatched leaves", unmatched, get_args(Unmatched))

    def by_kind(role: str, params: Params, pattern: Pattern) -> dict[str, list[str]]:
        leaves = flatten(params)
        if view == "attention":
            suffix = f"/{ATTENTION_KERNELS[0]}/kernel"
            paths = [unit[0].removesuffix(suffix) for unit in _units(role, leaves, pattern, view)]
        else:
            paths = find_paths(leaves, pattern, role=role)
        kinds: dict[str, list[str]] = {}
        for path in sorted(paths, key=natural_order):
            parts = path.split("/")
            last = max((i for i, part in enumerate(parts) if re.search("[0-9]", part)), default=-1)
            kinds.setdefault("/".join(parts[last + 1 :]), []).append(path)
        return kinds

    sources = by_kind("source", source_params, source)
    targets = by_kind("target", target_params, target)
    if len(sources) == len(targets) == 1:
        sources = dict(zip(targets, sources.values(), strict=True))
    missing = [kind for kind in targets if kind not in sources]
    if missing and (unmatched == "error" or len(missing) == len(targets)):
        kinds = f"kind {missing[0]!r}" if len(missing) == 1 else f"kinds {', '.join(map(repr, missing))}"
        raise ValueError(
            f"the target has leaves of the {kinds}, the source has none: {near_misses(missing[0], sources)}. "
            "Where kinds have other names, match them one at a time; unmatched='skip' leaves them out"
        )
    routes: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for kind, paths in targets.items():
        if kind in missing:
            left_out |= dict.fromkeys(paths, f"the source has no leaves of the kind {kind!r}")
            continue
        partners = proportional(len(paths), len(sources[kind]))
        routes.update({path: sources[kind][i] for path, i in zip(paths, partners, strict=True)})
    if unmatched == "skip":
        pairs = [Route(path, of, view=view, unmatched="skip") for path, of in routes.items()]
        for one in survey(pairs, source_params, target_params)[1]:
            path = str(one.route.target)
            left_out[path] = one.reason
            del routes[path]
    return Matches(dict(sorted(routes.items(), key=lambda item: natural_order(item[0]))), left_out)
