"""Transfers with an adapter: a learned network maps the matrices of each route."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from merge_jax.checks import check_choice, check_flag, check_number_or_schedule
from merge_jax.deprecated import new_choice
from merge_jax.transfers.adapters.matrix_layers import pad_to
from merge_jax.transfers.base import Key, Step, Transfer, schedule_value
from merge_jax.transfers.batching import (
    PaddedBatch,
    RouteBatch,
    adapter_entry,
    batch_routes,
    map_routes,
    pad_batches,
    stack_leaves,
    unstack_leaves,
)
from merge_jax.transfers.describe import RouteCost, count_flops
from merge_jax.transfers.low_rank import decode, encode, row_basis
from merge_jax.transfers.network import Network, Place, Sizes, Start, draw, error_context, linen_network, stack_starts
from merge_jax.transfers.pairing import ResolvedRoute
from merge_jax.transfers.routed import ByPath, routed_transfer
from merge_jax.transfers.routes import Routes, as_routes, check_rank, check_view
from merge_jax.transfers.views import AttentionView, TokenTypes, ViewName, proportional
from merge_jax.types import Adapter, Metrics

__all__ = ["AdapterOptions", "OutputForm", "adapter_transfer"]

OutputForm = Literal["published", "residual", "warm"]
"""The map from the adapter's output to the new target leaf; see `adapter_transfer`."""

# Keeps the root mean square of a zero matrix, and its gradient, finite.
_EPSILON = 1e-12
_EXTRAS = 2**32 - 1  # Not the number of a route; keys of modules are folded with those.
# Half the width of a uniform distribution with standard deviation 0.1, which initialises the token type tables.
_TOKEN_TYPE_BOUND = (np.full((1, 1), 0.1 * 3**0.5),)


class AdapterOptions(TypedDict, total=False):
    """Options common to all adapters; see `adapter_transfer`."""

    output: OutputForm
    rank: int | None
    view: ViewName
    gate: float | optax.Schedule | None
    shared: bool
    padding: float


