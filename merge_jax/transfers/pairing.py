"""Pairs the leaves of two models by the routes' paths, each with the view that makes it a matrix."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checks import what_to_give
from merge_jax.layouts import MatrixSpec, matrix_spec
from merge_jax.paths import Pattern, find_paths, flatten, is_pattern
from merge_jax.transfers.routes import Leaves, Route, leaves_text, routed_twice
from merge_jax.transfers.rows import arranged_ends
from merge_jax.transfers.views import ATTENTION_KERNELS, AttentionView, KernelView, View, ViewName
from merge_jax.types import Params

__all__ = ["LayoutOf", "LeftOut", "ResolvedRoute", "layout_by_name", "named_units", "resolve", "survey"]

LayoutOf = Callable[[str, str, tuple[int, ...]], MatrixSpec]
"""`(role, path, shape) -> the layout of a leaf`, or ValueError if it is unknown."""


@dataclass(frozen=True)
class ResolvedRoute:
    """A route between two models: its leaves by path, and their views as matrices.

    Attributes:
      target: paths of the target's leaves.
      source: paths of the source's leaves.
      target_view: view of the target's leaves as a matrix.
      source_view: view of the source's leaves as a matrix.
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
        """The key by which routes are batched."""
        return self.target_view, self.source_view, self.dtypes, self.rank


@dataclass(frozen=True)
class LeftOut:
    """Leaves that match a route's patterns but cannot be paired.

    Attributes:
      target: paths of the target's leaves, joined with ` + `; empty if all are the source's.
      source: the same for the source.
      reason: the reason, as the text of an error.
      route: the route with these patterns.
    """

    target: str
    source: str
    reason: str
    route: Route


def layout_by_name(role: str, path: str, shape: tuple[int, ...]) -> MatrixSpec:
    """Returns the layout of a leaf by its name and shape."""
    del role
    return matrix_spec(path, shape)


def _some(units: Sequence[tuple[str, ...]]) -> str:
    names = [leaves_text(unit) for unit in units]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def resolve(
    routes: Iterable[Route],
    source_params: Params,
    target_params: Params,
    *,
    rank: int | None = None,
    view: ViewName = "matrix",
    layout: LayoutOf = layout_by_name,
) -> tuple[ResolvedRoute, ...]:
    """Returns one resolved route for each routed target of two models; the options are defaults for routes without.

    Raises:
      ValueError: as `survey`; leaves that cannot be paired, if their route does not skip them or nothing else remains.
    """
    resolved, left_out = survey(routes, source_params, target_params, rank=rank, view=view, layout=layout)
    refused = [one for one in left_out if one.route.unmatched == "error"]
    if refused:
        route, more = refused[0].route, f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(
            f"{refused[0].reason}{more}. To leave out what cannot be paired, give "
            f"Route({leaves_text(route.target)!r}, {leaves_text(route.source)!r}, unmatched='skip'); summarize lists it"
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
    layout: LayoutOf = layout_by_name,
) -> tuple[tuple[ResolvedRoute, ...], tuple[LeftOut, ...]]:
    """Returns the routes from leaf to leaf, and the leaves that match a pattern but cannot be paired, with reasons.

    Raises:
      ValueError: a path or pattern that matches no leaf, unequal numbers of leaves to pair in order, a leaf routed
        twice; for a route without a pattern or with joined leaves that does not skip, leaves that cannot be paired.
    """
    leaves = {"target": flatten(target_params), "source": flatten(source_params)}
    resolved: list[ResolvedRoute] = []
    left_out: list[LeftOut] = []
    for route in routes:
        route_view = route.view or view
        pairs, alone = _pairs(route, leaves, route_view)
        left_out += alone
        for target, source in pairs:
            try:
                resolved.append(_resolve_one(route, target, source, leaves, rank, route_view, layout))
            except ValueError as error:
                if route.unmatched == "error" and not is_pattern(route.target):
                    raise
                left_out.append(LeftOut(leaves_text(target), leaves_text(source), str(error), route))
    source_by_target: dict[str, str] = {}
    for one in resolved:
        for path in one.target:
            if path in source_by_target:
                raise routed_twice(path, source_by_target[path], leaves_text(one.source))
            source_by_target[path] = leaves_text(one.source)
    return tuple(resolved), tuple(left_out)


