"""Alignment: channels of a source are chosen for the target's, alike in all layers that share them."""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.layouts import overlap_blocks
from merge_jax.paths import flatten, near_misses, replace
from merge_jax.transfers.base import RoutedTransfer, share_transfer
from merge_jax.transfers.channels import Wiring
from merge_jax.transfers.cost import count_flops
from merge_jax.transfers.layerwise import kernel_routes
from merge_jax.transfers.memory import free_memory
from merge_jax.transfers.routes import ResolvedRoute, Routes, resolve, survey
from merge_jax.transfers.views import KernelView
from merge_jax.transfers.weight_selection import choice_matrix, evenly_chosen
from merge_jax.types import Adapter, ApplyFn, InitFn, Params, RouteSummary

__all__ = ["AlignedTransfer", "aligned_transfer"]

_RIDGE = 1e-4
_EPSILON = 1e-6
_TIE = 1e-5
_PRECISION = lax.Precision.HIGHEST


class _Axis(NamedTuple):
    """One axis of channels of a routed leaf.

    Attributes:
      target: its place in the target's leaf.
      source: its place in the source's leaf.
      pair: name of the pair of spaces that it belongs to; None where its entries are bound to what is outside of the
        models, and meet one by one.
      around: number, in the leaf, of the axis that its space is within; None where there is none.
      contracted: whether it is only summed over with what enters the layer.
      kept: whether channels that the source has not stay as they are: not where they are summed over as well.
      sizes: of the target's axis and of the source's.
    """

    target: int
    source: int
    pair: str | None
    around: int | None
    contracted: bool
    kept: bool
    sizes: tuple[int, int]


class _Leaf(NamedTuple):
    """A routed leaf: its paths, views and shapes with rows arranged, its axes of channels, and those of the windows."""

    target: str
    source: str
    views: tuple[KernelView, KernelView]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    axes: tuple[_Axis, ...]
    windows: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def reading(self) -> tuple[int, ...]:
        """Numbers of the axes that one matrix of the adapter reads together."""
        return tuple(i for i, axis in enumerate(self.axes) if axis.contracted and axis.pair is not None)

    @property
    def making(self) -> tuple[int, ...]:
        """Numbers of the axes whose channels are made by the matrices of their spaces."""
        return tuple(i for i, axis in enumerate(self.axes) if not axis.contracted and axis.pair is not None)

    @property
    def input_name(self) -> str:
        """The name that the matrix of what it reads has in the adapter."""
        return f"{self.target}:{','.join(str(self.axes[i].target) for i in self.reading)}"


class _Pair(NamedTuple):
    """A space of the target and one of the source.

    Attributes:
      sizes: channels of the target's and of the source's.
      source: the source's space.
      around: name of the pair that it is within; None where it is within none.
    """

    sizes: tuple[int, int]
    source: str
    around: str | None


