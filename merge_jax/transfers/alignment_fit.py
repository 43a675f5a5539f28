"""The adapter of an alignment: channels chosen evenly, or in closed form from the inputs of the source's layers."""

import functools
import math
import string
from collections.abc import Collection, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.transfers.alignment_plan import AlignedLeaf, AlignmentPlan, subscripts
from merge_jax.transfers.channel_axes import ChannelGraph
from merge_jax.transfers.weight_selection import choice_matrix, evenly_chosen
from merge_jax.types import Adapter

__all__ = ["ChannelChoice", "directions", "even_adapter", "fitted_adapter"]

ChannelChoice = Literal["moments", "magnitude", "random", "even"]

_RIDGE = 1e-4
_EPSILON = 1e-6
_TIE = 1e-5
_PRECISION = lax.Precision.HIGHEST


def _even_outputs(plan: AlignmentPlan) -> dict[str, jax.Array]:
    """Returns `A` of all pairs, with channels chosen evenly."""
    outputs = {}
    for name, ((m, p), _, around) in plan.pairs.items():
        matrix = choice_matrix(evenly_chosen(min(m, p), p), m, p)
        outputs[name] = matrix if around is None else jnp.tile(matrix, (plan.pairs[around].sizes[0], 1, 1))
    return outputs


def even_adapter(plan: AlignmentPlan) -> Adapter:
    """Returns the adapter that chooses channels evenly."""
    return _adapter(plan, _even_outputs(plan), {})


def _adapter(plan: AlignmentPlan, outputs: Mapping[str, jax.Array], inputs: Mapping[str, jax.Array]) -> Adapter:
    """Returns the adapter, with the given `R`, and the outputs' choice for the other inputs."""
    made = plan.made()
    reading = [leaf for leaf in plan.leaves if leaf.reading]
    return {
        "outputs": {name: matrix for name, matrix in outputs.items() if name in made},
        "inputs": {
            leaf.input_name: inputs[leaf.input_name] if leaf.input_name in inputs else _chosen_inputs(leaf, outputs)
            for leaf in reading
        },
    }


def _chosen_inputs(leaf: AlignedLeaf, outputs: Mapping[str, jax.Array]) -> jax.Array:
    """Returns `R` of a leaf's inputs that selects the outputs' choice, without reconstruction."""
    matrix_axes, target_axes, source_axes = subscripts(leaf, leaf.reading)
    matrices = [outputs[str(leaf.axes[i].pair)] for i in leaf.reading]
    return jnp.einsum(f"{','.join(matrix_axes)}->{target_axes}{source_axes}", *matrices, precision=_PRECISION)


def fitted_adapter(
    plan: AlignmentPlan,
    source_graph: ChannelGraph,
    moments: Mapping[str, jax.Array],
    source: Mapping[str, jax.Array],
    choice: ChannelChoice = "moments",
    key: jax.Array | None = None,
) -> Adapter:
    """Returns the adapter that preserves most of what the source's layers compute; see `aligned_transfer`."""
    outputs, made, chosen = _even_outputs(plan), plan.made(), set()
    for number, name in enumerate(plan.outermost_first()):
        (m, p), group, around = plan.pairs[name]
        if m >= p or name not in made:
            continue
        sizes = _magnitudes(plan, name, source)
        if choice == "moments":
            found = _group_moments(group, around is not None, source_graph, moments, source)
            if not found:
                continue
            given, choose = (sum(found[1:], found[0]), sizes), _choose
        elif choice == "magnitude":
            given, choose = (sizes,), _largest
        elif choice == "random":
            assert key is not None  # aligned_transfer
            drawn = jax.random.uniform(jax.random.fold_in(key, number), sizes.shape)
            given, choose = (drawn,), _largest
        else:
            chosen.add(name)  # Stays even.
            continue
        chosen.add(name)
        if around is None:
            outputs[name] = choice_matrix(choose(*given, count=m), m, p)
        else:
            given = tuple(jnp.tensordot(outputs[around], one, 1, precision=_PRECISION) for one in given)
            indices = jax.vmap(functools.partial(choose, count=m))(*given)
            outputs[name] = jax.nn.one_hot(indices, p, dtype=jnp.float32)
    return _adapter(plan, outputs, _reconstructed(plan, chosen, source_graph, moments, outputs))


def directions(
    plan: AlignmentPlan,
    streams: Collection[str],
    source_graph: ChannelGraph,
    moments: Mapping[str, jax.Array],
    source: Mapping[str, jax.Array],
    adapter: Adapter,
) -> tuple[Adapter, Adapter]:
    """Returns the adapter for the alignment, and one whose outputs are the target values of these streams.

    The latter are the orthonormal directions of the largest second moments, `A = U V^T` of the leading eigenvectors
    `V`, rotated toward the channels that the adapter chose, so the aligned leaves stay a prior. Layers that read the
    stream are aligned to these directions. Layers that write it are aligned to channels, since a norm in between has
    entries for channels. As for channels, gradients do not pass through the choice of directions.
    """
    outputs = dict(adapter["outputs"])
    for name in sorted(outputs.keys() & set(streams)):
        (m, _), group, _ = plan.pairs[name]
        if found := _group_moments(group, False, source_graph, moments, source):
            largest = jnp.linalg.eigh(lax.stop_gradient(sum(found[1:], found[0])))[1][:, -m:]
            left, _, right = jnp.linalg.svd(jnp.matmul(outputs[name], largest, precision=_PRECISION))
            turned = jnp.matmul(left, right, precision=_PRECISION)
            outputs[name] = lax.stop_gradient(jnp.matmul(turned, largest.T, precision=_PRECISION))
    inputs = adapter["inputs"] | _reconstructed(plan, set(streams), source_graph, moments, outputs)
    return {**adapter, "inputs": inputs}, {**adapter, "inputs": inputs, "outputs": outputs}


