"""The adapter of an alignment: channels chosen evenly, or in closed form from the inputs of the source's layers."""

import functools
import math
import string
from collections.abc import Callable, Collection, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.paths import near_misses
from merge_jax.transfers.alignment.plan import AlignedLeaf, AlignmentPlan, GroupPair, subscripts
from merge_jax.transfers.channels.axes import ChannelGraph
from merge_jax.transfers.channels.graph import LayerMoments, held_moments
from merge_jax.transfers.weight_selection import choice_matrix, evenly_chosen
from merge_jax.types import Adapter

__all__ = ["ChannelChoice", "Choice", "choose", "each_leaf", "even_adapter", "fitted_adapter"]

ChannelChoice = Literal["moments", "magnitude", "random", "even"]

_RIDGE = 1e-4
_EPSILON = 1e-6
_TIE = 1e-5
_PRECISION = lax.Precision.HIGHEST


class Choice(NamedTuple):
    """What an alignment chooses for each pair of channel groups, from which the matrices of a leaf are made.

    Attributes:
      pairs: of the plan.
      channels: `{pair: source channels, int [k]}`, or `[h, k]` for each enclosing channel.
      directions: `{pair: orthonormal directions [m, p]}`, for the streams.
      fitted: the pairs whose readers reconstruct all inputs from the chosen ones.
    """

    pairs: Mapping[str, GroupPair]
    channels: Mapping[str, jax.Array]
    directions: Mapping[str, jax.Array]
    fitted: frozenset[str]

    def selection(self, name: str) -> jax.Array:
        """Returns `A` of the chosen channels."""
        (m, p), chosen = self.pairs[name].sizes, self.channels[name]
        return choice_matrix(chosen, m, p)

    def values(self, name: str) -> jax.Array:
        """Returns `A` of the target's values: a stream's directions, else the chosen channels."""
        return self.directions[name] if name in self.directions else self.selection(name)

    def inputs(self, leaf: AlignedLeaf) -> jax.Array:
        """Returns `R` of a leaf that selects the target's values, without reconstruction."""
        matrix_axes, target_axes, source_axes = subscripts(leaf, leaf.reading)
        matrices = [self.values(name) for name in leaf.pairs_read]
        return jnp.einsum(f"{','.join(matrix_axes)}->{target_axes}{source_axes}", *matrices, precision=_PRECISION)


def _even_choice(plan: AlignmentPlan) -> Choice:
    channels = {}
    for name, ((m, p), _, around) in plan.pairs.items():
        chosen = jnp.asarray(evenly_chosen(min(m, p), p))
        channels[name] = chosen if around is None else jnp.tile(chosen, (plan.pairs[around].sizes[0], 1))
    return Choice(plan.pairs, channels, {}, frozenset())


def even_adapter(plan: AlignmentPlan) -> Adapter:
    """Returns the adapter that chooses channels evenly."""
    choice = _even_choice(plan)
    return _adapter(plan, choice, {leaf.input_name: choice.inputs(leaf) for leaf in plan.leaves if leaf.reading})


def _adapter(plan: AlignmentPlan, choice: Choice, inputs: dict[str, jax.Array]) -> Adapter:
    return {"outputs": {name: choice.selection(name) for name in plan.made()}, "inputs": inputs}


def fitted_adapter(
    plan: AlignmentPlan,
    source_graph: ChannelGraph,
    moments: Mapping[str, jax.Array],
    source: Mapping[str, jax.Array],
    choice: ChannelChoice = "moments",
    key: jax.Array | None = None,
) -> Adapter:
    """Returns the adapter that preserves most of what the source's layers compute; see `aligned_transfer`."""
    given, inputs = held_moments(moments), dict[str, jax.Array]()
    chosen = choose(plan, source_graph, given, source, choice, key)

    def put(leaf: AlignedLeaf, matrix: jax.Array | None) -> None:
        if matrix is not None:
            inputs[leaf.input_name] = matrix

    each_leaf(plan, chosen, source_graph, given, put)
    return _adapter(plan, chosen, inputs)


