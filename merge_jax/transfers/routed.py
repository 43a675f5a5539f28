"""Shared scaffolding of all transfers by routes: resolves, runs and describes routes."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax

from merge_jax.paths import flatten, replace
from merge_jax.transfers.base import Key, Step, Transfer
from merge_jax.transfers.describe import RouteCost, RouteSummary, left_out_summaries, route_summary
from merge_jax.transfers.pairing import LayoutOf, ResolvedRoute, layout_by_name, resolve, survey
from merge_jax.transfers.routes import Route
from merge_jax.transfers.views import ViewName
from merge_jax.types import Adapter, Metrics, Params

__all__ = ["ByPath", "routed_transfer"]

ByPath = Mapping[str, jax.Array]

_Plan = TypeVar("_Plan")


def routed_transfer(
    routes: tuple[Route, ...],
    plan: Callable[[tuple[ResolvedRoute, ...]], _Plan],
    move: Callable[[_Plan, Adapter, ByPath, ByPath, Key, Step], ByPath],
    *,
    start: Callable[[jax.Array, _Plan], Adapter] | None = None,
    costs: Callable[[_Plan], Mapping[int, RouteCost]] | None = None,
    monitor: Callable[[_Plan, Adapter, Step], Metrics] | None = None,
    rank: int | None = None,
    view: ViewName = "matrix",
    layout: LayoutOf = layout_by_name,
) -> Transfer:
    """Returns the transfer by routes that these functions define.

    Args:
      routes: between any two models.
      plan: `resolved routes -> plan`, from shapes only; it may raise ValueError.
      move: `(plan, adapter, source leaves, target leaves, key, step) -> new target leaves`, all by path.
      start: `(key, plan) -> adapter`; None for an empty one.
      costs: `plan -> {number of a route: its cost}`; None if nothing is learned and nothing counted.
      monitor: `(plan, adapter, step) -> scalars by name`; None for nothing.
      rank: default for routes without a rank.
      view: default for routes without a view.
      layout: of leaves whose route has no spec.
    """

    def made_plan(source_params: Params, target_params: Params) -> _Plan:
        return plan(resolve(routes, source_params, target_params, rank=rank, view=view, layout=layout))

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        found = made_plan(source_params, target_params)
        return {} if start is None else start(key, found)

    def apply(
        adapter: Adapter, source_params: Params, target_params: Params, *, key: Key = None, step: Step = None
    ) -> Params:
        found = made_plan(source_params, target_params)
        return replace(target_params, move(found, adapter, flatten(source_params), flatten(target_params), key, step))

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        resolved, left_out = survey(routes, source_params, target_params, rank=rank, view=view, layout=layout)
        found = {} if costs is None else costs(plan(resolved))
        rows = (route_summary(route, found.get(number, RouteCost())) for number, route in enumerate(resolved))
        return (*rows, *left_out_summaries(left_out))

    if monitor is None:
        return Transfer(init, apply, describe)

    def watch(adapter: Adapter, source_params: Params, target_params: Params, *, step: Step = None) -> Metrics:
        return monitor(made_plan(source_params, target_params), adapter, step)

    return Transfer(init, apply, describe, watch)
