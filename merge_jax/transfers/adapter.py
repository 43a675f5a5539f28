"""Transfers with an adapter: each route's matrices go through a network that is learned."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from merge_jax.checks import check_at_least_one, check_choice, check_flag, check_number_or_schedule
from merge_jax.paths import flatten, replace
from merge_jax.transfers.base import RoutedTransfer, left_out_summaries, route_summary
from merge_jax.transfers.batching import Batch, Group, adapter_of, batched, grouped, map_routes, stack_group, unstack
from merge_jax.transfers.cost import count_flops
from merge_jax.transfers.low_rank import core_bases, decode, encode, row_basis
from merge_jax.transfers.matrix_layers import pad_to
from merge_jax.transfers.network import Network, Place, Sizes, Start, cannot_be_had, draw, linen_network, stack_starts
from merge_jax.transfers.routes import ResolvedRoute, Routes, as_routes, check_rank, check_view, resolve, survey
from merge_jax.transfers.views import AttentionView, Kinds, ViewName, proportional
from merge_jax.types import Adapter, ApplyFn, Metrics, Params, RouteSummary, Transfer

__all__ = ["AdapterOptions", "OutputForm", "adapter_transfer"]

OutputForm = Literal["official", "residual", "warm"]
"""How the adapter's output becomes the new target leaf; see `adapter_transfer`."""

# Keeps the root mean square of a zero matrix, and its gradient, finite.
_EPSILON = 1e-12
_EXTRAS = 2**32 - 1  # No number of a route, which the keys of modules are folded with.
# Half the width of a uniform distribution of deviation 0.1: the start of what tokens learn of their kind.
_KIND_BOUND = (np.full((1, 1), 0.1 * 3**0.5),)


class AdapterOptions(TypedDict, total=False):
    """Options that every adapter has; see `adapter_transfer`."""

    output: OutputForm
    rank: int | None
    core: bool
    view: ViewName
    gate: float | optax.Schedule | None
    shared: bool
    group_size: int | None
    padding: float


