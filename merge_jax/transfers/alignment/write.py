"""The write of an alignment: new target leaves, each from its matrices."""

import math
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.layouts import overlap_blocks
from merge_jax.transfers.alignment.fit import Choice, each_leaf
from merge_jax.transfers.alignment.plan import AlignedLeaf, AlignmentPlan, subscripts
from merge_jax.transfers.channels.axes import ChannelGraph
from merge_jax.transfers.channels.graph import LayerMoments
from merge_jax.transfers.host_leaves import any_on_host, on_device

__all__ = ["aligned_leaf", "new_leaf", "written_leaves"]

_PRECISION = lax.Precision.HIGHEST


def written_leaves(
    plan: AlignmentPlan,
    choice: Choice,
    graph: ChannelGraph,
    moments: LayerMoments,
    source: Mapping[str, jax.Array],
    target: Mapping[str, jax.Array],
    turned: Collection[str] = (),
) -> dict[str, jax.Array]:
    """Returns the aligned target leaves by path; the matrices of each are made for it, and dropped.

    Leaves that are `turned` produce the directions of their streams, the others channels.
    """
    new = {}

    def put(leaf: AlignedLeaf, inputs: jax.Array | None) -> None:
        values = choice.values if leaf.target in turned else choice.selection
        matrices = [*map(values, leaf.pairs_made), *([] if inputs is None else [inputs])]
        new[leaf.target] = new_leaf(leaf, matrices, target[leaf.target], source[leaf.source])

    each_leaf(plan, choice, graph, moments, put)
    return new


def new_leaf(leaf: AlignedLeaf, matrices: Sequence[jax.Array], target: jax.Array, source: jax.Array) -> jax.Array:
    """Returns the new target leaf, from the matrices of its channels and that of its inputs.

    A source on the host is moved to the device, and this waits for the result: otherwise JAX dispatches faster than it
    computes, and the next leaves are on the device too early.
    """
    given = list(matrices), target, source
    if any_on_host(source, given):
        return jax.block_until_ready(_written_apart(leaf.nameless(), *on_device(given)))
    return _written(leaf, *given)


def _written(leaf: AlignedLeaf, matrices: list[jax.Array], target: jax.Array, source: jax.Array) -> jax.Array:
    """Returns the new target leaf."""
    target_view, source_view = leaf.views
    arranged = target_view.arrange(target), source_view.arrange(source)
    apart_leaves = [one.reshape(shape) for one, shape in zip(arranged, leaf.shapes, strict=True)]
    return target_view.restore(aligned_leaf(leaf, matrices, *apart_leaves).reshape(arranged[0].shape))


_written_apart = jax.jit(_written, static_argnums=0)


def aligned_leaf(leaf: AlignedLeaf, matrices: list[jax.Array], target: jax.Array, source: jax.Array) -> jax.Array:
    """Returns the new target leaf, with rows arranged and merged axes split, as in the given leaves."""
    order = [[getattr(axis, role) for axis in leaf.axes] for role in ("target", "source")]
    permutations = [(*channels, *window) for channels, window in zip(order, leaf.windows, strict=True)]
    given, old = source.astype(jnp.float32).transpose(permutations[1]), target.transpose(permutations[0])
    every, reading = tuple(range(len(leaf.axes))), leaf.reading
    matrix_axes, _, _ = subscripts(leaf, leaf.making)
    if reading:
        _, target_axes, source_axes = subscripts(leaf, reading)
        matrix_axes.append(target_axes + source_axes)
    _, after, before = subscripts(leaf, every)
    before = "".join(before[i] if axis.pair is not None else after[i] for i, axis in enumerate(leaf.axes))
    # The highest precision, so that a product with the identity returns the source exactly.
    equation = f"{','.join([*matrix_axes, f'{before}...'])}->{after}..."
    made = jnp.einsum(equation, *matrices, given, precision=_PRECISION)
    # Target rows without a source row.
    missing = [axis.sizes[0] - axis.sizes[1] if axis.pair is None else 0 for axis in leaf.axes]
    made = jnp.pad(made, [(0, count) for count in (*missing, *(0,) * (made.ndim - len(missing)))])
    # Windows are aligned at their centres and padded with 0: as kernels whose rows are all channels.
    channels, wanted = old.shape[: len(leaf.axes)], old.shape[len(leaf.axes) :]
    around = jnp.zeros((math.prod(channels), 1, *wanted), old.dtype)
    made = overlap_blocks(around, made.reshape(math.prod(channels), 1, *made.shape[len(channels) :])).reshape(old.shape)
    for i, axis in enumerate(leaf.axes):
        count, known = axis.sizes
        if i not in reading and axis.kept and count > known:
            made = jnp.where(jnp.arange(count).reshape(-1, *(1,) * (made.ndim - i - 1)) < known, made, old)
    inverse = [permutations[0].index(axis) for axis in range(target.ndim)]
    return made.transpose(inverse)
