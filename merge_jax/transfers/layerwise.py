"""Transfers given by an equation for the blocks of one route: what is not of a method is here, once."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from merge_jax.checks import check_flag
from merge_jax.paths import flatten, replace
from merge_jax.transfers.base import RoutedTransfer, share_transfer
from merge_jax.transfers.batching import Group, adapter_of, grouped, run_group
from merge_jax.transfers.cost import count_flops
from merge_jax.transfers.routes import ResolvedRoute, Route, Routes, as_routes, resolve, survey
from merge_jax.transfers.views import View
from merge_jax.types import Adapter, Params, RouteSummary

__all__ = ["block_shapes", "block_transfer", "kernel_routes"]

ChangeFn = Callable[[Adapter, jax.Array, jax.Array], jax.Array]
"""`(parameters of a route, target's blocks [m, n, *window], source's [p, q, *window]) -> new target's blocks`."""

StartFn = Callable[[tuple[int, ...], tuple[int, ...]], Adapter]
"""`(shape of the target's blocks, shape of the source's) -> parameters of a route`."""


def kernel_routes(routes: Routes) -> tuple[Route, ...]:
    """Returns the routes as such.

    Raises:
      ValueError: as `as_routes`; or a route with the view `attention`, whose blocks are of another form.
    """
    named_routes = as_routes(routes)
    for route in named_routes:
        if route.view == "attention":
            raise ValueError(
                f"the route to {route.target!r} has the view 'attention', which this transfer has not; "
                "route the kernels of query, key, value and output one by one"
            )
    return named_routes


def block_shapes(route: ResolvedRoute) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes `(rows, inputs, *window)` of the target's and the source's blocks."""

    def of(view: View) -> tuple[int, ...]:
        leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in view.shapes]
        return jax.eval_shape(view.to_blocks, leaves).shape

    return of(route.target_view), of(route.source_view)


def block_transfer(
    routes: Routes, change: ChangeFn, *, start: StartFn | None = None, shared: bool = False
) -> RoutedTransfer:
    """Returns the transfer `T' = change(parameters, T, S)` of the blocks `[rows, inputs, *window]` of each route.

    Routes of one kind run as one group. The adapter is `{target path: parameters}` with one entry a group, stacked
    where the group has several routes, or `shared` by them; it is empty without a `start`.

    Raises:
      ValueError: as `share_transfer`; for the view `attention`; in `apply`, for an adapter that does not fit.
    """
    named_routes = kernel_routes(routes)
    check_flag(shared=shared)
    like_share = share_transfer(named_routes)

    def groups_of(source_params: Params, target_params: Params) -> tuple[Group, ...]:
        return grouped(resolve(named_routes, source_params, target_params))

    def start_of(group: Group) -> Adapter:
        if start is None:
            return {}
        params, count = start(*block_shapes(group.routes[0])), len(group.routes)
        if count == 1 or shared:
            return params
        return jax.tree.map(lambda leaf: jnp.tile(leaf, (count, *(1,) * leaf.ndim)), params)

    def params_of(adapter: Adapter, group: Group) -> Adapter:
        if start is None:
            return {}
        return adapter_of(group.name, adapter, jax.eval_shape(functools.partial(start_of, group)))

    def move(
        route: ResolvedRoute,
        params: Adapter,
        target: tuple[jax.Array, ...],
        source: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, ...]:
        blocks = change(params, route.target_view.to_blocks(target), route.source_view.to_blocks(source))
        return route.target_view.to_leaves(blocks)

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        del key  # There is nothing random.
        groups = groups_of(source_params, target_params)
        return {} if start is None else {group.name: start_of(group) for group in groups}

    def apply(
        adapter: Adapter, source_params: Params, target_params: Params, *, key: jax.Array | None = None
    ) -> Params:
        del key
        new_leaves, sources, targets = {}, flatten(source_params), flatten(target_params)
        for group in groups_of(source_params, target_params):
            of_route = functools.partial(move, group.routes[0])
            params = params_of(adapter, group)
            new_leaves |= run_group(group, of_route, sources, targets, params=params, shared=shared)
        return replace(target_params, new_leaves)

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        rows = list(like_share.describe(source_params, target_params))
        if start is None:
            return tuple(rows)
        resolved, _ = survey(named_routes, source_params, target_params)
        for group in grouped(resolved):
            shapes = block_shapes(group.routes[0])
            params = jax.eval_shape(functools.partial(start, *shapes))
            blocks = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
            size, flops = sum(leaf.size for leaf in jax.tree.leaves(params)), count_flops(change, params, *blocks)
            for i, number in enumerate(group.numbers):
                parameters = 0 if shared and i else size
                rows[number] = dataclasses.replace(rows[number], adapter=group.name, parameters=parameters, flops=flops)
        return tuple(rows)

    return RoutedTransfer(init, apply, describe)
