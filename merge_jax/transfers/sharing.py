"""Parameter sharing: copies the overlap of both models."""

import functools

import jax

from merge_jax.transfers.base import Key, Step, Transfer
from merge_jax.transfers.batching import RouteBatch, batch_routes, run_batch
from merge_jax.transfers.pairing import ResolvedRoute
from merge_jax.transfers.routed import ByPath, routed_transfer
from merge_jax.transfers.routes import Routes, as_routes, check_view
from merge_jax.transfers.views import ViewName
from merge_jax.types import Adapter

__all__ = ["share_transfer"]


def share_transfer(routes: Routes, *, view: ViewName = "matrix") -> Transfer:
    """Returns parameter sharing: the source's overlapping block is copied into each routed target leaf.

    `T'[i, j] = S[i, j]` in the overlap, `T[i, j]` elsewhere. Windows of convolutions are aligned at their centres
    (see `copy_overlap`), heads of attention blocks are paired in proportion (see `Route`). The baseline "parameter
    sharing" of arXiv:2404.13322; the choice of the block is ours, since the paper does not specify it. The adapter is
    empty.

    Raises:
      ValueError: as `adapter_transfer`.
    """
    named_routes = as_routes(routes)
    check_view(view)

    def move(
        batches: tuple[RouteBatch, ...], adapter: Adapter, sources: ByPath, targets: ByPath, key: Key, step: Step
    ) -> ByPath:
        del adapter, key, step  # Nothing is learned and nothing random.
        new_leaves = {}
        for batch in batches:
            new_leaves |= run_batch(batch, functools.partial(_share, batch.routes[0]), sources, targets)
        return new_leaves

    return routed_transfer(named_routes, batch_routes, move, view=view)


def _share(
    route: ResolvedRoute, params: Adapter, target: tuple[jax.Array, ...], source: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    del params
    target_view, source_view = route.target_view, route.source_view
    kernel = target_view.overlap(
        target_view.to_kernel(target),
        source_view,  # type: ignore[arg-type]
        source_view.to_kernel(source),
    )
    return target_view.to_leaves(kernel)
