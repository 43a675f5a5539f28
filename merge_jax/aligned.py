"""Alignment: channels of a source are chosen for the target's, alike in all layers that share them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.blocks import kernel_routes
from merge_jax.channel_wiring import Wiring
from merge_jax.cost import count_flops
from merge_jax.matrices import overlap_blocks
from merge_jax.paths import flatten, near_misses, replace
from merge_jax.routes import ResolvedRoute, Routes, resolve
from merge_jax.selection import choice_matrix, evenly_chosen
from merge_jax.transfer import RoutedTransfer, share_transfer
from merge_jax.types import Adapter, ApplyFn, InitFn, Params, RouteSummary
from merge_jax.views import KernelView

__all__ = ["AlignedTransfer", "aligned_transfer"]

_RIDGE = 1e-4
_EPSILON = 1e-6


class _Axis(NamedTuple):
    """One axis of channels of a routed leaf.

    Attributes:
      target: its place in the target's leaf.
      source: its place in the source's leaf.
      pair: name of the pair of spaces that it belongs to.
      contracted: whether it is summed over with what enters the layer.
      sizes: of the target's axis and of the source's.
    """

    target: int
    source: int
    pair: str
    contracted: bool
    sizes: tuple[int, int]


class _Leaf(NamedTuple):
    """A routed leaf: its paths, views and shapes with rows arranged, its axes of channels, and those of the windows."""

    target: str
    source: str
    views: tuple[KernelView, KernelView]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    axes: tuple[_Axis, ...]
    windows: tuple[tuple[int, ...], tuple[int, ...]]

    def input_name(self, axis: _Axis) -> str:
        """Returns the name that the matrix of a contracted axis has in the adapter."""
        return f"{self.target}:{axis.target}"


class _Plan(NamedTuple):
    """The routes of two models: the leaves, and for each pair of spaces its sizes and the source's space."""

    leaves: tuple[_Leaf, ...]
    pairs: Mapping[str, tuple[tuple[int, int], str]]

    def made(self) -> set[str]:
        """Returns the pairs whose channels a routed leaf makes; what reads the others reads channels of its own."""
        return {axis.pair for leaf in self.leaves for axis in leaf.axes if not axis.contracted}


class AlignedTransfer(RoutedTransfer):
    """A transfer whose adapter can be had in closed form from what enters the source's layers."""

    _fit: Callable[[Mapping[str, jax.Array], Params, Params], Adapter]

    def __new__(  # noqa: D102
        cls,
        init: InitFn,
        apply: ApplyFn,
        describe: Callable[[Params, Params], tuple[RouteSummary, ...]],
        fit: Callable[[Mapping[str, jax.Array], Params, Params], Adapter],
    ) -> Self:
        self = super().__new__(cls, init, apply, describe)
        self._fit = fit
        return self

    def fit(self, moments: Mapping[str, jax.Array], source_params: Params, target_params: Params, /) -> Adapter:
        """Returns the adapter that keeps most of what the source's layers compute.

        Channels are chosen one after the other, each the one from which, along with those before it, all channels of
        the space can best be had by a linear map, over all layers that read them. Each of these layers then gets that
        map: with `G` the second moments of its input and `c` the channels that were chosen, `R = (G_cc + r I)^-1 G_c`,
        with `r` 1e-4 of the mean of `G_cc`'s diagonal. Spaces and layers without moments stay as `init` has them. It
        may be jitted.

        Sources: the choice is orthogonal matching pursuit on channels; the map is the reconstruction of channel pruning
        (He et al., arXiv:1707.06168). To do both for two given networks, tied over layers, is our choice.

        Args:
          moments: of the source, from `input_moments` on inputs such as the target will see; no labels are needed.
          source_params: the source's parameters.
          target_params: the target's parameters, for their shapes.

        Raises:
          ValueError: moments of another size than the layer's input, or as `init`.
        """
        return self._fit(moments, source_params, target_params)