def _reconstructed(
    plan: AlignmentPlan,
    chosen: set[str],
    graph: ChannelGraph,
    moments: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """Returns `R` of the leaves that read a pair with chosen channels."""
    inputs = {}
    for leaf in plan.leaves:
        pairs = [str(leaf.axes[i].pair) for i in leaf.reading]
        if leaf.source in moments and chosen.intersection(pairs) and outputs.keys() >= set(pairs):
            matrix = _chosen_inputs(leaf, outputs)
            half = matrix.ndim // 2
            rows, columns = math.prod(matrix.shape[:half]), math.prod(matrix.shape[half:])
            own_moments = _leaf_moments(leaf, graph, moments).reshape(columns, columns)
            inputs[leaf.input_name] = _reconstruction(own_moments, matrix.reshape(rows, columns)).reshape(matrix.shape)
    return inputs


def _checked(path: str, graph: ChannelGraph, moments: Mapping[str, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Returns the input moments of a source leaf, checked."""
    sizes = tuple(shape[axis] for axis in graph.moment_axes(path))
    if moments[path].shape != sizes * 2:
        raise ValueError(f"moments of {path!r} must be {sizes * 2}, got {moments[path].shape}")
    return moments[path]


def _group_moments(
    group: str, apart: bool, graph: ChannelGraph, moments: Mapping[str, jax.Array], leaves: Mapping[str, jax.Array]
) -> list[jax.Array]:
    """Returns all moments of a group's channels, `[p, p]`; with `apart` for each enclosing channel, `[h, p, p]`."""
    found = []
    if group in moments:
        products = moments[group]
        found.append(products if apart or products.ndim == 2 else products.sum(0))
    for path, leaf_groups in graph.channel_groups.items():
        axes = graph.moment_axes(path)
        summed = [leaf_groups[axis] for axis in axes]
        if path not in moments or group not in summed:
            continue
        entering, number, count = _checked(path, graph, moments, leaves[path].shape), summed.index(group), len(axes)
        left, right = string.ascii_lowercase[:count], string.ascii_uppercase[:count]
        if apart:
            # The moments within each enclosing channel; along any other axis, summed over its channels.
            around = left[summed.index(graph.within[group])]
            same = "".join(right[i] if i == number else left[i] for i in range(count))
            found.append(jnp.einsum(f"{left}{same}->{around}{left[number]}{right[number]}", entering))
        elif count == 1:
            found.append(entering)
        else:
            # Each channel's contribution to the outputs, which does not depend on the order of other axes.
            kernel = jnp.moveaxis(jnp.asarray(leaves[path], jnp.float32), axes, range(count))
            kernel = kernel.reshape(*kernel.shape[:count], -1)
            added = jnp.einsum(
                f"{left}{right},{left}z,{right}z->{left[number]}{right[number]}", entering, kernel, kernel
            )
            found.append(added)
    return found


def _leaf_moments(leaf: AlignedLeaf, graph: ChannelGraph, moments: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the moments of the inputs that one matrix of the adapter reads, `[*inputs, *inputs]`."""
    axes = graph.moment_axes(leaf.source)
    read = [leaf.axes[i].source for i in leaf.reading]
    left, right = string.ascii_lowercase[: len(axes)], string.ascii_uppercase[: len(axes)]
    same = "".join(right[i] if axis in read else left[i] for i, axis in enumerate(axes))
    found = [text[axes.index(axis)] for text in (left, right) for axis in read]
    return jnp.einsum(f"{left}{same}->{''.join(found)}", _checked(leaf.source, graph, moments, leaf.shapes[1]))


def _magnitudes(plan: AlignmentPlan, name: str, source: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the sum of squares of each channel's parameters, `[p]` or `[h, p]`, to break ties."""
    total = jnp.zeros(())
    for leaf in plan.leaves:
        for axis in leaf.axes:
            if axis.pair == name:
                kept = [axis.source] if axis.around is None else [leaf.axes[axis.around].source, axis.source]
                rest = tuple(i for i in range(len(leaf.shapes[1])) if i not in kept)
                squares = jnp.square(jnp.asarray(source[leaf.source], jnp.float32)).sum(rest)
                total += squares if kept == sorted(kept) else squares.T
                jax.block_until_ready(total)  # If the source is on the host, only one leaf is on the device.
    return total


def _largest(sizes: jax.Array, count: int) -> jax.Array:
    """Returns `count` channels, the largest first."""
    return lax.top_k(sizes, count)[1]


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
        best = jnp.argmax(
            jnp.where(explained >= jnp.max(explained) - _TIE * size * mean, jnp.where(taken, -1, sizes), -1)
        )
        left -= jnp.outer(left[:, best], left[best]) / jnp.maximum(left[best, best], 1e-30)
        return left, taken.at[best].set(True), chosen.at[i].set(best)

    state = start, jnp.zeros(size, bool), jnp.zeros(count, jnp.int32)
    return lax.fori_loop(0, count, add, state)[2]


def _reconstruction(moments: jax.Array, chosen: jax.Array) -> jax.Array:
    """Returns `R [m, p]` of `fit` for the choice in a matrix's rows of length 1; rows of zeros choose nothing."""
    crossed = jnp.matmul(chosen, moments, precision=_PRECISION)
    among = jnp.matmul(crossed, chosen.T, precision=_PRECISION)
    ridge = _RIDGE * jnp.trace(among) / jnp.sum(jnp.any(chosen != 0, axis=1)) + 1e-30
    return jnp.linalg.solve(among + ridge * jnp.eye(among.shape[0]), crossed)
