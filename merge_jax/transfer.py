"""Transfers: pairs of pure functions that map a source and a target parameter tree to a new target tree."""

import functools
from collections.abc import Callable
from typing import Any, Literal, Self, TypedDict, get_args

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from merge_jax.checks import check_at_least_one, check_choice, check_flag, check_number_or_schedule
from merge_jax.cost import count_flops
from merge_jax.groups import Group, grouped, run_group
from merge_jax.low_rank import core_bases, decode, encode, row_basis
from merge_jax.paths import flatten, near_misses, replace
from merge_jax.routes import ResolvedRoute, Routes, as_routes, check_rank, check_view, resolve
from merge_jax.stacks import Gated, WithKinds
from merge_jax.types import Adapter, ApplyFn, InitFn, Metrics, Params, RouteSummary, Transfer
from merge_jax.views import AttentionView, ViewName, proportional

__all__ = ["AdapterOptions", "OutputForm", "RoutedTransfer", "adapter_transfer", "identity_transfer", "share_transfer"]

MonitorFn = Callable[[Adapter, Params, Params], Metrics]
"""`(adapter, source_params, target_params) -> scalars by name`; see `Transfer.monitor`."""

OutputForm = Literal["official", "residual", "warm"]
"""How the adapter's output becomes the new target leaf; see `adapter_transfer`."""


class AdapterOptions(TypedDict, total=False):
    """Options that every adapter has; see `adapter_transfer`."""

    output: OutputForm
    rank: int | None
    core: bool
    view: ViewName
    gate: float | optax.Schedule | None
    shared: bool
    group_size: int | None


