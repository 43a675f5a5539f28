"""Channels of a model, found by tracing: the axes that share channels, and the inputs of each layer."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.transfers.channels.axes import ChannelGraph
from merge_jax.transfers.channels.sums import Sum
from merge_jax.transfers.channels.trace import ChannelTrace
from merge_jax.types import Params

__all__ = ["LayerMoments", "channel_graph", "held_moments", "input_moments", "layer_moments"]


def channel_graph(fn: Callable[..., Any], params: Params, *inputs: Any, strict: bool = True) -> ChannelGraph:
    """Returns the channel groups of a model: axes of leaves tied by residual sums, norms, biases and products.

    `fn(params, *inputs)` is traced for shapes only and nothing is computed, so arguments may be arrays or
    `jax.ShapeDtypeStruct`s. It is any JAX function of a parameter tree, such as `lambda params, state, x:
    model.apply({"params": params, **state}, x, train=False)`, from any library of layers. Axes are tied by elementwise
    sums and products, matrix products, convolutions, and embedding lookups. Reshapes are followed by factors: a kernel
    that reads flattened maps has positions and channels, and a leaf whose channels are normalised in groups has groups
    and channels in each (`ChannelGraph.factors`). Concatenated, split or sliced channels are tied in pieces of the
    largest size that divides all parts. Channels cannot be followed through parts without such a size, padding, sums or
    sorting along them, grouped convolutions, loops (`nn.scan`), or unknown operations. A constant that differs along an
    axis, such as rotary angles or sinusoidal positions, has an order, and fixes the channels combined with it. Running
    statistics that `fn` captures are also such a constant, so pass them as an input. Our choice; Git Re-Basin
    (arXiv:2209.04836) lists the ties of each model by hand.

    Args:
      fn: the model.
      params: its parameters.
      *inputs: its inputs, and its state.
      strict: refuse channels that cannot be followed. Otherwise their axes are separated there: leaves before and after
        that operation form two channel groups.

    Raises:
      ValueError: leaves that cannot be named, as in `flatten`; with `strict`, channels of a leaf, or a leaf itself, in
        an operation that cannot be followed.
    """
    return ChannelTrace.followed(fn, params, inputs, strict=strict)[1]


def input_moments(fn: Callable[..., Any], params: Params, *inputs: Any) -> dict[str, jax.Array]:
    """Returns the second moments of every contracted input of a model: by leaf, or by channel group without one.

    `{leaf path: X^T X / N}`, with `X [N, n]` the inputs of the layer whose kernel is the leaf: one row for each example
    and position, summed over all calls of the layer. Its shape is `[n, n]`, or `[h, d, h, d]` for a leaf that is
    contracted along two axes together, such as the last kernel of an attention. For flattened maps, positions are rows.
    A leaf that is contracted along different axes in different places, such as the kernel of a tied autoencoder, has no
    entry, but its channel groups do.

    `{channel group: (Q^T Q / N) * (K^T K / M)}`, elementwise, for activations `Q [N, d]` and `K [M, d]` that are
    multiplied, such as queries and keys: the moments of the summed products `q_i k_i`, for queries and keys drawn
    independently. Its shape is `[d, d]`, or `[h, d, d]` for a group within another. Products that are summed over
    several axes together have no entry.

    Moments are float32 and not centred. `fn` is as in `channel_graph` without `strict`, and is computed once on
    `inputs`. Supports `jit`. Channel pruning reconstructs from the same moments (He et al., arXiv:1707.06168). Our
    choices are to take them at all layers in one pass, and those of products.

    Raises:
      ValueError: leaves that cannot be named, as `flatten`.
    """
    found: dict[str, jax.Array] = {}
    moments = layer_moments(fn, params, *inputs)
    moments.visit(moments.names, found.__setitem__)
    return found


class LayerMoments(NamedTuple):
    """The second moments of a model's layer inputs, each computed when it is asked for.

    Attributes:
      names: of all of them, as in `input_moments`.
      visit: `(names, take)`: calls `take(name, moments)` for each of these names, one after the other.
    """

    names: frozenset[str]
    visit: Callable[[Collection[str], Callable[[str, jax.Array], None]], None]


def held_moments(moments: Mapping[str, jax.Array]) -> LayerMoments:
    """Returns moments that are already computed as `LayerMoments`.

    Raises:
      ValueError: not moments by name.
    """
    if not isinstance(moments, Mapping):
        raise ValueError(f"moments must be arrays by name, as of input_moments, got {type(moments).__name__}")
    for name, one in moments.items():
        if not hasattr(one, "shape"):
            raise ValueError(f"the moments of {name!r} must be an array, got {type(one).__name__}")

    def visit(names: Collection[str], take: Callable[[str, jax.Array], None]) -> None:
        for name in moments:  # In their order: that of a set would change from process to process, and so would sums.
            if name in names:
                take(name, moments[name])

    return LayerMoments(frozenset(moments), visit)


def layer_moments(fn: Callable[..., Any], params: Params, *inputs: Any) -> LayerMoments:
    """Returns the moments of `input_moments`, computed when they are asked for.

    `visit` computes the model once, if there are names, and only the moments of these. It passes on each at the last
    call of its layer, and then drops it. Shapes and source: as in `input_moments`.

    Raises:
      ValueError: as `input_moments`.
    """
    trace, graph = ChannelTrace.followed(fn, params, inputs, strict=False)
    name_of = _namer(trace, graph)
    calls = Counter(filter(None, map(name_of, trace.sums)))

    def visit(names: Collection[str], take: Callable[[str, jax.Array], None]) -> None:
        left = {name: calls[name] for name in names}
        sums: dict[str, jax.Array] = {}

        def add(one: Sum) -> None:
            name = name_of(one)
            if name not in left:
                return
            if one.path is None:
                made = _product_moments(one, trace, graph)
            else:
                made = _moments(one.entering[0].value, _kept(one, graph)[1])
            sums[name] = sums[name] + made if name in sums else made
            left[name] -= 1
            if not left[name]:
                take(name, sums.pop(name))

        if left:
            trace.run(params, inputs, add)

    return LayerMoments(frozenset(calls), visit)


def _namer(trace: ChannelTrace, graph: ChannelGraph) -> Callable[[Sum], str]:
    """Returns the function that names the moments of a contraction; empty if it has none."""
    axes: dict[str | None, set[tuple[int, ...]]] = {}
    for one in trace.sums:
        axes.setdefault(one.path, set()).add(_kept(one, graph)[0])

    def name(one: Sum) -> str:
        if one.path is None:
            group = trace.channel_group(one.entering[0].nodes[one.places[0][0]])
            return group if len(one.places[0]) == 1 and group in graph.hidden else ""
        if len(axes[one.path]) == 1:
            return one.path
        kept, _ = _kept(one, graph)
        return graph.channel_groups[one.path][kept[0]] if len(kept) == 1 else ""

    return name


def _kept(one: Sum, graph: ChannelGraph) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the axes of a leaf whose moments are taken, and the axes of its input that meet them."""
    wanted = () if one.path is None else graph.moment_axes(one.path)
    kept = [number for number, axis in enumerate(one.axes) if axis in wanted] or range(len(one.axes))
    return tuple(one.axes[number] for number in kept), tuple(one.places[0][number] for number in kept)


