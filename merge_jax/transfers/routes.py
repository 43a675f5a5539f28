"""Routes: pairs of target and source leaves, as named by the user."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from merge_jax.checks import check_at_least_one, check_choice
from merge_jax.layouts import MatrixSpec
from merge_jax.paths import Pattern
from merge_jax.transfers.rows import Rows, RowsByNumber
from merge_jax.transfers.views import ViewName

__all__ = [
    "Leaves",
    "Route",
    "Routes",
    "Unmatched",
    "as_routes",
    "check_rank",
    "check_view",
    "leaves_text",
    "routed_twice",
]

Leaves = Pattern | tuple[Pattern, ...]
"""Leaves of one model: a path, a glob, a compiled regular expression, or a tuple of them."""

Unmatched = Literal["error", "skip"]
"""How to handle leaves that cannot be paired: raise an error, or leave them out."""


@dataclass(frozen=True)
class Route:
    """One route, or several by patterns, from source leaves to target leaves.

    Each leaf that matches a target pattern gets a separate transfer. The source pattern must then match as many leaves,
    which are paired in natural order (`match` pairs by depth if there are more on one side), or one leaf, which serves
    all. The same pattern on both sides, such as `**`, pairs leaves with equal paths. If the target is one leaf, all
    leaves that match the source pattern are stacked into one matrix. So are the leaves of a tuple, on both sides:
    `Route(("q/kernel", "k/kernel"), "qk/kernel")` splits a fused kernel. In the view `attention`, a path names a block
    with the kernels `query/kernel`, `key/kernel`, `value/kernel` and `out/kernel`, and a tuple gives the paths or
    patterns of these four. Head `i` of `h` is then paired with head `floor((i + 1/2) k / h)` of the source's `k`.

    Attributes:
      target: leaves in the target's parameters, e.g. `stage6_2/project/kernel`.
      source: leaves in the source's parameters, e.g. `fc/kernel`.
      target_spec: how to read each target leaf as a matrix; by default from its path and shape, by `matrix_spec`.
      source_spec: the same for source leaves.
      rank: the rank of the re-encoding, `whole` for none, or None for that of the transfer.
      view: what the adapter's tokens are, or None for the transfer's; see `ViewName`.
      target_heads: heads of the target's attention, if its kernels have no axis of heads.
      source_heads: the same for the source.
      rows: how to pair rows of an embedding or pixels of a patch if the two models differ in their number: a `Rows`, or
        `first` for row `i` from row `i`. None refuses such a route.
      unmatched: `skip` leaves out leaves that match the patterns but cannot be paired: no partner with that path, a
        scalar, integers, an unknown layout, different numbers of rows. `error` refuses the route. `summarize` lists
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


def as_routes(routes: Routes) -> tuple[Route, ...]:
    """Returns the routes as `Route`s, checked as far as possible without the models.

    Raises:
      ValueError: no routes, something that is not a route, a target named twice, an unknown view, a rank or a
        number of heads below 1, or an invalid spec.
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
            raise routed_twice(leaves_text(route.target), leaves_text(sources[route.target]), leaves_text(route.source))
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
    """Raises ValueError for a rank below 1."""
    check_at_least_one(rank=rank)


def _as_route(route: Any) -> Route:
    pair: Any = (route.target, route.source) if isinstance(route, Route) else route
    # A bare string is also a sequence; one of two letters would pass as a pair.
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(_are_leaves, pair)):
        raise ValueError(f"a route is a pair (target path, source path) of strings or patterns, got {pair!r}")
    return route if isinstance(route, Route) else Route(*pair)


def _are_leaves(leaves: Any) -> bool:
    if isinstance(leaves, tuple):
        return bool(leaves) and all(isinstance(leaf, (str, re.Pattern)) for leaf in leaves)
    return isinstance(leaves, (str, re.Pattern))


def leaves_text(leaves: Leaves) -> str:
    """Returns leaves as error messages show them: joined with ` + `."""
    if isinstance(leaves, tuple):
        return " + ".join(map(leaves_text, leaves))
    return leaves if isinstance(leaves, str) else leaves.pattern


def routed_twice(target: str, source: str, other: str) -> ValueError:
    """Returns the error for a target leaf with two sources."""
    return ValueError(f"the target path {target!r} is routed twice, from {source!r} and from {other!r}")
