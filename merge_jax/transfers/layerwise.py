"""Shared scaffolding for transfers defined by one equation for each route's kernel."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from merge_jax.checks import check_flag
from merge_jax.transfers.base import Key, Step, Transfer
from merge_jax.transfers.batching import RouteBatch, adapter_entry, batch_routes, run_batch
from merge_jax.transfers.describe import RouteCost, count_flops
from merge_jax.transfers.pairing import ResolvedRoute
from merge_jax.transfers.routed import ByPath, routed_transfer
from merge_jax.transfers.routes import Route, Routes, as_routes
from merge_jax.types import Adapter

__all__ = ["kernel_routes", "kernel_shapes", "layerwise_transfer"]

ChangeFn = Callable[[Adapter, jax.Array, jax.Array], jax.Array]
"""`(parameters of a route, target's kernel [m, n, *window], source's [p, q, *window]) -> new target's kernel`."""

StartFn = Callable[[tuple[int, ...], tuple[int, ...]], Adapter]
"""`(shape of the target's kernel, shape of the source's) -> parameters of a route`."""


def kernel_routes(routes: Routes) -> tuple[Route, ...]:
    """Returns the routes as `Route`s.

    Raises:
      ValueError: as `as_routes`; or a route with the view `attention`, whose kernel has a different form.
    """
    named_routes = as_routes(routes)
    for route in named_routes:
        if route.view == "attention":
            raise ValueError(
                f"the route to {route.target!r} has the view 'attention', which this transfer does not support; "
                "route the kernels of query, key, value and output one by one"
            )
    return named_routes


def kernel_shapes(route: ResolvedRoute) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes `(rows, inputs, *window)` of the target's and the source's kernel."""
    return route.target_view.kernel_shape, route.source_view.kernel_shape


def layerwise_transfer(
    routes: Routes, change: ChangeFn, *, start: StartFn | None = None, shared: bool = False
) -> Transfer:
    """Returns the transfer `T' = change(parameters, T, S)` of the kernel `[rows, inputs, *window]` of each route.

    Routes with one signature run as one batch. The adapter is `{target path: parameters}` with one entry per batch,
    stacked if the batch has several routes, or `shared` by them; it is empty without a `start`.

    Raises:
      ValueError: as `share_transfer`; for the view `attention`; in `apply`, for an adapter that does not fit.
    """
    named_routes = kernel_routes(routes)
    check_flag(shared=shared)

    def start_batch(batch: RouteBatch) -> Adapter:
        assert start is not None
        params, count = start(*kernel_shapes(batch.routes[0])), len(batch.routes)
        if count == 1 or shared:
            return params
        return jax.tree.map(lambda leaf: jnp.tile(leaf, (count, *(1,) * leaf.ndim)), params)

    def start_all(key: jax.Array, batches: tuple[RouteBatch, ...]) -> Adapter:
        del key  # Nothing is random.
        return {batch.name: start_batch(batch) for batch in batches}

    def move_route(
        route: ResolvedRoute, params: Adapter, target: tuple[jax.Array, ...], source: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        kernel = change(params, route.target_view.to_kernel(target), route.source_view.to_kernel(source))
        return route.target_view.to_leaves(kernel)

    def move(
        batches: tuple[RouteBatch, ...], adapter: Adapter, sources: ByPath, targets: ByPath, key: Key, step: Step
    ) -> ByPath:
        del key, step
        new_leaves = {}
        for batch in batches:
            params = {}
            if start is not None:
                params = adapter_entry(batch.name, adapter, jax.eval_shape(functools.partial(start_batch, batch)))
            move_one = functools.partial(move_route, batch.routes[0])
            new_leaves |= run_batch(batch, move_one, sources, targets, params=params, shared=shared)
        return new_leaves

    def costs(batches: tuple[RouteBatch, ...]) -> dict[int, RouteCost]:
        assert start is not None
        found = {}
        for batch in batches:
            shapes = kernel_shapes(batch.routes[0])
            params = jax.eval_shape(functools.partial(start, *shapes))
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            flops = count_flops(change, params, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
            for i, number in enumerate(batch.numbers):
                found[number] = RouteCost(batch.name, 0 if shared and i else size, flops)
        return found

    if start is None:
        return routed_transfer(named_routes, batch_routes, move)
    return routed_transfer(named_routes, batch_routes, move, start=start_all, costs=costs)