def adapter_transfer(
    routes: Routes,
    network: Network | nn.Module,
    *,
    output: OutputForm = "warm",
    rank: int | None = None,
    view: ViewName = "matrix",
    gate: float | optax.Schedule | None = None,
    shared: bool = False,
    padding: float = 2.0,
) -> Transfer:
    """Returns the transfer that maps matrices through a network `F(T, S) -> T'`.

    With `T` the target's matrix, `S` the source's, `W` the target with the source's overlapping block copied in,
    `s` and `s_S` their root mean squares, and `g` the gate:

    - `published`: `T' = F(T, S)`, as published for LPKA.
    - `residual`: `T' = T + g s (F(T/s, S/s_S) - T/s)`; starts as the identity.
    - `warm`: `T' = W + g s (F(W/s, S/s_S) - W/s)`; starts as `share_transfer` and is trained from there. Like it, every
      transfer overwrites what the target has learned in the overlap, so stop it early in a run
      (`make_joint_step(..., stop=0.1, num_steps=...)`), or fade it out (`scheduled`).

    For `residual` and `warm`, the network's part vanishes at a gate of 0, and both matrices enter at the scale that
    attention expects. The target keeps its scale. The published output replaces it, which only a following BatchNorm
    compensates for.

    **Rank.** At rank `r`, the network maps `A = B^T T [r, n]` instead of `T [m, n]`, with `B` the leading directions of
    `T` (`row_basis`), and `T' = T + B (A' - A)`: the rest of `T` does not change. The source is re-encoded in the same
    way, unless it is already as small.

    **Token types.** In the views `convolution` and `attention`, the rows of a matrix have several types: a position in
    the window, or query, key, value and output. The network receives `T/s + E[type of row]`, with a learned table for
    each side.

    **Batches.** Routes with one signature (equal shapes, rank and view) run as one `vmap`ped batch. The adapter is
    `{target path: parameters}`, with one entry per batch, named after its first route. If the batch has several routes,
    the parameters are stacked along a first axis, or `shared`. Small matrices of different shapes also form one batch:
    matrices and parameters are padded with zeros, which changes values only by rounding (for an LPKA; your own modules
    receive whole matrices). The routes of a batch use the same dropout masks, redrawn at every step.

    Computation is in float32 unless the network sets another dtype; a new leaf keeps the dtype of the old. Without a
    key, `apply` is deterministic; with one, dropout is on. Source: arXiv:2404.13322; `residual`, `warm`, padding
    and sharing are our choice.

    Args:
      routes: `{target path: source path}`, or a sequence of such pairs or of `Route`s; paths may be patterns.
      network: such as `lpka_network(LPKAOptions())`, or your own Flax module `(T, S, *, deterministic) -> T'`.
      output: one of the three forms above.
      rank: default rank of routes without one; None for whole matrices.
      view: default view of routes without one; see `Route`.
      gate: None for a learned scalar that starts at 0; a number, or a schedule of the joint step's count.
      shared: whether the routes of a batch share one adapter.
      padding: maximum ratio of padded to unpadded work when matrices of different shapes run as one program, 1 or more.
        At 1, every shape is a separate program: the least computation and the most compilation.

    Raises:
      ValueError: here, no routes, a target routed twice, or an option out of range; in `init` and `apply`, a path or
        pattern that matches nothing (near misses are listed), leaves that cannot be paired, a leaf that is not a float
        array, or a rank above the size of a matrix; in `apply`, an adapter of other routes, or no step for a gate that
        follows a schedule.
    """
    named_routes = as_routes(routes)
    check_view(view)
    if rank is not None:
        check_rank(rank)
    output = cast(OutputForm, new_choice("output", output, {"official": "published"}))
    check_choice("output form", output, get_args(OutputForm))
    if gate is not None and output == "published":
        raise ValueError("the output form 'published' has no gate; use 'residual' or 'warm'")
    check_flag(shared=shared)
    if gate is not None:
        check_number_or_schedule(gate=gate)
    if isinstance(padding, bool) or not isinstance(padding, (int, float)) or not padding >= 1:
        raise ValueError(f"padding must be a number of at least 1, got {padding!r}")
    net = linen_network(network) if isinstance(network, nn.Module) else network

    def padded_batches(resolved: tuple[ResolvedRoute, ...]) -> tuple[PaddedBatch, ...]:
        batches = batch_routes(resolved)
        alone = [one for one in batches if shared or net.true is None or net.flops is None or _token_types(one)]
        together = [one for one in batches if one not in alone]
        found = [PaddedBatch((one,), (_network_sizes(one),)) for one in alone]
        if net.flops is not None:
            for one in batches:
                with error_context(one.name):
                    net.flops(_network_sizes(one))
            found += pad_batches(together, [_network_sizes(one) for one in together], net.flops, padding)
        return tuple(sorted(found, key=lambda batch: batch.parts[0].numbers))

    # Compiled, since creating many small arrays separately is slow.
    @functools.partial(jax.jit, static_argnums=1)
    def start(key: jax.Array, batches: tuple[PaddedBatch, ...]) -> Adapter:
        places, extras = {}, {}
        for batch in batches:
            copied = len(batch.routes) > 1 and not shared
            true = batch.true if copied else batch.true[:1]
            places[batch.name] = Place(batch.sizes, true, copied)
            extra = _token_type_starts(_token_types(batch.parts[0]), batch.sizes)
            if output != "published" and gate is None:
                extra["gate"] = Start(())
            extras[batch.name] = stack_starts([extra] * len(true)) if copied else extra
        made, extras = net.init(key, places), draw(jax.random.fold_in(key, _EXTRAS), extras)
        # In the published form, the parameters are only those of the network.
        return {
            name: params if output == "published" and not extras[name] else {**extras[name], "proposal": params}
            for name, params in made.items()
        }

    @functools.lru_cache(maxsize=8)
    def adapter_shapes(batches: tuple[PaddedBatch, ...]) -> Adapter:
        return jax.eval_shape(lambda key: start(key, batches), jax.random.key(0))

    def prepare(route: ResolvedRoute, target: Sequence[jax.Array], source: Sequence[jax.Array]) -> "_Prepared":
        """Returns the matrices of a route, encoded if it has a rank."""
        target_view, source_view = route.target_view, route.source_view
        kernel = target_view.to_kernel([leaf.astype(jnp.float32) for leaf in target])
        source_kernel = source_view.to_kernel([leaf.astype(jnp.float32) for leaf in source])
        if output == "warm":
            kernel = target_view.overlap(kernel, source_view, source_kernel)  # type: ignore[arg-type]
        matrix, source_matrix = target_view.to_matrix(kernel), source_view.to_matrix(source_kernel)
        if isinstance(target_view, AttentionView) and isinstance(source_view, AttentionView):
            partners = jnp.array(proportional(target_view.heads, source_view.heads))
            return _Prepared(matrix, source_matrix[partners])
        if route.rank is None:
            return _Prepared(matrix, source_matrix)
        basis = row_basis(matrix, route.rank)
        if _encodes(route.rank, source_matrix.shape, False):
            source_matrix = encode(source_matrix, row_basis(source_matrix, route.rank))
        return _Prepared(encode(matrix, basis), source_matrix, matrix, basis)

    def propose(
        types: tuple[TokenTypes, TokenTypes] | None,
        gate_value: Any,
        masks: Any,
        params: Adapter,
        target: jax.Array,
        source: jax.Array,
        true: Any,
    ) -> jax.Array:
        """Returns the new matrix for one target matrix and one source matrix."""
        known = None if true is None else true["network"]

        def new(target: jax.Array, source: jax.Array) -> jax.Array:
            if types is None and output == "published":
                return net.apply(params, target, source, masks, known)
            if types is not None:
                target = target + params["target_token_types"][types[0].by_row()]
                source = source + params["source_token_types"][types[1].by_row()]
            return net.apply(params["proposal"], target, source, masks, known)

        if output == "published":
            return new(target, source)
        m, n, p, q = (*target.shape, *source.shape) if true is None else true["sizes"]
        scale, source_scale = _root_mean_square(target, m * n), _root_mean_square(source, p * q)
        normalised = target / scale
        opened = params["gate"] if gate is None else gate_value
        return target + opened * scale * (new(normalised, source / source_scale) - normalised)

    def move_batch(
        batch: PaddedBatch,
        gate_value: Any,
        masks: Any,
        params: Adapter,
        sources: ByPath,
        targets: ByPath,
    ) -> dict[str, jax.Array]:
        """Returns the new target leaves of a batch's routes by path."""
        prepared = []
        for part in batch.parts:
            own, alike = stack_leaves(part, sources, targets)
            route = part.routes[0]
            prepared.append(
                map_routes(lambda leaves, route=route, alike=alike: prepare(route, **{**alike, **leaves}), own)
            )
        own = {
            "target": jnp.concatenate([_padded(one.target, batch.sizes[:2]) for one in prepared]),
            "source": jnp.concatenate([_padded(one.source, batch.sizes[2:]) for one in prepared]),
        }
        fixed = {"params": params}
        if len(batch.routes) > 1 and not shared:
            own, fixed = {**own, **fixed}, {}
        if batch.padded and net.true is not None:
            true_sizes = [{"sizes": true, "network": net.true(true)} for true in batch.true]
            own["true"] = jax.tree.map(lambda *sizes: jnp.asarray(sizes), *true_sizes)
        one_matrix = functools.partial(propose, _token_types(batch.parts[0]), gate_value, masks)

        def one_route(route: dict[str, Any]) -> jax.Array:
            given = {"true": None, **fixed, **route}
            if given["target"].ndim == 3:  # One matrix per head; heads share the adapter.
                return jax.vmap(lambda t, s: one_matrix(given["params"], t, s, None))(given["target"], given["source"])
            return one_matrix(given["params"], given["target"], given["source"], given["true"])

        new = map_routes(one_route, own)
        leaves, first = {}, 0
        for part, one, true in zip(batch.parts, prepared, batch.part_sizes, strict=True):
            new_part = new[first : first + len(part.routes)]
            if batch.padded:
                new_part = new_part[:, : true.m, : true.n]
            first += len(part.routes)
            route = part.routes[0]
            finished = map_routes(
                lambda stacked, route=route: _finish(route, stacked["prepared"], stacked["new"]),
                {"prepared": one, "new": new_part},
            )
            leaves |= unstack_leaves(part, finished, targets)
        return leaves

    def move(
        batches: tuple[PaddedBatch, ...], adapter: Adapter, sources: ByPath, targets: ByPath, key: Key, step: Step
    ) -> ByPath:
        gate_value = None if gate is None else schedule_value(gate, step, "the gate")
        masks = [None] * len(batches) if key is None else net.masks(key, [batch.sizes for batch in batches])
        new_leaves = {}
        for batch, batch_masks in zip(batches, masks, strict=True):
            params = adapter_entry(batch.name, adapter, adapter_shapes(batches)[batch.name])
            new_leaves |= move_batch(batch, gate_value, batch_masks, params, sources, targets)
        return new_leaves

    def route_cost(batch: RouteBatch) -> tuple[int, int]:
        """Returns the parameters and operations of one route of a batch, without padding."""
        route = batch.routes[0]
        alone = PaddedBatch((RouteBatch(batch.routes[:1], (0,)),), (_network_sizes(batch),))
        params = adapter_shapes((alone,))[batch.name]
        parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        if net.flops is not None and route.rank is None:
            heads = route.target_view.heads if isinstance(route.target_view, AttentionView) else 1
            return parameters, heads * net.flops(_network_sizes(batch))
        leaves = [
            {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in zip(paths, view.shapes, strict=True)}
            for paths, view in ((route.source, route.source_view), (route.target, route.target_view))
        ]
        return parameters, count_flops(functools.partial(move_batch, alone, 0.0, None), params, *leaves)

    def costs(batches: tuple[PaddedBatch, ...]) -> dict[int, RouteCost]:
        found: dict[int, RouteCost] = {}
        for batch in batches:
            for part in batch.parts:
                size, flops = route_cost(part)
                for i, number in enumerate(part.numbers):
                    found[number] = RouteCost(batch.name, 0 if shared and i else size, flops)
        return found

    def monitor(batches: tuple[PaddedBatch, ...], adapter: Adapter, step: Step) -> Metrics:
        if output == "published":
            return {}
        if gate is not None:
            return {"gate": jnp.asarray(schedule_value(gate, step, "the gate"), jnp.float32)}
        gates: dict[str, jax.Array] = {}
        for batch in batches:
            learned = jnp.broadcast_to(adapter[batch.name]["gate"], len(batch.routes))
            gates |= {f"gate/{route.target[0]}": learned[i] for i, route in enumerate(batch.routes)}
        return gates

    return routed_transfer(
        named_routes, padded_batches, move, start=start, costs=costs, monitor=monitor, rank=rank, view=view
    )