class _Plan(NamedTuple):
    """The routes of two models: the leaves, and the pairs of spaces by name."""

    leaves: tuple[_Leaf, ...]
    pairs: Mapping[str, _Pair]

    def made(self) -> set[str]:
        """Returns the pairs whose channels a routed leaf makes; what reads the others reads channels of its own."""
        return {str(leaf.axes[i].pair) for leaf in self.leaves for i in leaf.making}

    def outermost_first(self) -> list[str]:
        """Returns the names of the pairs, each after the one that it is within."""
        return sorted(self.pairs, key=lambda name: self.pairs[name].around is not None)


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

    def __getnewargs__(self) -> tuple[Any, ...]:  # noqa: D105
        return (self.init, self.apply, self._describe, self._fit)

    def fit(self, moments: Mapping[str, jax.Array], source_params: Params, target_params: Params, /) -> Adapter:
        """Returns the adapter that keeps most of what the source's layers compute.

        Channels are chosen one after the other, each the one from which, along with those before it, all channels of
        the space can best be had by a linear map, over all layers that read them; so they come in this order, whatever
        their places are. Of channels that are as good, to 1e-5 of the sum of all moments, the one with the larger
        parameters is taken.
        Each layer that reads them then gets that map: with `G` the second moments of its input and `c` the channels
        that were chosen, `R = (G_cc + r I)^-1 G_c`, with `r` 1e-4 of the mean of `G_cc`'s diagonal.

        Heads of attention are chosen by what they add to the output: `G [h, h]` are the moments, summed over the
        outputs, of each head's part of the product with the last kernel. In each head that is chosen, channels of
        queries and keys are chosen by the moments of the products that are summed, and those of values by theirs; the
        last kernel gets one `R` for heads and channels together.

        Spaces and layers without moments stay as `init` has them. It may be jitted.

        Sources: the choice is orthogonal matching pursuit on channels; the map is the reconstruction of channel pruning
        (He et al., arXiv:1707.06168). To do both for two given networks, tied over layers, is our choice; so is what
        heads are measured by, since it does not change where channels of a head change places.

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

    Channels inside heads of attention have one `A [m, p]` for each head of the target, `[h, m, p]`, and a kernel that
    reads heads and channels together has `R [h, m, k, q]`. Entries that are bound to what is outside of the models,
    such as tokens, pixels and labels, have no matrix: they meet one by one.

    `init` chooses channels evenly, and `A` and `R` are 0 and 1: weight selection (arXiv:2311.18823) with tied choices.
    `fit` has the better start, from data. Both are learned from there like any adapter; they are LiGO's operators
    (arXiv:2303.00980), tied along the wiring. Where the target has more channels, the source's come first, what reads
    them does not read the others, and the rest of the target stays, so that a wider target computes what the source
    does, where layers read channels by kernels alone: not where they are divided by a norm or a softmax of them all, or
    multiplied with each other, as in attention with wider heads. Windows meet at their centres; what a larger window
    has around is 0. A leaf that makes channels and is summed over along them too, such as an embedding that is the last
    layer, has `A` for both, and 0 for channels that the source has not.

    Route all leaves that the models have in common, norms and biases as well, such as `["**=**"]`, but for last layers
    of other labels. It is a start: let it write once (`make_joint_step(..., stop=1 / num_steps, num_steps=...)`), since
    each transfer overwrites what the target has learned. Our choice.

    Args:
      routes: as `share_transfer`; each of one leaf from one leaf.
      source_wiring: of the source's computation; see `wiring`.
      target_wiring: of the target's.

    The adapter is `{"spaces": {space: A}, "inputs": {leaf:axes: R}}`, float32. `describe` tells its size.

    Raises:
      ValueError: as `share_transfer`; for a route with the view `attention`, several leaves in one, leaves with other
        numbers of channel axes or of other layouts, axes of unequal sizes that are not both hidden channels (labels,
        tokens, pixels), a wiring of another model; in `init` and `fit`, an adapter that takes more than half of the
        memory that is free; or, in `apply`, an adapter of other routes.
    """
    named_routes = kernel_routes(routes)
    like_share = share_transfer(named_routes)

    def plan_of(source_params: Params, target_params: Params) -> _Plan:
        return _plan(resolve(named_routes, source_params, target_params), source_wiring, target_wiring)

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        del key  # There is nothing random.
        plan = plan_of(source_params, target_params)
        _check_memory(plan)
        return _evenly(plan)

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
        resolved, _ = survey(named_routes, source_params, target_params)
        plan, seen, described = _plan(resolved, source_wiring, target_wiring), set(), []
        adapter = jax.eval_shape(lambda: _evenly(plan))
        for row, leaf in zip(rows[: len(plan.leaves)], plan.leaves, strict=True):
            new = {str(leaf.axes[i].pair) for i in leaf.making} - seen
            seen |= new
            matrices = [adapter["spaces"][name] for name in new]
            matrices += [adapter["inputs"][leaf.input_name]] if leaf.reading else []
            parameters = sum(matrix.size for matrix in matrices)
            leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in leaf.shapes]
            flops = count_flops(functools.partial(_made, leaf), adapter, *leaves)
            described.append(dataclasses.replace(row, adapter="spaces", parameters=parameters, flops=flops))
        return (*described, *rows[len(plan.leaves) :])

    def fit(moments: Mapping[str, jax.Array], source_params: Params, target_params: Params) -> Adapter:
        plan = plan_of(source_params, target_params)
        _check_memory(plan)
        return _fitted(plan, source_wiring, moments, flatten(source_params))

    return AlignedTransfer(init, apply, describe, fit)