def choose(
    plan: AlignmentPlan,
    graph: ChannelGraph,
    moments: LayerMoments,
    source: Mapping[str, jax.Array],
    choice: ChannelChoice,
    key: jax.Array | None,
    streams: Collection[str] = (),
) -> Choice:
    """Returns the choice for each pair, visiting the moments once; see `aligned_transfer`.

    Streams are for the choice `moments`: their values are the orthonormal directions of the largest second moments,
    `A = U V^T` of the leading eigenvectors `V`, rotated toward the chosen channels, so the aligned leaves stay a prior.
    Layers that read the stream are aligned to these directions. Layers that write it are aligned to channels, since a
    norm in between has entries for channels. As for channels, gradients do not pass through the choice of directions.
    """
    _check_names(moments, graph)
    even, made, order = _even_choice(plan), plan.made(), plan.outermost_first()
    reduced = [name for name in order if name in made and plan.pairs[name].sizes[0] < plan.pairs[name].sizes[1]]
    channels, directions = dict(even.channels), dict[str, jax.Array]()

    def fit(name: str, best: Callable[..., jax.Array], *given: jax.Array) -> None:
        (m, _), _, around = plan.pairs[name]
        if around is None:
            channels[name] = best(*given, count=m)
        else:
            outer = choice_matrix(channels[around], *plan.pairs[around].sizes)
            given = tuple(jnp.tensordot(outer, one, 1, precision=_PRECISION) for one in given)
            channels[name] = jax.vmap(functools.partial(best, count=m))(*given)

    def fit_to_moments(name: str, total: jax.Array) -> None:
        fit(name, _choose, total, _magnitudes(plan, name, source))
        if name in streams:
            directions[name] = _directions(total, choice_matrix(channels[name], *plan.pairs[name].sizes))

    if choice == "moments":
        readers = {name: _readers(plan.pairs[name].source, graph) & moments.names for name in reduced}
        reduced = [name for name in reduced if readers[name]]
        _visit_groups(plan, graph, moments, source, {name: readers[name] for name in reduced}, fit_to_moments)
    elif choice == "magnitude":
        for name in reduced:
            fit(name, _largest, _magnitudes(plan, name, source))
    elif choice == "random":
        assert key is not None  # aligned_transfer
        for name in reduced:
            (_, p), _, around = plan.pairs[name]
            shape = (p,) if around is None else (plan.pairs[around].sizes[1], p)
            fit(name, _largest, jax.random.uniform(jax.random.fold_in(key, order.index(name)), shape))
    return Choice(plan.pairs, channels, directions, frozenset(reduced))


def _visit_groups(
    plan: AlignmentPlan,
    graph: ChannelGraph,
    moments: LayerMoments,
    source: Mapping[str, jax.Array],
    readers: Mapping[str, Collection[str]],
    fit: Callable[[str, jax.Array], None],
) -> None:
    """Passes on the summed moments of each pair's source channels, once its readers and its enclosing pair are done."""
    left, totals = {name: set(own) for name, own in readers.items()}, dict[str, jax.Array]()

    def take(path: str, own: jax.Array) -> None:
        for name in [name for name in left if path in left[name]]:
            group, around = plan.pairs[name].source, plan.pairs[name].around
            if path == group:
                _check_group(group, own, plan.pairs[name].sizes[1])
            part = _group_moments(path, group, around is not None, graph, own, source)
            totals[name] = totals[name] + part if name in totals else part
            left[name].remove(path)
        for name in [name for name, rest in left.items() if not rest]:
            if plan.pairs[name].around not in left:  # An enclosing pair comes first, so it is done.
                del left[name]
                fit(name, totals.pop(name))

    moments.visit(set().union(*readers.values()), take)