def aligned_transfer(routes: Routes, source_wiring: Wiring, target_wiring: Wiring) -> AlignedTransfer:
    """Returns the transfer that takes channels of the source over as wholes, tied over all layers that share them.

    `T' = A S R^T` for a layer's kernel, each tap of a window on its own. `A [m, p]` makes the target's `m` channels of
    the source's `p`, and is one matrix for all leaves that touch those channels: kernels, biases, norms, residual sums.
    `R [m, q]` tells a layer how the source's `q` input channels are had from the target's `m`; each layer has its own.
    So a layer of the target that gets the chosen channels computes what the source's does, as well as can be had, where
    a copy of each layer's own block (`share_transfer`) reads channels that are not where they were.

    `init` chooses channels evenly, and `A` and `R` are 0 and 1: weight selection (arXiv:2311.18823) with tied choices.
    `fit` has the better start, from data. Both are learned from there like any adapter; they are LiGO's operators
    (arXiv:2303.00980), tied along the wiring. Where the target has more channels, the source's come first, what reads
    them does not read the others, and the rest of the target stays, so that a wider target computes what the source
    does. Windows meet at their centres; what a larger window has around is 0.

    Route all leaves that the models have in common, norms and biases as well, such as `["**=**"]`, but for last layers
    of other labels. It is a start: let it write once (`make_joint_step(..., stop=1 / num_steps, num_steps=...)`), since
    each transfer overwrites what the target has learned. Our choice.

    Args:
      routes: as `share_transfer`; each of one leaf from one leaf.
      source_wiring: of the source's computation; see `wiring`.
      target_wiring: of the target's.

    The adapter is `{"spaces": {space: A}, "inputs": {leaf:axis: R}}`, float32.

    Raises:
      ValueError: as `share_transfer`; for a route with the view `attention`, several leaves in one, leaves with other
        numbers of channel axes or of other layouts, axes of unequal sizes that nothing reads (labels, tokens), a wiring
        of another model, or, in `apply`, an adapter of other routes.
    """
    named_routes = kernel_routes(routes)
    like_share = share_transfer(named_routes)

    def plan_of(source_params: Params, target_params: Params, *, refuse: bool = True) -> _Plan:
        routes = resolve(named_routes, source_params, target_params, refuse=refuse)
        return _plan(routes, source_wiring, target_wiring)

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        del key  # There is nothing random.
        return _evenly(plan_of(source_params, target_params))

    def apply(
        adapter: Adapter, source_params: Params, target_params: Params, *, key: jax.Array | None = None
    ) -> Params:
        del key
        plan = plan_of(source_params, target_params)
        _check_adapter(adapter, plan)
        sources, targets = flatten(source_params), flatten(target_params)

        def written(leaf: _Leaf) -> jax.Array:
            of_target, of_source = leaf.views
            arranged = of_target.arrange(targets[leaf.target]), of_source.arrange(sources[leaf.source])
            return of_target.restore(_made(leaf, adapter, *arranged))

        return replace(target_params, {leaf.target: written(leaf) for leaf in plan.leaves})

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        rows = like_share.describe(source_params, target_params)  # What cannot be paired is last.
        plan, seen, described = plan_of(source_params, target_params, refuse=False), set(), []
        adapter = jax.eval_shape(lambda: _evenly(plan))
        for row, leaf in zip(rows[: len(plan.leaves)], plan.leaves, strict=True):
            parameters = sum(axis.sizes[0] * axis.sizes[1] for axis in leaf.axes if axis.contracted)
            for pair in {axis.pair for axis in leaf.axes if not axis.contracted} - seen:
                seen.add(pair)
                parameters += plan.pairs[pair][0][0] * plan.pairs[pair][0][1]
            leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in leaf.shapes]
            flops = count_flops(functools.partial(_made, leaf), adapter, *leaves)
            described.append(dataclasses.replace(row, adapter="spaces", parameters=parameters, flops=flops))
        return (*described, *rows[len(plan.leaves) :])

    def fit(moments: Mapping[str, jax.Array], source_params: Params, target_params: Params) -> Adapter:
        plan = plan_of(source_params, target_params)
        return _fitted(plan, source_wiring, moments)

    return AlignedTransfer(init, apply, describe, fit)