def _plan(routes: tuple[ResolvedRoute, ...], source_wiring: Wiring, target_wiring: Wiring) -> _Plan:
    pairs: dict[str, _Pair] = {}
    return _Plan(tuple(_leaf(route, source_wiring, target_wiring, pairs) for route in routes), pairs)


def _leaf(route: ResolvedRoute, source_wiring: Wiring, target_wiring: Wiring, pairs: dict[str, _Pair]) -> _Leaf:
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
    of_leaves = target_wiring.of(target), source_wiring.of(source)
    for of_leaf, shape, path in zip(of_leaves, shapes, (target, source), strict=True):
        if len(of_leaf) != len(shape):
            raise ValueError(
                f"the wiring is of another model: {path!r} has {len(of_leaf)} axes there, here {len(shape)}"
            )
    arranged = () if views[1].arrangement is None else views[1].arrangement.axes
    places = list(zip(*channels, strict=True))
    spaces = [(target_wiring.spaces[target][t], source_wiring.spaces[source][s]) for t, s in places]
    axes = []
    for (t, s), (of_target, of_source) in zip(places, spaces, strict=True):
        contracted = t in target_wiring.inputs[target]
        if contracted != (s in source_wiring.inputs[source]):
            reads, makes = ("target", "source") if contracted else ("source", "target")
            raise ValueError(
                f"{target!r} and {source!r} are of other layouts: axis {t if contracted else s} is an input of the "
                f"{reads}'s layer, and axis {s if contracted else t} none of the {makes}'s"
            )
        sizes, around, pair = (shapes[0][t], shapes[1][s]), None, None
        if s in arranged:
            pass  # The route says which rows belong together.
        elif of_target in target_wiring.hidden and of_source in source_wiring.hidden:
            outer = target_wiring.within.get(of_target), source_wiring.within.get(of_source)
            around = spaces.index(outer) if outer in spaces else None
            found = _Pair(sizes, of_source, None if around is None else _name(*spaces[around], pairs))
            pair = _name(of_target, of_source, pairs)
            if pairs.setdefault(pair, found) != found:
                raise ValueError(f"{target!r} and {source!r} are of other layouts: their heads are along other axes")
        elif sizes[0] != sizes[1]:  # Which entry is which is told by no more than their number.
            why = _bound("target", of_target, target_wiring) or _bound("source", of_source, source_wiring)
            raise ValueError(
                f"{target!r} has {sizes[0]} entries along axis {t}, {source!r} has {sizes[1]} along axis {s}; {why}: "
                "nothing says which to choose. Leave out the route, or give it rows=mj.Rows.by_name(source_names, "
                "target_names)"
            )
        axes.append(_Axis(t, s, pair, around, contracted, t not in target_wiring.both[target], sizes))
    return _Leaf(target, source, (views[0], views[1]), shapes, tuple(axes), (specs[0].window, specs[1].window))


def _name(of_target: str, of_source: str, pairs: Mapping[str, _Pair]) -> str:
    """Returns the name of a pair of spaces: the target's, unless that is paired with another of the source already."""
    if of_target not in pairs or pairs[of_target].source == of_source:
        return of_target
    return f"{of_target} from {of_source}"


def _bound(role: str, space: str, of_model: Wiring) -> str:
    """Returns why a space is bound to what is outside of the model; empty for hidden channels."""
    if space in of_model.hidden:
        return ""
    if space in of_model.read:
        return f"those of the {role} come from outside of it, as tokens and pixels do"
    return (
        f"nothing in the {role} that can be followed reads those, as it is with labels and tokens, and where channels "
        "are split, merged or looped over"
    )