def adapter_transfer(
    routes: Routes,
    network: Network | nn.Module,
    *,
    output: OutputForm = "warm",
    rank: int | None = None,
    core: bool = False,
    view: ViewName = "matrix",
    gate: float | optax.Schedule | None = None,
    shared: bool = False,
    group_size: int | None = None,
    padding: float = 2.0,
) -> Transfer:
    """Returns the transfer whose matrices go through a network `F(T, S) -> T'`.

    With `T` the target's matrix, `S` the source's, `W` the target with the source's overlapping block copied in,
    `s` and `s_S` root mean squares, and `g` the gate:

    - `official`: `T' = F(T, S)`, as published for LPKA.
    - `residual`: `T' = T + g s (F(T/s, S/s_S) - T/s)`; starts as the identity.
    - `warm`: `T' = W + g s (F(W/s, S/s_S) - W/s)`; starts as `share_transfer` and learns from there. As there, every
      transfer overwrites what the target has learned in the overlap, so stop it early in a run
      (`make_joint_step(..., stop=0.1, num_steps=...)`), or let it fade out (`scheduled`).

    In the last two a gate of 0 is the identity, and both matrices meet at the scale that attention expects. The target
    keeps its scale, which the published output replaces: only a following BatchNorm forgives that.

    **Rank.** At rank `r` the network sees and makes `A = B^T T [r, n]` instead of `T [m, n]`, with `B` the leading
    directions of `T` (`row_basis`), and `T' = T + B (A' - A)`: what rank `r` does not see is kept. The source is
    re-encoded alike, unless it is as small already. With `core`, both are `r x r`: `B^T T D`.

    **Tokens that know what they are.** In the views `convolution` and `attention` the rows of a matrix are of several
    kinds: a place in the window, or query, key, value and output. The network gets `T/s + E[kind of row]`, with a
    learned table for each side.

    **Routes of one kind** (equal shapes, rank and view) run as one `vmap`ped group. The adapter is
    `{target path: parameters}`, with one entry a group, named after its first route; the parameters are stacked
    along a first axis where the group has several routes, or `shared` by them. Unlike but small matrices make one group
    too, with zeros around matrices and parameters, which changes values by rounding alone (for an LPKA; a module of
    your own gets whole matrices). Routes of a group have the same dropout masks, new ones at every step.

    Computation is in float32 unless the network has it otherwise; a new leaf has the dtype of the old. Without a
    key, `apply` is deterministic; with one, dropout is on. Source: arXiv:2404.13322; `residual`, `warm`, `core`,
    padding and sharing are our choice.

    Args:
      routes: `{target path: source path}`, or a sequence of such pairs or of `Route`s; paths may be patterns.
      network: such as `lpka_network(LPKAOptions())`, or a Flax module `(T, S, *, deterministic) -> T'` of your own.
      output: one of the three forms above.
      rank: the rank of routes that name none; None for whole matrices.
      core: whether a re-encoded matrix is encoded from both sides.
      view: the view of routes that name none; see `Route`.
      gate: None for a learned scalar that starts at 0; a number, or a schedule of the joint step's count.
      shared: whether the routes of a group share one adapter.
      group_size: at most so many routes run at once, to bound memory; None for all.
      padding: how many times their own work unlike matrices may cost as one program, 1 or more. At 1 unlike shapes
        stay apart: what is run is least, what is compiled is most.

    Raises:
      ValueError: here, for no routes, a target routed twice, or an option out of range; in `init` and `apply`,
        for a path or pattern that is not there (near misses are listed), leaves that cannot be paired, a leaf
        that is not a float array, or a rank above a matrix; in `apply`, for an adapter of other routes.
    """
    named_routes = as_routes(routes)
    check_view(view)
    if rank is not None:
        check_rank(rank)
    check_choice("output form", output, get_args(OutputForm))
    if gate is not None and output == "official":
        raise ValueError("the output form 'official' has no gate; use 'residual' or 'warm'")
    if group_size is not None:
        check_at_least_one(group_size=group_size)
    check_flag(core=core, shared=shared)
    if core and rank is None and not any(isinstance(route.rank, int) for route in named_routes):
        raise ValueError("core encodes from both sides at a rank, but neither the transfer nor a route has one")
    if gate is not None:
        check_number_or_schedule(gate=gate)
    if isinstance(padding, bool) or not isinstance(padding, (int, float)) or not padding >= 1:
        raise ValueError(f"padding must be a number of at least 1, got {padding!r}")
    net = linen_network(network) if isinstance(network, nn.Module) else network

    def sizes_of(group: Group) -> Sizes:
        """Returns the sizes of what the network maps."""
        route = group.routes[0]
        shapes = []
        for one in (route.target_view, route.source_view):
            shape = one.matrix_shape
            if _encodes(route.rank, shape, one is route.target_view):
                shape = (route.rank, route.rank if core else shape[1])
            shapes += shape
        return Sizes(*shapes)

    def batches_of(source_params: Params, target_params: Params) -> tuple[Batch, ...]:
        return in_batches(resolve(named_routes, source_params, target_params, rank=rank, view=view))

    def in_batches(resolved: tuple[ResolvedRoute, ...]) -> tuple[Batch, ...]:
        groups = grouped(resolved)
        alone = [group for group in groups if shared or net.true is None or net.flops is None or _kinds(group)]
        together = [group for group in groups if group not in alone]
        batches = [Batch((group,), (sizes_of(group),)) for group in alone]
        if net.flops is not None:
            for group in groups:
                with cannot_be_had(group.name):
                    net.flops(sizes_of(group))
            batches += batched(together, [sizes_of(group) for group in together], net.flops, padding)
        return tuple(sorted(batches, key=lambda batch: batch.groups[0].numbers))

    # Compiled, since small arrays made one by one take long.
    @functools.partial(jax.jit, static_argnums=1)
    def init_batches(key: jax.Array, batches: tuple[Batch, ...]) -> Adapter:
        places, extras = {}, {}
        for batch in batches:
            copied = len(batch.routes) > 1 and not shared
            true = batch.true if copied else batch.true[:1]
            places[batch.name] = Place(batch.sizes, true, copied)
            extra = _kind_starts(_kinds(batch.groups[0]), batch.sizes)
            if output != "official" and gate is None:
                extra["gate"] = Start(())
            extras[batch.name] = stack_starts([extra] * len(true)) if copied else extra
        made, extras = net.init(key, places), draw(jax.random.fold_in(key, _EXTRAS), extras)
        # Of the published form are the parameters those of the network, as published.
        return {
            name: params if output == "official" and not extras[name] else {**extras[name], "proposal": params}
            for name, params in made.items()
        }

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        return init_batches(key, batches_of(source_params, target_params))

    @functools.lru_cache(maxsize=8)
    def adapter_shapes(batches: tuple[Batch, ...]) -> Adapter:
        return jax.eval_shape(lambda key: init_batches(key, batches), jax.random.key(0))

    def prepare(route: ResolvedRoute, target: Sequence[jax.Array], source: Sequence[jax.Array]) -> "_Prepared":
        """Returns the matrices of a route, encoded where it has a rank."""
        target_view, source_view = route.target_view, route.source_view
        blocks = target_view.to_blocks([leaf.astype(jnp.float32) for leaf in target])
        source_blocks = source_view.to_blocks([leaf.astype(jnp.float32) for leaf in source])
        if output == "warm":
            blocks = target_view.overlap(blocks, source_view, source_blocks)  # type: ignore[arg-type]
        matrix, source_matrix = target_view.to_matrix(blocks), source_view.to_matrix(source_blocks)
        if isinstance(target_view, AttentionView) and isinstance(source_view, AttentionView):
            partners = jnp.array(proportional(target_view.heads, source_view.heads))
            return _Prepared(matrix, source_matrix[partners])
        if route.rank is None:
            return _Prepared(matrix, source_matrix)
        bases = _bases(matrix, route.rank, core)
        if _encodes(route.rank, source_matrix.shape, False):
            source_matrix = encode(source_matrix, *_bases(source_matrix, route.rank, core))
        return _Prepared(encode(matrix, *bases), source_matrix, matrix, bases)

    def finish(route: ResolvedRoute, prepared: "_Prepared", new: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the new target leaves of a route."""
        if prepared.whole is not None:
            new = decode(prepared.whole, new - prepared.target, *prepared.bases)
        return route.target_view.to_leaves(route.target_view.from_matrix(new))

    def propose(
        kinds: tuple[Kinds, Kinds] | None,
        gate_now: Any,
        masks: Any,
        params: Adapter,
        target: jax.Array,
        source: jax.Array,
        true: Any,
    ) -> jax.Array:
        """Returns the new matrix for one target matrix and one source matrix."""
        known = None if true is None else true["network"]

        def new(target: jax.Array, source: jax.Array) -> jax.Array:
            if kinds is None and output == "official":
                return net.apply(params, target, source, masks, known)
            if kinds is not None:
                target = target + params["target_kinds"][kinds[0].of_rows()]
                source = source + params["source_kinds"][kinds[1].of_rows()]
            return net.apply(params["proposal"], target, source, masks, known)

        if output == "official":
            return new(target, source)
        m, n, p, q = (*target.shape, *source.shape) if true is None else true["sizes"]
        scale, source_scale = _root_mean_square(target, m * n), _root_mean_square(source, p * q)
        normalised = target / scale
        opened = params["gate"] if gate is None else gate_now
        return target + opened * scale * (new(normalised, source / source_scale) - normalised)

    def move_batch(
        batch: Batch,
        gate_now: Any,
        masks: Any,
        params: Adapter,
        sources: Mapping[str, jax.Array],
        targets: Mapping[str, jax.Array],
    ) -> dict[str, jax.Array]:
        """Returns the new target leaves of a batch's routes by path."""
        prepared = []
        for group in batch.groups:
            each, all_alike = stack_group(group, sources, targets)
            route = group.routes[0]
            prepared.append(
                map_routes(lambda of, route=route, alike=all_alike: prepare(route, **{**alike, **of}), each, group_size)
            )
        each = {
            "target": jnp.concatenate([_padded(one.target, batch.sizes[:2]) for one in prepared]),
            "source": jnp.concatenate([_padded(one.source, batch.sizes[2:]) for one in prepared]),
        }
        fixed = {"params": params}
        if len(batch.routes) > 1 and not shared:
            each, fixed = {**each, **fixed}, {}
        if batch.padded and net.true is not None:
            of_routes = [{"sizes": true, "network": net.true(true)} for true in batch.true]
            each["true"] = jax.tree.map(lambda *sizes: jnp.asarray(sizes), *of_routes)
        kinds = _kinds(batch.groups[0])
        one_matrix = functools.partial(propose, kinds, gate_now, masks)

        def one_route(of_route: dict[str, Any]) -> jax.Array:
            given = {"true": None, **fixed, **of_route}
            if given["target"].ndim == 3:  # A matrix a head, which share the adapter.
                return jax.vmap(lambda t, s: one_matrix(given["params"], t, s, None))(given["target"], given["source"])
            return one_matrix(given["params"], given["target"], given["source"], given["true"])

        new = map_routes(one_route, each, group_size)
        leaves, start = {}, 0
        for group, one, true in zip(batch.groups, prepared, batch.group_sizes, strict=True):
            of_group = new[start : start + len(group.routes)]
            if batch.padded:
                of_group = of_group[:, : true.m, : true.n]
            start += len(group.routes)
            route = group.routes[0]
            finished = map_routes(
                lambda of, route=route: finish(route, of["prepared"], of["new"]),
                {"prepared": one, "new": of_group},
                group_size,
            )
            leaves |= unstack(group, finished, targets)
        return leaves

    def apply_with(gate_now: Any) -> ApplyFn:
        def apply(
            adapter: Adapter, source_params: Params, target_params: Params, *, key: jax.Array | None = None
        ) -> Params:
            if callable(gate_now):
                raise ValueError("the gate follows a schedule: name the step, as in transfer.at(step).apply(...)")
            batches = batches_of(source_params, target_params)
            masks = [None] * len(batches) if key is None else net.masks(key, [batch.sizes for batch in batches])
            new_leaves, sources, targets = {}, flatten(source_params), flatten(target_params)
            for batch, of_batch in zip(batches, masks, strict=True):
                params = adapter_of(batch.name, adapter, adapter_shapes(batches)[batch.name])
                new_leaves |= move_batch(batch, gate_now, of_batch, params, sources, targets)
            return replace(target_params, new_leaves)

        return apply

    def costs_of(group: Group) -> tuple[int, int]:
        """Returns the parameters and the operations of one route of a group, as on its own."""
        route = group.routes[0]
        alone = Batch((Group(group.routes[:1], (0,)),), (sizes_of(group),))
        params = adapter_shapes((alone,))[group.name]
        parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        if net.flops is not None and route.rank is None:
            heads = route.target_view.heads if isinstance(route.target_view, AttentionView) else 1
            return parameters, heads * net.flops(sizes_of(group))
        leaves = [
            {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in zip(paths, one.shapes, strict=True)}
            for paths, one in ((route.source, route.source_view), (route.target, route.target_view))
        ]
        return parameters, count_flops(functools.partial(move_batch, alone, 0.0, None), params, *leaves)

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        rows: dict[int, RouteSummary] = {}
        resolved, left_out = survey(named_routes, source_params, target_params, rank=rank, view=view)
        for batch in in_batches(resolved):
            for group in batch.groups:
                size, flops = costs_of(group)
                for i, (number, route) in enumerate(zip(group.numbers, group.routes, strict=True)):
                    parameters = 0 if shared and i else size
                    rows[number] = route_summary(route, batch.name, core=core, parameters=parameters, flops=flops)
        return (*(rows[number] for number in sorted(rows)), *left_out_summaries(left_out))

    def monitor_with(gate_now: Any) -> Callable[[Adapter, Params, Params], Metrics]:
        def monitor(adapter: Adapter, source_params: Params, target_params: Params) -> Metrics:
            if output == "official" or callable(gate_now):
                return {}
            if gate_now is not None:
                return {"gate": jnp.asarray(gate_now, jnp.float32)}
            gates: dict[str, jax.Array] = {}
            for batch in batches_of(source_params, target_params):
                learned = jnp.broadcast_to(adapter[batch.name]["gate"], len(batch.routes))
                gates |= {f"gate/{route.target[0]}": learned[i] for i, route in enumerate(batch.routes)}
            return gates

        return monitor

    def at(step: jax.Array | int) -> Transfer:
        now = gate(step)  # type: ignore[operator]
        return RoutedTransfer(init, apply_with(now), describe, monitor=monitor_with(now))

    return RoutedTransfer(init, apply_with(gate), describe, at if callable(gate) else None, monitor_with(gate))


class _Prepared(NamedTuple):
    """What a route's network maps, and what its output is put back into.

    Attributes:
      target: the target's matrix, `[m, n]` or one a head, or its code.
      source: the source's.
      whole: the target's matrix, where `target` is its code.
      bases: of the code.
    """

    target: jax.Array
    source: jax.Array
    whole: jax.Array | None = None
    bases: tuple[jax.Array, ...] = ()


def _kinds(group: Group) -> tuple[Kinds, Kinds] | None:
    target, source = group.routes[0].target_view.kinds, group.routes[0].source_view.kinds
    return None if target is None or source is None else (target, source)


def _kind_starts(kinds: tuple[Kinds, Kinds] | None, sizes: Sizes) -> dict[str, Start]:
    if kinds is None:
        return {}
    return {
        "target_kinds": Start((kinds[0].count, sizes.n), _KIND_BOUND),
        "source_kinds": Start((kinds[1].count, sizes.q), _KIND_BOUND),
    }


def _padded(matrices: jax.Array, shape: Sequence[int]) -> jax.Array:
    return matrices if matrices.ndim > 3 else pad_to(matrices, shape)


def _root_mean_square(matrix: jax.Array, size: Any) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(matrix)) / size + _EPSILON)


def _encodes(rank: int | None, shape: tuple[int, ...], is_target: bool) -> bool:
    """Whether a matrix is re-encoded; a source of no higher rank stays whole, there is nothing to gain."""
    return rank is not None and (is_target or min(shape) > rank)


def _bases(matrix: jax.Array, rank: int, core: bool) -> tuple[jax.Array, ...]:
    return core_bases(matrix, rank) if core else (row_basis(matrix, rank),)