def each_leaf(
    plan: AlignmentPlan,
    choice: Choice,
    graph: ChannelGraph,
    moments: LayerMoments,
    put: Callable[[AlignedLeaf, jax.Array | None], None],
) -> None:
    """Passes on each leaf with `R` of its inputs, None if it reads none; visits the moments of those that need them."""
    readers: dict[str, list[AlignedLeaf]] = {}
    others = []
    for leaf in plan.leaves:
        fitted = leaf.source in moments.names and choice.fitted.intersection(leaf.pairs_read)
        (readers.setdefault(leaf.source, []) if fitted else others).append(leaf)

    def take(path: str, own: jax.Array) -> None:
        for leaf in readers[path]:
            put(leaf, _reconstruction(_leaf_moments(leaf, graph, own), choice.inputs(leaf)))

    moments.visit(readers.keys(), take)
    for leaf in others:
        put(leaf, choice.inputs(leaf) if leaf.reading else None)


def _directions(moments: jax.Array, chosen: jax.Array) -> jax.Array:
    """Returns the orthonormal directions of the largest moments, rotated toward the chosen channels."""
    largest = jnp.linalg.eigh(lax.stop_gradient(moments))[1][:, -chosen.shape[0] :]
    left, _, right = jnp.linalg.svd(jnp.matmul(chosen, largest, precision=_PRECISION))
    turned = jnp.matmul(left, right, precision=_PRECISION)
    return lax.stop_gradient(jnp.matmul(turned, largest.T, precision=_PRECISION))


def _readers(group: str, graph: ChannelGraph) -> set[str]:
    """Returns the names of the moments of a group's channels: its leaves', and its own."""
    groups = graph.channel_groups
    return {group, *(path for path in groups if group in [groups[path][axis] for axis in graph.moment_axes(path)])}


def _check_names(moments: LayerMoments, graph: ChannelGraph) -> None:
    """Raises ValueError for moments of a model with other names: they would silently not be used."""
    known = set(graph.channel_groups).union(*graph.channel_groups.values())
    for name in sorted(moments.names - known):
        raise ValueError(
            f"there are moments of {name!r}, but the source's channel graph has no such leaf or channel group; were "
            f"they taken of another model or tree? {near_misses(name, sorted(known))}"
        )


def _check_group(group: str, moments: jax.Array, size: int) -> None:
    """Raises ValueError for moments of products of another size than a channel group's."""
    if moments.shape[-2:] != (size, size):
        raise ValueError(f"moments of {group!r} must be {(size, size)} in their last axes, got {moments.shape}")