def _product_moments(one: Sum, trace: ChannelTrace, graph: ChannelGraph) -> jax.Array:
    """Returns the moments of the summed products of two values, such as queries and keys."""
    around, factors = graph.within.get(trace.channel_group(one.entering[0].nodes[one.places[0][0]])), []
    for value, places in zip(one.entering, one.places, strict=True):
        # Repeated heads, of a grouped-query attention, are an axis merged from the heads and their copies.
        apart = [trace.atoms(node) for node in value.nodes]
        apart = [
            atoms if axis not in places and around in [*map(trace.channel_group, atoms)] else (value.nodes[axis],)
            for axis, atoms in enumerate(apart)
        ]
        nodes = tuple(itertools.chain.from_iterable(apart))
        summed = tuple(sum(map(len, apart[:axis])) for axis in places)
        outer = [axis for axis, node in enumerate(nodes) if around and trace.channel_group(node) == around]
        factors.append(_moments(value.value.reshape(trace.sizes(nodes)), summed, tuple(outer)))
    return factors[0] * factors[1]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _moments(value: jax.Array, axes: tuple[int, ...], around: tuple[int, ...] = ()) -> jax.Array:
    """Returns the second moments `[*around, *axes, *axes]` of a value's entries along axes, for each place around."""
    sizes = [[value.shape[axis] for axis in some] for some in (around, axes)]
    rest = [axis for axis in range(value.ndim) if axis not in (*around, *axes)]
    rows = value.transpose(*rest, *around, *axes).astype(jnp.float32)
    # Without a batch axis of size 1, for which XLA would transpose a copy and compute activations again as it does.
    form, sizes_of_rows = ("nam,nak->amk", sizes) if around else ("nm,nk->mk", sizes[1:])
    rows = rows.reshape(-1, *map(math.prod, sizes_of_rows))
    # The highest precision: alignment solves for their residuals.
    moments = jnp.einsum(form, rows, rows, precision=lax.Precision.HIGHEST)
    return moments.reshape(*sizes[0], *sizes[1], *sizes[1]) / rows.shape[0]