def _even_spaces(plan: _Plan) -> dict[str, jax.Array]:
    """Returns `A` of all pairs, by an even choice."""
    spaces = {}
    for name, ((m, p), _, around) in plan.pairs.items():
        matrix = choice_matrix(evenly_chosen(min(m, p), p), m, p)
        spaces[name] = matrix if around is None else jnp.tile(matrix, (plan.pairs[around].sizes[0], 1, 1))
    return spaces


def _evenly(plan: _Plan) -> Adapter:
    return _adapter(plan, _even_spaces(plan), {})


def _adapter(plan: _Plan, spaces: Mapping[str, jax.Array], inputs: Mapping[str, jax.Array]) -> Adapter:
    """Returns the adapter, with `R` of the inputs that are given, and what the spaces choose for the others."""
    made = plan.made()
    reading = [leaf for leaf in plan.leaves if leaf.reading]
    return {
        "spaces": {name: matrix for name, matrix in spaces.items() if name in made},
        "inputs": {
            leaf.input_name: inputs[leaf.input_name] if leaf.input_name in inputs else _chosen_inputs(leaf, spaces)
            for leaf in reading
        },
    }


def _subscripts(leaf: _Leaf, numbers: tuple[int, ...]) -> tuple[list[str], str, str]:
    """Returns subscripts of the matrices of some axes, and those of the axes of the target and of the source."""
    of_target, of_source = string.ascii_lowercase, string.ascii_uppercase
    matrices = []
    for i in numbers:
        around = leaf.axes[i].around
        matrices.append(f"{'' if around is None else of_target[around]}{of_target[i]}{of_source[i]}")
    return matrices, "".join(of_target[i] for i in numbers), "".join(of_source[i] for i in numbers)


def _chosen_inputs(leaf: _Leaf, spaces: Mapping[str, jax.Array]) -> jax.Array:
    """Returns `R` of a leaf's inputs that takes what the spaces choose, and makes up for nothing."""
    subscripts, of_target, of_source = _subscripts(leaf, leaf.reading)
    matrices = [spaces[str(leaf.axes[i].pair)] for i in leaf.reading]
    return jnp.einsum(f"{','.join(subscripts)}->{of_target}{of_source}", *matrices, precision=_PRECISION)


def _fitted(
    plan: _Plan, source_wiring: Wiring, moments: Mapping[str, jax.Array], source: Mapping[str, jax.Array]
) -> Adapter:
    spaces, made, chosen = _even_spaces(plan), plan.made(), set()
    for name in plan.outermost_first():
        (m, p), space, around = plan.pairs[name]
        found = _space_moments(space, around is not None, source_wiring, moments, source)
        if m >= p or not found or name not in made:
            continue
        chosen.add(name)
        total, sizes = sum(found[1:], found[0]), _magnitudes(plan, name, source)
        if around is None:
            spaces[name] = choice_matrix(_choose(total, sizes, m), m, p)
        else:
            total, sizes = (jnp.tensordot(spaces[around], one, 1, precision=_PRECISION) for one in (total, sizes))
            choose = functools.partial(_choose, count=m)
            spaces[name] = jax.nn.one_hot(jax.vmap(choose)(total, sizes), p, dtype=jnp.float32)
    inputs = {}
    for leaf in plan.leaves:
        if leaf.source in moments and chosen.intersection(str(leaf.axes[i].pair) for i in leaf.reading):
            matrix = _chosen_inputs(leaf, spaces)
            half = matrix.ndim // 2
            rows, columns = math.prod(matrix.shape[:half]), math.prod(matrix.shape[half:])
            of_layer = _leaf_moments(leaf, source_wiring, moments).reshape(columns, columns)
            inputs[leaf.input_name] = _reconstruction(of_layer, matrix.reshape(rows, columns)).reshape(matrix.shape)
    return _adapter(plan, spaces, inputs)


