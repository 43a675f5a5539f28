"""Transfers: pairs of pure functions that map a source and a target parameter tree to a new target tree."""

from collections.abc import Callable, Iterable
from typing import Any, Self

import jax

from merge_jax.paths import flatten, replace
from merge_jax.transfers.batching import Group, grouped, run_group
from merge_jax.transfers.routes import LeftOut, ResolvedRoute, Routes, as_routes, check_view, resolve, survey
from merge_jax.transfers.views import AttentionView, ViewName
from merge_jax.types import Adapter, ApplyFn, InitFn, Metrics, Params, RouteSummary, Transfer

__all__ = [
    "RoutedTransfer",
    "identity_transfer",
    "left_out_summaries",
    "route_summary",
    "share_transfer",
    "writes",
]

MonitorFn = Callable[[Adapter, Params, Params], Metrics]
"""`(adapter, source_params, target_params) -> scalars by name`; see `Transfer.monitor`."""


def share_transfer(routes: Routes, *, view: ViewName = "matrix") -> Transfer:
    """Returns parameter sharing: the source's overlapping block is copied into each routed target leaf.

    `T'[i, j] = S[i, j]` where both have the entry, `T[i, j]` elsewhere; windows of convolutions overlap at
    their centres (see `copy_overlap`), heads of attention blocks in proportion (see `Route`). The baseline
    "parameter sharing" of arXiv:2404.13322; which block is copied is our choice, since the paper leaves it open.
    The adapter is empty.

    Raises:
      ValueError: as `adapter_transfer`.
    """
    named_routes = as_routes(routes)
    check_view(view)

    def groups_of(source_params: Params, target_params: Params) -> tuple[Group, ...]:
        return grouped(resolve(named_routes, source_params, target_params, view=view))

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        del key  # There is nothing to learn.
        groups_of(source_params, target_params)
        return {}

    def apply(
        adapter: Adapter,
        source_params: Params,
        target_params: Params,
        *,
        key: jax.Array | None = None,
    ) -> Params:
        del adapter, key  # There is nothing learned and nothing random.
        new_leaves, sources, targets = {}, flatten(source_params), flatten(target_params)
        for group in groups_of(source_params, target_params):
            route = group.routes[0]

            def share(params: Adapter, target: Any, source: Any, route: ResolvedRoute = route) -> tuple[jax.Array, ...]:
                del params
                blocks = route.target_view.overlap(
                    route.target_view.to_blocks(target),
                    route.source_view,  # type: ignore[arg-type]
                    route.source_view.to_blocks(source),
                )
                return route.target_view.to_leaves(blocks)

            new_leaves |= run_group(group, share, sources, targets)
        return replace(target_params, new_leaves)

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        resolved, left_out = survey(named_routes, source_params, target_params, view=view)
        rows = (route_summary(route, "", parameters=0, flops=0) for route in resolved)
        return (*rows, *left_out_summaries(left_out))

    return RoutedTransfer(init, apply, describe)


def identity_transfer() -> Transfer:
    """Returns the transfer that moves nothing: `T' = T`. The baseline "vanilla"; the adapter is empty."""
    return Transfer(_nothing, _unchanged)


def _nothing(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
    del key, source_params, target_params  # There is nothing to learn.
    return {}


def _unchanged(
    adapter: Adapter, source_params: Params, target_params: Params, *, key: jax.Array | None = None
) -> Params:
    del adapter, source_params, key  # Nothing moves.
    return target_params


def writes(transfer: Transfer) -> bool:
    """Returns whether a transfer may change the target: any but `identity_transfer()`."""
    return transfer.apply is not _unchanged


class RoutedTransfer(Transfer):
    """A transfer that knows its routes, and may follow a schedule."""

    _describe: Callable[[Params, Params], tuple[RouteSummary, ...]]
    _at: Callable[[Any], Transfer] | None
    _monitor: MonitorFn | None

    def __new__(  # noqa: D102
        cls,
        init: InitFn,
        apply: ApplyFn,
        describe: Callable[[Params, Params], tuple[RouteSummary, ...]],
        at: Callable[[Any], Transfer] | None = None,
        monitor: MonitorFn | None = None,
    ) -> Self:
        self = super().__new__(cls, init, apply)
        self._describe, self._at, self._monitor = describe, at, monitor
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # noqa: D105
        # A copy, and what another process is sent, is made of all five, not of the two that unpack.
        return (self.init, self.apply, self._describe, self._at, self._monitor)

    def at(self, step: jax.Array | int, /) -> Transfer:
        """Returns the transfer as it is at a step."""
        return self if self._at is None else self._at(step)

    def describe(self, source_params: Params, target_params: Params, /) -> tuple[RouteSummary, ...]:
        """Returns what each route is and costs."""
        return self._describe(source_params, target_params)

    def monitor(self, adapter: Adapter, source_params: Params, target_params: Params, /) -> Metrics:
        """Returns the gates."""
        return {} if self._monitor is None else self._monitor(adapter, source_params, target_params)


def route_summary(
    route: ResolvedRoute, adapter: str, *, core: bool = False, parameters: int, flops: int
) -> RouteSummary:
    """Returns what a route is, with what its adapter costs."""
    target_view = route.target_view
    if isinstance(target_view, AttentionView):
        view = f"attention, {target_view.heads} heads"
    else:
        view = "convolution" if target_view.taps else "matrix"
        if route.source_view.arrangement is not None:  # type: ignore[union-attr]
            view += ", rows paired"
    return RouteSummary(
        " + ".join(route.target),
        " + ".join(route.source),
        target_view.shapes,
        target_view.matrix_shape,
        route.source_view.matrix_shape,
        target_view.overlap_shape(route.source_view),  # type: ignore[arg-type]
        view,
        route.rank,
        core and route.rank is not None,
        adapter,
        parameters,
        flops,
    )


def left_out_summaries(left_out: Iterable[LeftOut]) -> tuple[RouteSummary, ...]:
    """Returns what the patterns of routes name and what cannot be paired, each with the reason."""
    nothing = (0, 0)
    return tuple(
        RouteSummary(one.target, one.source, (), nothing, nothing, nothing, "", None, False, "", 0, 0, one.reason)
        for one in left_out
    )