def _check(path: str, graph: ChannelGraph, moments: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError for input moments of another size than a source leaf's."""
    sizes = tuple(shape[axis] for axis in graph.moment_axes(path))
    if moments.shape != sizes * 2:
        raise ValueError(f"moments of {path!r} must be {sizes * 2}, got {moments.shape}")


def _group_moments(
    name: str, group: str, apart: bool, graph: ChannelGraph, moments: jax.Array, leaves: Mapping[str, jax.Array]
) -> jax.Array:
    """Returns what the moments of one name are of a group's channels.

    `[p, p]`, or with `apart` for each enclosing channel, `[h, p, p]`.
    """
    if name == group:
        return moments if apart or moments.ndim == 2 else moments.sum(0)
    axes = graph.moment_axes(name)
    _check(name, graph, moments, leaves[name].shape)
    summed = [graph.channel_groups[name][axis] for axis in axes]
    number, count = summed.index(group), len(axes)
    left, right = string.ascii_lowercase[:count], string.ascii_uppercase[:count]
    if apart:
        # The moments within each enclosing channel; along any other axis, summed over its channels.
        around = left[summed.index(graph.within[group])]
        same = "".join(right[i] if i == number else left[i] for i in range(count))
        return jnp.einsum(f"{left}{same}->{around}{left[number]}{right[number]}", moments)
    if count == 1:
        return moments
    # Each channel's contribution to the outputs, which does not depend on the order of other axes.
    kernel = jnp.moveaxis(jnp.asarray(leaves[name], jnp.float32), axes, range(count))
    kernel = kernel.reshape(*kernel.shape[:count], -1)
    return jnp.einsum(f"{left}{right},{left}z,{right}z->{left[number]}{right[number]}", moments, kernel, kernel)


def _leaf_moments(leaf: AlignedLeaf, graph: ChannelGraph, moments: jax.Array) -> jax.Array:
    """Returns the moments of the inputs that one matrix of the adapter reads, `[*inputs, *inputs]`."""
    axes = graph.moment_axes(leaf.source)
    _check(leaf.source, graph, moments, leaf.shapes[1])
    read = [leaf.axes[i].source for i in leaf.reading]
    left, right = string.ascii_lowercase[: len(axes)], string.ascii_uppercase[: len(axes)]
    same = "".join(right[i] if axis in read else left[i] for i, axis in enumerate(axes))
    found = [text[axes.index(axis)] for text in (left, right) for axis in read]
    return jnp.einsum(f"{left}{same}->{''.join(found)}", moments)


def _magnitudes(plan: AlignmentPlan, name: str, source: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the sum of squares of each channel's parameters, `[p]` or `[h, p]`, to break ties."""
    total = jnp.zeros(())
    for leaf in plan.leaves:
        for axis in leaf.axes:
            if axis.pair == name:
                kept = [axis.source] if axis.around is None else [leaf.axes[axis.around].source, axis.source]
                rest = tuple(i for i in range(len(leaf.shapes[1])) if i not in kept)
                squares = _sum_of_squares(source[leaf.source], rest)
                total += squares if kept == sorted(kept) else squares.T
                jax.block_until_ready(total)  # If the source is on the host, only one leaf is on the device.
    return total


@functools.partial(jax.jit, static_argnums=1)
def _sum_of_squares(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.square(leaf.astype(jnp.float32)).sum(axes)


def _largest(sizes: jax.Array, count: int) -> jax.Array:
    """Returns `count` channels, the largest first."""
    return lax.top_k(sizes, count)[1]


@functools.partial(jax.jit, static_argnames="count")
def _choose(moments: jax.Array, sizes: jax.Array, count: int) -> jax.Array:
    """Returns `count` channels, chosen greedily so that a linear map reconstructs all channels best; best first."""
    size = moments.shape[0]
    mean = jnp.trace(moments) / size
    start = moments + _EPSILON * mean * jnp.eye(size)

    def add(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, taken, chosen = state
        own = jnp.diagonal(left)
        # How much of the residual of all channels each channel explains.
        explained = jnp.where(own > _EPSILON * mean, jnp.sum(jnp.square(left), axis=0) / jnp.maximum(own, 1e-30), 0)
        explained = jnp.where(taken, -1.0, explained)
        # Rounding would break ties by position; parameters break them by content.
        first = explained >= jnp.max(explained) - _TIE * size * mean
        best = lax.argmax(jnp.where(first, jnp.where(taken, -1, sizes), -1), 0, jnp.int32)  # Also in 64 bits.
        # Read first, so that XLA updates `left` in place: a third of the time on a CPU.
        column, row, own = lax.optimization_barrier((left[:, best], left[best], own[best]))
        left -= jnp.outer(column, row) / jnp.maximum(own, 1e-30)
        return left, taken.at[best].set(True), chosen.at[i].set(best)

    state = start, jnp.zeros(size, bool), jnp.zeros(count, jnp.int32)
    return lax.fori_loop(0, count, add, state)[2]


@jax.jit
def _reconstruction(moments: jax.Array, chosen: jax.Array) -> jax.Array:
    """Returns `R [*m, *p]` of `fit` for the choice in a matrix's rows of length 1; rows of zeros choose nothing."""
    half = chosen.ndim // 2
    rows, columns = math.prod(chosen.shape[:half]), math.prod(chosen.shape[half:])
    flat, moments = chosen.reshape(rows, columns), moments.reshape(columns, columns)
    crossed = jnp.matmul(flat, moments, precision=_PRECISION)
    among = jnp.matmul(crossed, flat.T, precision=_PRECISION)
    ridge = _RIDGE * jnp.trace(among) / jnp.sum(jnp.any(flat != 0, axis=1)) + 1e-30
    return jnp.linalg.solve(among + ridge * jnp.eye(rows), crossed).reshape(chosen.shape)