def _checked(path: str, of_model: Wiring, moments: Mapping[str, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Returns the moments of what enters a leaf of the source."""
    sizes = tuple(shape[axis] for axis in of_model.summed(path))
    if moments[path].shape != sizes * 2:
        raise ValueError(f"moments of {path!r} must be {sizes * 2}, got {moments[path].shape}")
    return moments[path]


def _space_moments(
    space: str, apart: bool, of_model: Wiring, moments: Mapping[str, jax.Array], leaves: Mapping[str, jax.Array]
) -> list[jax.Array]:
    """Returns all moments of a space's channels, `[p, p]`; `apart` for each channel around, `[h, p, p]`."""
    found = []
    if space in moments:
        products = moments[space]
        found.append(products if apart or products.ndim == 2 else products.sum(0))
    for path, spaces in of_model.spaces.items():
        axes = of_model.summed(path)
        of_axes = [spaces[axis] for axis in axes]
        if path not in moments or space not in of_axes:
            continue
        of_leaf, number, count = _checked(path, of_model, moments, leaves[path].shape), of_axes.index(space), len(axes)
        left, right = string.ascii_lowercase[:count], string.ascii_uppercase[:count]
        if apart:
            # The moments inside of each channel around; along any other axis, of all its channels.
            around = left[of_axes.index(of_model.within[space])]
            same = "".join(right[i] if i == number else left[i] for i in range(count))
            found.append(jnp.einsum(f"{left}{same}->{around}{left[number]}{right[number]}", of_leaf))
        elif count == 1:
            found.append(of_leaf)
        else:
            # What each channel adds to the outputs, in which no other axis has an order.
            kernel = jnp.moveaxis(leaves[path].astype(jnp.float32), axes, range(count))
            kernel = kernel.reshape(*kernel.shape[:count], -1)
            added = jnp.einsum(
                f"{left}{right},{left}z,{right}z->{left[number]}{right[number]}", of_leaf, kernel, kernel
            )
            found.append(added)
    return found


def _leaf_moments(leaf: _Leaf, of_model: Wiring, moments: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the moments of the inputs that one matrix of the adapter reads, `[*inputs, *inputs]`."""
    axes = of_model.summed(leaf.source)
    read = [leaf.axes[i].source for i in leaf.reading]
    left, right = string.ascii_lowercase[: len(axes)], string.ascii_uppercase[: len(axes)]
    same = "".join(right[i] if axis in read else left[i] for i, axis in enumerate(axes))
    found = [text[axes.index(axis)] for text in (left, right) for axis in read]
    return jnp.einsum(f"{left}{same}->{''.join(found)}", _checked(leaf.source, of_model, moments, leaf.shapes[1]))


def _magnitudes(plan: _Plan, name: str, source: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the sum of squares of each channel's parameters, `[p]` or `[h, p]`, to tell apart what is as good."""
    total = jnp.zeros(())
    for leaf in plan.leaves:
        for axis in leaf.axes:
            if axis.pair == name:
                kept = [axis.source] if axis.around is None else [leaf.axes[axis.around].source, axis.source]
                rest = tuple(i for i in range(len(leaf.shapes[1])) if i not in kept)
                squares = jnp.square(source[leaf.source].astype(jnp.float32)).sum(rest)
                total += squares if kept == sorted(kept) else squares.T
    return total


def _choose(moments: jax.Array, sizes: jax.Array, count: int) -> jax.Array:
    """Returns so many channels, the best first, from which all are best had by a linear map."""
    size = moments.shape[0]
    mean = jnp.trace(moments) / size
    start = moments + _EPSILON * mean * jnp.eye(size)

    def add(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, taken, chosen = state
        own = jnp.diagonal(left)
        # What of all channels is explained by this one, of what those before leave.
        explained = jnp.where(own > _EPSILON * mean, jnp.sum(jnp.square(left), axis=0) / jnp.maximum(own, 1e-30), 0)
        explained = jnp.where(taken, -1.0, explained)
        # Rounding would tell apart what is as good by its place; parameters tell it apart by what it is.
        best = jnp.argmax(
            jnp.where(explained >= jnp.max(explained) - _TIE * size * mean, jnp.where(taken, -1, sizes), -1)
        )
        left -= jnp.outer(left[:, best], left[best]) / jnp.maximum(left[best, best], 1e-30)
        return left, taken.at[best].set(True), chosen.at[i].set(best)

    state = start, jnp.zeros(size, bool), jnp.zeros(count, jnp.int32)
    return lax.fori_loop(0, count, add, state)[2]


def _reconstruction(moments: jax.Array, chosen: jax.Array) -> jax.Array:
    """Returns `R [m, p]` of `fit`, for channels that are chosen by the rows of a matrix; rows of zeros choose none."""
    crossed = jnp.matmul(chosen, moments, precision=_PRECISION)
    among = jnp.matmul(crossed, chosen.T, precision=_PRECISION)
    ridge = _RIDGE * jnp.trace(among) / jnp.sum(chosen) + 1e-30
    return jnp.linalg.solve(among + ridge * jnp.eye(among.shape[0]), crossed)


def _check_memory(plan: _Plan) -> None:
    """Raises ValueError for an adapter that takes more than half of the memory that is free."""
    free, matrices = free_memory(), flatten(jax.eval_shape(lambda: _evenly(plan)))
    total = sum(matrix.size * matrix.dtype.itemsize for matrix in matrices.values())
    if free is not None and total > free / 2:
        name, largest = max(matrices.items(), key=lambda item: item[1].size)
        raise ValueError(
            f"the adapter takes {total / 1e9:.3g} GB, more than half of the {free / 1e9:.3g} GB that are free; most of "
            f"that has {name!r}, of {largest.shape}. Leave out the routes to leaves with these channels"
        )


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
    given, old = source.astype(jnp.float32).transpose(permutations[1]), target.transpose(permutations[0])
    every, reading = tuple(range(len(leaf.axes))), leaf.reading
    subscripts, _, _ = _subscripts(leaf, leaf.making)
    matrices = [adapter["spaces"][str(leaf.axes[i].pair)] for i in leaf.making]
    if reading:
        _, of_target, of_source = _subscripts(leaf, reading)
        subscripts.append(of_target + of_source)
        matrices.append(adapter["inputs"][leaf.input_name])
    _, after, before = _subscripts(leaf, every)
    before = "".join(before[i] if axis.pair is not None else after[i] for i, axis in enumerate(leaf.axes))
    # The highest precision, since a product with the identity is to give back the source exactly.
    equation = f"{','.join([*subscripts, f'{before}...'])}->{after}..."
    made = jnp.einsum(equation, *matrices, given, precision=_PRECISION)
    # Rows of the target that the route gives none of the source's.
    missing = [axis.sizes[0] - axis.sizes[1] if axis.pair is None else 0 for axis in leaf.axes]
    made = jnp.pad(made, [(0, count) for count in (*missing, *(0,) * (made.ndim - len(missing)))])
    # Windows meet at their centres, with 0 around: as blocks whose rows are all the channels.
    channels, wanted = old.shape[: len(leaf.axes)], old.shape[len(leaf.axes) :]
    around = jnp.zeros((math.prod(channels), 1, *wanted), old.dtype)
    made = overlap_blocks(around, made.reshape(math.prod(channels), 1, *made.shape[len(channels) :])).reshape(old.shape)
    for i, axis in enumerate(leaf.axes):
        count, known = axis.sizes
        if i not in reading and axis.kept and count > known:
            made = jnp.where(jnp.arange(count).reshape(-1, *(1,) * (made.ndim - i - 1)) < known, made, old)
    inverse = [permutations[0].index(axis) for axis in range(target.ndim)]
    return made.transpose(inverse)