def adapter_transfer(
    routes: Routes,
    module: nn.Module,
    *,
    output: OutputForm = "warm",
    rank: int | None = None,
    core: bool = False,
    view: ViewName = "matrix",
    gate: float | optax.Schedule | None = None,
    shared: bool = False,
    group_size: int | None = None,
) -> Transfer:
    """Returns the transfer whose matrices go through a module `F(T, S, *, deterministic) -> T'`.

    With `T` the target's matrix, `S` the source's, `W` the target with the source's overlapping block copied in,
    `s` and `s_S` root mean squares, and `g` the gate:

    - `official`: `T' = F(T, S)`, as published for LPKA.
    - `residual`: `T' = T + g s (F(T/s, S/s_S) - T/s)`; starts as the identity.
    - `warm`: `T' = W + g s (F(W/s, S/s_S) - W/s)`; starts as `share_transfer` and learns from there. As there, every
      transfer overwrites what the target has learned in the overlap, so stop it early in a run
      (`make_joint_step(..., stop=0.1, num_steps=...)`), or let it fade out (`scheduled`).

    **Rank.** At rank `r` the module sees and makes `A = B^T T [r, n]` instead of `T [m, n]`, with `B` the leading
    directions of `T` (`row_basis`), and `T' = T + B (A' - A)`: what rank `r` does not see is kept. The source is
    re-encoded alike, unless it is as small already. With `core`, both are `r x r`: `B^T T D`.

    **Routes of one kind** (equal shapes, rank and view) run as one `vmap`ped group. The adapter is
    `{target path: parameters}`, with one entry a group, named after its first route; the parameters are stacked
    along a first axis where the group has several routes, or `shared` by them. Routes of a group have the same
    dropout masks, new ones at every step.

    Computation is in float32 unless the module has it otherwise; a new leaf has the dtype of the old. Without a
    key, `apply` is deterministic; with one, dropout is on. Source: arXiv:2404.13322; `residual`, `warm`, `core`
    and sharing are our choice.

    Args:
      routes: `{target path: source path}`, or a sequence of such pairs or of `Route`s; paths may be patterns.
      module: a Flax module, such as `LPKA()`, or one of your own.
      output: one of the three forms above.
      rank: the rank of routes that name none; None for whole matrices.
      core: whether a re-encoded matrix is encoded from both sides.
      view: the view of routes that name none; see `Route`.
      gate: None for a learned scalar that starts at 0; a number, or a schedule of the joint step's count.
      shared: whether the routes of a group share one adapter.
      group_size: at most so many routes of a group run at once, to bound memory; None for all.

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

    def groups_of(source_params: Params, target_params: Params) -> tuple[Group, ...]:
        return grouped(resolve(named_routes, source_params, target_params, rank=rank, view=view))

    def module_of(route: ResolvedRoute) -> nn.Module:
        of_route = module
        target_kinds, source_kinds = route.target_view.kinds, route.source_view.kinds
        if target_kinds is not None and source_kinds is not None:
            of_route = WithKinds(module, target_kinds, source_kinds)
        return of_route if output == "official" else Gated(of_route, learned=gate is None)

    def code_shapes(route: ResolvedRoute) -> list[jax.ShapeDtypeStruct]:
        """Returns the shapes of what the module maps."""
        shapes = []
        for one in (route.target_view, route.source_view):
            shape = one.matrix_shape
            if _encodes(route.rank, shape, one is route.target_view):
                shape = (route.rank, route.rank if core else shape[1])
            shapes.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        return shapes

    # Compiled, since hundreds of small random arrays made one by one take seconds; lazy, since a forward pass
    # would tell no more than its shapes do.
    @functools.partial(jax.jit, static_argnums=1)
    def init_groups(key: jax.Array, groups: tuple[Group, ...]) -> Adapter:
        adapter = {}
        gates: dict[str, Any] = {} if gate is None else {"gate": 0.0}
        for group in groups:

            def init_one(number: Any, route: ResolvedRoute = group.routes[0]) -> Any:
                of_one = jax.random.fold_in(key, number)
                return module_of(route).lazy_init(of_one, *code_shapes(route), **gates).get("params", {})

            stacked = len(group.routes) > 1 and not shared
            try:
                init_all = jax.vmap(init_one) if stacked else init_one
                adapter[group.name] = init_all(jnp.array(group.numbers) if stacked else group.numbers[0])
            except ValueError as error:
                raise ValueError(f"the route to {group.name!r} cannot be had: {error}") from None
        return adapter

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        return init_groups(key, groups_of(source_params, target_params))

    def merge(
        route: ResolvedRoute,
        gate_now: Any,
        params: Adapter,
        target: tuple[jax.Array, ...],
        source: tuple[jax.Array, ...],
        key: jax.Array | None,
    ) -> tuple[jax.Array, ...]:
        """Returns the new target leaves of one route."""
        of_route = module_of(route)
        gates = {} if gate is None else {"gate": gate_now}

        def propose(target: jax.Array, source: jax.Array) -> jax.Array:
            rngs = None if key is None else {"dropout": key}
            new = of_route.apply({"params": params}, target, source, deterministic=key is None, rngs=rngs, **gates)
            return jnp.asarray(new)

        target_view, source_view = route.target_view, route.source_view
        blocks = target_view.to_blocks([leaf.astype(jnp.float32) for leaf in target])
        source_blocks = source_view.to_blocks([leaf.astype(jnp.float32) for leaf in source])
        if output == "warm":
            blocks = target_view.overlap(blocks, source_view, source_blocks)  # type: ignore[arg-type]
        matrix, source_matrix = target_view.to_matrix(blocks), source_view.to_matrix(source_blocks)
        if isinstance(target_view, AttentionView) and isinstance(source_view, AttentionView):
            partners = jnp.array(proportional(target_view.heads, source_view.heads))
            new = jax.vmap(propose)(matrix, source_matrix[partners])
        elif route.rank is not None:
            bases = _bases(matrix, route.rank, core)
            code = encode(matrix, *bases)
            if _encodes(route.rank, source_matrix.shape, False):
                source_matrix = encode(source_matrix, *_bases(source_matrix, route.rank, core))
            new = decode(matrix, propose(code, source_matrix) - code, *bases)
        else:
            new = propose(matrix, source_matrix)
        return target_view.to_leaves(target_view.from_matrix(new))

    def apply_with(gate_now: Any) -> ApplyFn:
        def apply(
            adapter: Adapter, source_params: Params, target_params: Params, *, key: jax.Array | None = None
        ) -> Params:
            if callable(gate_now):
                raise ValueError("the gate follows a schedule: name the step, as in transfer.at(step).apply(...)")
            new_leaves, sources, targets = {}, flatten(source_params), flatten(target_params)
            for group in groups_of(source_params, target_params):
                if group.name not in adapter:
                    raise ValueError(
                        f"the adapter has nothing for the route to {group.name!r}; was it made for other routes or "
                        f"models? {near_misses(group.name, adapter)}"
                    )
                move = functools.partial(merge, group.routes[0], gate_now)
                try:
                    new_leaves |= run_group(
                        group,
                        move,
                        sources,
                        targets,
                        params=adapter[group.name],
                        shared=shared,
                        key=None if key is None else jax.random.fold_in(key, group.numbers[0]),
                        group_size=group_size,
                    )
                except (flax.errors.ScopeParamShapeError, flax.errors.ScopeParamNotFoundError) as error:
                    raise ValueError(
                        f"the adapter of the route to {group.name!r} does not fit; was it made with other options, or "
                        f"for other models? {error}"
                    ) from None
            return replace(target_params, new_leaves)

        return apply

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        groups = groups_of(source_params, target_params)
        adapter = jax.eval_shape(lambda key: init_groups(key, groups), jax.random.key(0))
        rows: dict[int, RouteSummary] = {}
        for group in groups:
            count, first = len(group.routes), group.routes[0]
            of_one = adapter[group.name]
            if count > 1 and not shared:
                of_one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), of_one)
            size = sum(leaf.size for leaf in jax.tree.leaves(of_one))
            leaves = [
                tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in one.shapes)
                for one in (first.target_view, first.source_view)
            ]
            flops = count_flops(functools.partial(merge, first, 0.0, key=None), of_one, *leaves)
            for i, (number, route) in enumerate(zip(group.numbers, group.routes, strict=True)):
                parameters = 0 if shared and i else size
                rows[number] = _summary(route, group.name, core=core, parameters=parameters, flops=flops)
        return tuple(rows[number] for number in sorted(rows))

    def monitor_with(gate_now: Any) -> MonitorFn:
        def monitor(adapter: Adapter, source_params: Params, target_params: Params) -> Metrics:
            if output == "official" or callable(gate_now):
                return {}
            if gate_now is not None:
                return {"gate": jnp.asarray(gate_now, jnp.float32)}
            gates: dict[str, jax.Array] = {}
            for group in groups_of(source_params, target_params):
                learned = jnp.broadcast_to(adapter[group.name]["gate"], len(group.routes))
                gates |= {f"gate/{route.target[0]}": learned[i] for i, route in enumerate(group.routes)}
            return gates

        return monitor

    def at(step: jax.Array | int) -> Transfer:
        now = gate(step)  # type: ignore[operator]
        return RoutedTransfer(init, apply_with(now), describe, monitor=monitor_with(now))

    return RoutedTransfer(init, apply_with(gate), describe, at if callable(gate) else None, monitor_with(gate))


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

            def share(
                params: Adapter, target: Any, source: Any, key: Any, route: ResolvedRoute = route
            ) -> tuple[jax.Array, ...]:
                del params, key
                blocks = route.target_view.overlap(
                    route.target_view.to_blocks(target),
                    route.source_view,  # type: ignore[arg-type]
                    route.source_view.to_blocks(source),
                )
                return route.target_view.to_leaves(blocks)

            new_leaves |= run_group(group, share, sources, targets)
        return replace(target_params, new_leaves)

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        resolved = resolve(named_routes, source_params, target_params, view=view)
        return tuple(_summary(route, "", parameters=0, flops=0) for route in resolved)

    return RoutedTransfer(init, apply, describe)


def identity_transfer() -> Transfer:
    """Returns the transfer that moves nothing: `T' = T`. The baseline "vanilla"; the adapter is empty."""

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        del key, source_params, target_params  # There is nothing to learn.
        return {}

    def apply(
        adapter: Adapter,
        source_params: Params,
        target_params: Params,
        *,
        key: jax.Array | None = None,
    ) -> Params:
        del adapter, source_params, key  # Nothing moves.
        return target_params

    return Transfer(init, apply)


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

    def at(self, step: jax.Array | int, /) -> Transfer:
        """Returns the transfer as it is at a step."""
        return self if self._at is None else self._at(step)

    def describe(self, source_params: Params, target_params: Params, /) -> tuple[RouteSummary, ...]:
        """Returns what each route is and costs."""
        return self._describe(source_params, target_params)

    def monitor(self, adapter: Adapter, source_params: Params, target_params: Params, /) -> Metrics:
        """Returns the gates."""
        return {} if self._monitor is None else self._monitor(adapter, source_params, target_params)


def _encodes(rank: int | None, shape: tuple[int, ...], is_target: bool) -> bool:
    """Whether a matrix is re-encoded; a source of no higher rank stays whole, there is nothing to gain."""
    return rank is not None and (is_target or min(shape) > rank)


def _bases(matrix: jax.Array, rank: int, core: bool) -> tuple[jax.Array, ...]:
    return core_bases(matrix, rank) if core else (row_basis(matrix, rank),)


def _summary(route: ResolvedRoute, adapter: str, *, core: bool = False, parameters: int, flops: int) -> RouteSummary:
    target_view = route.target_view
    if isinstance(target_view, AttentionView):
        view = f"attention, {target_view.heads} heads"
    else:
        view = "convolution" if target_view.taps else "matrix"
    return RouteSummary(
        " + ".join(route.target),
        " + ".join(route.source),
        target_view.shapes,
        target_view.matrix_shape,
        route.source_view.matrix_shape,
        view,
        route.rank,
        core and route.rank is not None,
        adapter,
        parameters,
        flops,
    )
