"""Fusion by optimal transport: matches the source's neurons with the target's and averages both."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.checks import check_above_zero, check_at_least_one
from merge_jax.layouts import overlap_blocks
from merge_jax.transfers.base import Key, Step, Transfer
from merge_jax.transfers.describe import RouteCost, count_flops
from merge_jax.transfers.layerwise import kernel_routes, kernel_shapes
from merge_jax.transfers.pairing import ResolvedRoute
from merge_jax.transfers.routed import ByPath, routed_transfer
from merge_jax.transfers.routes import Routes
from merge_jax.transfers.views import KernelView
from merge_jax.types import Adapter

__all__ = ["optimal_transport_transfer", "transport_map"]

# Keeps the length of zero rows, and its gradient, finite.
_EPSILON = 1e-12

# Distances are differences of large numbers, too small for the precision of accelerators' faster matrix products.
_PRECISION = lax.Precision.HIGHEST


def optimal_transport_transfer(
    routes: Routes, *, regularisation: float = 0.01, iterations: int = 100, weight: float = 0.5
) -> Transfer:
    """Returns fusion by optimal transport: `T' = (1 - w) T + w P S Q^T`, layer by layer.

    `T` is `[m, n]`, `S [p, q]`; rows are neurons. `P [m, p]` maps the source's neurons to the target's; its rows sum
    to 1. It is `m` times the transport plan between the rows of `T` and those of `S Q^T`, all with equal mass; see
    `transport_map`. `Q [n, q]` is the `P` of the previous route, if that has this shape: **the order of the routes is
    the order of the layers**. Otherwise, as for the first route, inputs are paired by index, and inputs that only the
    target has do not change. Windows of convolutions are aligned at their centres (see `copy_overlap`). A vector (a
    bias, a norm's scale) belongs to the previous layer: it uses `Q` and sets no `P`. An embedding's neurons are its
    features, so it needs `Route(..., target_spec=MatrixSpec(rows=(1,), inputs=(0,)))` and the same for its source.

    The adapter is empty. Everything is differentiable, including the plan. Running statistics of a BatchNorm are not
    parameters and do not change.

    Source: Singh & Jaggi, arXiv:1910.05653, algorithm 1 with neurons compared by their weights and aligned to the
    target, and its code (sidak/otfusion). Their experiments use exact plans; ours are regularised by entropy, to be
    differentiable. The treatment of different inputs and windows is our choice. Outputs of the last layer are matched
    as neurons too; if they are the same classes in both models, leave that layer out.

    Args:
      routes: as `share_transfer`, in the order of the layers.
      regularisation: entropy regularisation of the plan, above 0, in units of the mean squared length of the rows; the
        smaller it is, the closer `P` is to a permutation.
      iterations: Sinkhorn iterations for each plan.
      weight: `w` in [0, 1], the share of the source; 1 is the aligned source.

    Raises:
      ValueError: as `share_transfer`; or for an option out of range or a route with the view `attention`.
    """
    named_routes = kernel_routes(routes)
    check_at_least_one(iterations=iterations)
    check_above_zero(regularisation=regularisation)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight}")

    def fuse(target: jax.Array, source: jax.Array, previous: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns the target's new kernel and the map `[m, p]`, given the map of the previous route."""
        if _fits(previous, target.shape, source.shape):
            source = jnp.einsum("nq,pq...->pn...", previous, source, precision=_PRECISION)
        aligned = overlap_blocks(jnp.zeros((source.shape[0], *target.shape[1:])), source)
        both = overlap_blocks(jnp.zeros((1, *target.shape[1:])), jnp.ones((1, *source.shape[1:])))
        rows = ((target * both).reshape(len(target), -1), aligned.reshape(len(aligned), -1))
        plan = transport_map(*rows, regularisation=regularisation, iterations=iterations)
        transported = jnp.einsum("mp,pn...->mn...", plan, aligned, precision=_PRECISION)
        return target + weight * both * (transported - target), plan

    def move(
        routes: tuple[ResolvedRoute, ...], adapter: Adapter, sources: ByPath, targets: ByPath, key: Key, step: Step
    ) -> ByPath:
        del adapter, key, step  # Nothing is learned and nothing random.
        new_leaves = {}
        previous: jax.Array | None = None
        for route in routes:
            kernel, source_kernel = (
                view.to_kernel([leaves[path].astype(jnp.float32) for path in paths])
                for view, leaves, paths in (
                    (route.target_view, targets, route.target),
                    (route.source_view, sources, route.source),
                )
            )
            kernel, plan = fuse(kernel, source_kernel, previous)
            previous = previous if _is_vector(route) else plan
            for path, leaf in zip(route.target, route.target_view.to_leaves(kernel), strict=True):
                new_leaves[path] = leaf.astype(targets[path].dtype)
        return new_leaves

    def costs(routes: tuple[ResolvedRoute, ...]) -> dict[int, RouteCost]:
        found, previous = {}, None
        for number, route in enumerate(routes):
            kernels = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in kernel_shapes(route)]
            found[number] = RouteCost(flops=count_flops(fuse, *kernels, previous))
            _, plan = jax.eval_shape(fuse, *kernels, previous)
            previous = previous if _is_vector(route) else plan
        return found

    return routed_transfer(named_routes, lambda routes: routes, move, costs=costs)


def _fits(previous: jax.Array | None, target: tuple[int, ...], source: tuple[int, ...]) -> bool:
    return previous is not None and previous.shape == (target[1], source[1])


def _is_vector(route: ResolvedRoute) -> bool:
    view = route.target_view
    return isinstance(view, KernelView) and not any(spec.rows for spec in view.specs)


def transport_map(target: jax.Array, source: jax.Array, *, regularisation: float, iterations: int) -> jax.Array:
    """Returns the map `P [m, p]` that aligns the source's rows `[p, d]` to the target's rows `[m, d]`, as `P S`.

    `P / m` minimises `sum_ik plan_ik |t_i - s_k|^2 / u - regularisation * entropy(plan)`, with equal masses on each
    side, by Sinkhorn iterations on logarithms. `u` is the mean squared length of the target's rows plus that of the
    source's, so that the map does not depend on units (our choice). Rows of `P` sum to 1 after any number of
    iterations, columns to `m / p` after enough of them. Sources: Cuturi, arXiv:1306.0895; arXiv:1910.05653.
    """
    squares = [jnp.mean(jnp.sum(jnp.square(rows), axis=1)) for rows in (target, source)]
    unit = jnp.sqrt(sum(squares, jnp.asarray(_EPSILON)))
    target, source = target / unit, source / unit
    lengths = jnp.sum(jnp.square(target), axis=1)[:, None] + jnp.sum(jnp.square(source), axis=1)[None]
    products = jnp.matmul(target, source.T, precision=_PRECISION)
    logits = -jnp.maximum(lengths - 2 * products, 0) / regularisation

    # Recomputed in the backward pass, which stores one vector per iteration instead of matrices.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def iteration(potential: jax.Array, _: None) -> tuple[jax.Array, None]:
        row_potential = -jax.nn.logsumexp(logits + potential, axis=1, keepdims=True)
        return -jax.nn.logsumexp(logits + row_potential, axis=0, keepdims=True), None

    # Masses are left out: equal masses only add a constant to a potential, which the softmax ignores.
    potential, _ = lax.scan(iteration, jnp.zeros((1, len(source))), length=iterations)
    return jax.nn.softmax(logits + potential, axis=1)