class _Prepared(NamedTuple):
    """The inputs of a route's network, and the matrix that its output is decoded into.

    Attributes:
      target: the target's matrix, `[m, n]` or one per head, or its code.
      source: the same of the source.
      whole: the target's matrix, if `target` is its code.
      basis: of the code.
    """

    target: jax.Array
    source: jax.Array
    whole: jax.Array | None = None
    basis: jax.Array | None = None


def _finish(route: ResolvedRoute, prepared: _Prepared, new: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the new target leaves of a route."""
    if prepared.whole is not None and prepared.basis is not None:
        new = decode(prepared.whole, new - prepared.target, prepared.basis)
    return route.target_view.to_leaves(route.target_view.from_matrix(new))


def _network_sizes(batch: RouteBatch) -> Sizes:
    """Returns the sizes of the network's matrices."""
    route = batch.routes[0]
    shapes = []
    for view in (route.target_view, route.source_view):
        shape = view.matrix_shape
        if _encodes(route.rank, shape, view is route.target_view):
            shape = (route.rank, shape[1])
        shapes += shape
    return Sizes(*shapes)


def _token_types(batch: RouteBatch) -> tuple[TokenTypes, TokenTypes] | None:
    target, source = batch.routes[0].target_view.token_types, batch.routes[0].source_view.token_types
    return None if target is None or source is None else (target, source)


def _token_type_starts(types: tuple[TokenTypes, TokenTypes] | None, sizes: Sizes) -> dict[str, Start]:
    if types is None:
        return {}
    return {
        "target_token_types": Start((types[0].count, sizes.n), _TOKEN_TYPE_BOUND),
        "source_token_types": Start((types[1].count, sizes.q), _TOKEN_TYPE_BOUND),
    }


def _padded(matrices: jax.Array, shape: Sequence[int]) -> jax.Array:
    return matrices if matrices.ndim > 3 else pad_to(matrices, shape)


def _root_mean_square(matrix: jax.Array, size: Any) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(matrix)) / size + _EPSILON)


def _encodes(rank: int | None, shape: tuple[int, ...], is_target: bool) -> bool:
    """Returns whether a matrix is re-encoded; a source of no higher rank stays whole, as encoding saves nothing."""
    return rank is not None and (is_target or min(shape) > rank)