def _plan(routes: tuple[ResolvedRoute, ...], source_wiring: Wiring, target_wiring: Wiring) -> _Plan:
    pairs: dict[str, tuple[tuple[int, int], str]] = {}
    leaves = [_leaf(route, source_wiring, target_wiring, pairs) for route in routes]
    for leaf in leaves:
        for axis in leaf.axes:
            target, source = axis.sizes
            arrangement = leaf.views[1].arrangement
            if arrangement is not None and axis.source in arrangement.axes:
                continue  # The route says which rows belong together.
            if target != source and target_wiring.spaces[leaf.target][axis.target] not in target_wiring.read:
                raise ValueError(
                    f"{leaf.target!r} has {target} entries along axis {axis.target}, {leaf.source!r} has {source}, and "
                    "nothing that can be followed reads them, as it is with labels and tokens, and where channels "
                    "are split, merged or looped over: nothing says which to choose. Leave out the route, or give it "
                    "rows=Rows.by_name(source_names, target_names)"
                )
    return _Plan(tuple(leaves), pairs)


def _leaf(
    route: ResolvedRoute,
    source_wiring: Wiring,
    target_wiring: Wiring,
    pairs: dict[str, tuple[tuple[int, int], str]],
) -> _Leaf:
    """Returns the leaf of a route, and enters its pairs of spaces."""
    if len(route.target) != 1 or len(route.source) != 1:
        raise ValueError(
            f"the route to {' + '.join(route.target)!r} joins several leaves, but channels are aligned leaf by leaf"
        )
    (target,), (source,) = route.target, route.source
    views = route.target_view, route.source_view
    assert isinstance(views[0], KernelView)  # The view attention is refused.
    assert isinstance(views[1], KernelView)
    shapes = views[0].arranged_shapes[0], views[1].arranged_shapes[0]
    specs = views[0].specs[0], views[1].specs[0]
    channels = [sorted((*spec.rows, *spec.inputs)) for spec in specs]
    if len(channels[0]) != len(channels[1]):
        raise ValueError(
            f"{target!r} of shape {shapes[0]} has {len(channels[0])} axes of channels, "
            f"{source!r} of shape {shapes[1]} has {len(channels[1])}: they cannot be paired"
        )
    spaces = target_wiring.of(target), source_wiring.of(source)
    for of_leaf, shape, path in zip(spaces, shapes, (target, source), strict=True):
        if len(of_leaf) != len(shape):
            raise ValueError(
                f"the wiring is of another model: {path!r} has {len(of_leaf)} axes there, here {len(shape)}"
            )
    axes = []
    for t, s in zip(*channels, strict=True):
        sizes, (of_target, of_source) = (shapes[0][t], shapes[1][s]), (spaces[0][t], spaces[1][s])
        pair = of_target
        if pairs.setdefault(pair, (sizes, of_source)) != (sizes, of_source):
            pair = f"{of_target} from {of_source}"
            pairs.setdefault(pair, (sizes, of_source))
        contracted = t in target_wiring.inputs[target]
        if contracted != (s in source_wiring.inputs[source]):
            reads, makes = ("target", "source") if contracted else ("source", "target")
            raise ValueError(
                f"{target!r} and {source!r} are of other layouts: axis {t if contracted else s} is an input of the "
                f"{reads}'s layer, and axis {s if contracted else t} none of the {makes}'s"
            )
        axes.append(_Axis(t, s, pair, contracted, sizes))
    return _Leaf(target, source, (views[0], views[1]), shapes, tuple(axes), (specs[0].window, specs[1].window))


def _evenly(plan: _Plan) -> Adapter:
    spaces = {pair: choice_matrix(evenly_chosen(min(m, p), p), m, p) for pair, ((m, p), _) in plan.pairs.items()}
    inputs = {leaf.input_name(axis): spaces[axis.pair] for leaf in plan.leaves for axis in leaf.axes if axis.contracted}
    used = plan.made()
    return {"spaces": {pair: matrix for pair, matrix in spaces.items() if pair in used}, "inputs": inputs}