def _pairs(
    route: Route, leaves: Mapping[str, Mapping[str, Any]], view: ViewName
) -> tuple[list[tuple[tuple[str, ...], tuple[str, ...]]], list[LeftOut]]:
    """Returns a route's pairs of target and source, and the leaves without a partner."""
    targets = named_units("target", leaves["target"], route.target, view)
    sources = named_units("source", leaves["source"], route.source, view)
    common = set(targets) & set(sources)
    if route.target == route.source and is_pattern(route.target) and common:
        alone = [
            LeftOut(
                leaves_text(unit) if role == "target" else "",
                "" if role == "target" else leaves_text(unit),
                f"the {role} leaf {leaves_text(unit)!r} has no partner of its path in the {other} (match pairs models "
                "of different depth)",
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
            f"{leaves_text(route.target)!r} names {len(targets)} leaves of the target ({_some(targets)}), "
            f"{leaves_text(route.source)!r} names {len(sources)} of the source ({_some(sources)}); a pairing needs "
            "as many, or one of the source (match pairs models of different depth)"
        )
    return list(zip(targets, sources, strict=True)), []


def named_units(role: str, leaves: Mapping[str, Any], named: Leaves, view: ViewName) -> list[tuple[str, ...]]:
    """Returns the named leaves, as tuples of paths that each form one matrix."""
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
            raise ValueError(f"{leaves_text(named)!r} names unequal numbers of kernels of the {role}: {counts}")
        return list(zip(*found, strict=True))
    if isinstance(named, tuple):
        paths = tuple(path for pattern in named for path in find_paths(leaves, pattern, role=role))
        repeated = [path for path, count in Counter(paths).items() if count > 1]
        if repeated:
            raise ValueError(f"{leaves_text(named)!r} names the {role} leaf {repeated[0]!r} twice")
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
    layout: LayoutOf,
) -> ResolvedRoute:
    if route.rows is not None:
        layout = layout_by_name  # Rows that a route arranges are known by name, or by its spec.
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
                specs = tuple(_spec(role, path, shape, spec, layout) for path, shape in zip(paths, shapes, strict=True))
                one = KernelView(shapes, specs, taps=view == "convolution")
                ends.append(tuple(zip(paths, shapes, specs, strict=True)))
            one.check()
        except ValueError as error:
            name = f"leaf {paths[0]!r}" if len(paths) == 1 else f"leaves {leaves_text(paths)!r}"
            raise ValueError(f"the {role} {name} cannot take part: {error}") from None
        views.append(one)
    target_view, source_view = views
    if isinstance(target_view, KernelView) and isinstance(source_view, KernelView):
        target_arrangement, source_arrangement = arranged_ends(route.rows, *ends)
        target_view = replace(target_view, arrangement=target_arrangement)
        source_view = replace(source_view, arrangement=source_arrangement)
    elif route.rows is not None:
        raise ValueError(
            f"the route to {leaves_text(target)!r} has rows and the view 'attention', which pairs heads alone"
        )
    if rank is not None:
        _check_rank_fits(rank, view, target, target_view)
    paths_by_role = (("target", target), ("source", source))
    dtypes = tuple(str(leaves[role][path].dtype) for role, paths in paths_by_role for path in paths)
    return ResolvedRoute(target, source, target_view, source_view, dtypes, rank)


def _check_rank_fits(rank: int, view: ViewName, target: tuple[str, ...], target_view: View) -> None:
    if view != "matrix":
        raise ValueError(
            f"the route to {leaves_text(target)!r} has a rank and the view {view!r}; a re-encoded matrix has other "
            "rows than those whose types this view knows, so choose one of them"
        )
    if rank > min(target_view.matrix_shape):
        m, n = target_view.matrix_shape
        raise ValueError(
            f"the target leaf {leaves_text(target)!r} is a matrix [{m}, {n}], too small for the rank {rank}; "
            "its route may have a rank of its own, or rank='whole'"
        )


def _spec(role: str, path: str, shape: tuple[int, ...], given: MatrixSpec | None, layout: LayoutOf) -> MatrixSpec:
    if not shape or 0 in shape:
        return matrix_spec(path, shape)  # Raises: they cannot be a matrix under any spec.
    if given is None:
        return layout(role, path, shape)
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
            raise ValueError(f"{path!r} of shape {shape} is not a kernel of an attention block")
        specs.append(spec)
    if heads is None:
        raise ValueError("its kernels have no axis of heads; give target_heads or source_heads")
    return AttentionView(shapes, tuple(specs), heads)


def _check_float(role: str, path: str, leaf: Any) -> None:
    # A Keras variable also has a shape and a dtype, but is not an array.
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
    if not is_array or not jnp.issubdtype(leaf.dtype, jnp.floating):
        found = f"an array of {leaf.dtype}" if is_array else f"{type(leaf).__name__}: {what_to_give(leaf)}"
        raise ValueError(f"the {role} leaf {path!r} must be a float array, got {found}")