def _fitted(plan: _Plan, source_wiring: Wiring, moments: Mapping[str, jax.Array]) -> Adapter:
    adapter = _evenly(plan)
    made, channels = plan.made(), {}
    for pair, ((m, p), space) in plan.pairs.items():
        of_space = [
            moments[path]
            for path, axes in source_wiring.inputs.items()
            if path in moments and len(axes) == 1 and source_wiring.spaces[path][axes[0]] == space
        ]
        if m >= p or not of_space or pair not in made:
            continue
        for moment in of_space:
            if moment.shape != (p, p):
                raise ValueError(f"moments of the space {space!r} must be {(p, p)}, got {moment.shape}")
        channels[pair] = _choose(sum(of_space[1:], of_space[0]), m)
        adapter["spaces"][pair] = choice_matrix(channels[pair], m, p)
    for leaf in plan.leaves:
        for axis in leaf.axes:
            if axis.contracted and axis.pair in channels:
                name, chosen = leaf.input_name(axis), channels[axis.pair]
                of_layer = moments.get(leaf.source)
                adapter["inputs"][name] = adapter["spaces"][axis.pair]
                if of_layer is not None and of_layer.shape == (axis.sizes[1],) * 2:
                    adapter["inputs"][name] = _reconstruction(of_layer, chosen)
    return adapter


def _choose(moments: jax.Array, count: int) -> jax.Array:
    """Returns so many channels, in their order, from which all are best had by a linear map."""
    size = moments.shape[0]
    mean = jnp.trace(moments) / size
    start = moments + _EPSILON * mean * jnp.eye(size)

    def add(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, taken = state
        own = jnp.diagonal(left)
        # What of all channels is explained by this one, of what those before leave.
        explained = jnp.where(own > _EPSILON * mean, jnp.sum(jnp.square(left), axis=0) / jnp.maximum(own, 1e-30), 0)
        best = jnp.argmax(jnp.where(taken, -1.0, explained))
        left -= jnp.outer(left[:, best], left[best]) / jnp.maximum(left[best, best], 1e-30)
        return left, taken.at[best].set(True)

    _, taken = lax.fori_loop(0, count, add, (start, jnp.zeros(size, bool)))
    return jnp.flatnonzero(taken, size=count)


def _reconstruction(moments: jax.Array, chosen: jax.Array) -> jax.Array:
    """Returns `R [m, p]` of `fit`."""
    among = moments[chosen][:, chosen]
    ridge = _RIDGE * jnp.trace(among) / among.shape[0] + 1e-30
    return jnp.linalg.solve(among + ridge * jnp.eye(among.shape[0]), moments[chosen])


def _check_adapter(adapter: Adapter, plan: _Plan) -> None:
    shapes = jax.eval_shape(lambda: _evenly(plan))
    for part, expected in shapes.items():
        found = adapter.get(part, {})
        for name, matrix in expected.items():
            if name not in found:
                raise ValueError(
                    f"the adapter has nothing for {name!r}; was it made for other routes or models? "
                    f"{near_misses(name, found)}"
                )
            if found[name].shape != matrix.shape:
                raise ValueError(
                    f"the adapter's {name!r} does not fit; was it made for other models? Expected {matrix.shape}, got "
                    f"{found[name].shape}"
                )


def _made(leaf: _Leaf, adapter: Adapter, target: jax.Array, source: jax.Array) -> jax.Array:
    """Returns the new target leaf."""
    order = [[getattr(axis, role) for axis in leaf.axes] for role in ("target", "source")]
    permutations = [(*channels, *window) for channels, window in zip(order, leaf.windows, strict=True)]
    made, old = source.astype(jnp.float32).transpose(permutations[1]), target.transpose(permutations[0])
    for i, axis in enumerate(leaf.axes):
        matrix = adapter["inputs"][leaf.input_name(axis)] if axis.contracted else adapter["spaces"][axis.pair]
        # The highest precision, since a product with the identity is to give back the source exactly.
        made = jnp.moveaxis(jnp.tensordot(matrix, made, (1, i), precision=lax.Precision.HIGHEST), 0, i)
    # Windows meet at their centres, with 0 around: as blocks whose rows are all the channels.
    channels, wanted = old.shape[: len(leaf.axes)], old.shape[len(leaf.axes) :]
    around = jnp.zeros((math.prod(channels), 1, *wanted), old.dtype)
    made = overlap_blocks(around, made.reshape(math.prod(channels), 1, *made.shape[len(channels) :])).reshape(old.shape)
    for i, axis in enumerate(leaf.axes):
        if not axis.contracted and axis.sizes[0] > axis.sizes[1]:
            rows = jnp.arange(axis.sizes[0]).reshape(-1, *(1,) * (made.ndim - i - 1))
            made = jnp.where(rows < axis.sizes[1], made, old)
    inverse = [permutations[0].index(axis) for axis in range(target.ndim)]
    return made.transpose(inverse)
