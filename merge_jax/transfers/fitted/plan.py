"""The plan of a refit: the target's sites in order, each with the source's end that it is solved for."""

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from merge_jax.transfers.alignment.plan import AlignedLeaf, AlignmentPlan
from merge_jax.transfers.channels.layer_sites import Layer, Norm, Unsolvable, is_state, merged_axes
from merge_jax.transfers.channels.program import Constant
from merge_jax.transfers.fitted.followed import FollowedModel
from merge_jax.transfers.fitted.streams import Streams, find_streams

__all__ = ["ChannelAxis", "RefitPlan", "Site", "Unknown", "plan_refit"]


class ChannelAxis(NamedTuple):
    """A channel axis at the end of a site.

    Attributes:
      name: name of its matrix in the alignment; None if entries are paired by index.
      around: index, at the site, of the axis of the enclosing channels; None if there is none.
    """

    name: str | None
    around: int | None


class Unknown(NamedTuple):
    """A leaf to solve for.

    Attributes:
      layer: the target's layer.
      axes: axes of the leaf: inputs first, then channels in the order of the end.
      inputs: number of entries per channel.
      start_axes: channel axes of the start, in the order of the end; empty if the way to the end depends on the data.
      normed_axes: channel axes of the value that a norm on the way normalises.
      bias: the leaf that receives the intercept; None for none.
      norm: the norm on the way that receives the statistics, if a bias compensates for the mean; None for none.
    """

    layer: Layer
    axes: tuple[int, ...]
    inputs: int
    start_axes: tuple[int, ...]
    normed_axes: tuple[int, ...]
    bias: str | None
    norm: Norm | None


@dataclass(frozen=True)
class Site:
    """Leaves that are solved jointly, since they end in one sum.

    Attributes:
      unknowns: the leaves.
      end: the target's value at their end.
      source_end: the corresponding value of the source.
      shapes: `{value: shape}` of the target's values with channels, with their merged axes split.
      source_shape: the same for the source's end.
      channel_axes: channel axes of both values, after the split.
      channels: sizes of these axes in the target's value.
      pairs: the alignment pair of each of them.
      rows: number of rows in a batch, over all examples and positions.
      stride: number of rows between examples; if unknown, examples are assumed to come first.
    """

    unknowns: tuple[Unknown, ...]
    end: int
    source_end: int
    shapes: Mapping[int, tuple[int, ...]]
    source_shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    channels: tuple[int, ...]
    pairs: tuple[ChannelAxis, ...]
    rows: int
    stride: int

    @property
    def dense(self) -> bool:
        """Whether the leaves sum over channels."""
        return self.unknowns[0].layer.dense

    @property
    def num_unknowns(self) -> int:
        """The number of entries per channel."""
        return sum(one.inputs for one in self.unknowns)

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves that it writes: solved leaves, biases, norms."""
        found = {one.layer.leaf for one in self.unknowns} | {one.bias for one in self.unknowns if one.bias is not None}
        norms = [one.norm for one in self.unknowns if one.norm]
        return frozenset(found.union(*((one.mean, one.var, one.gain) for one in norms)))

    @property
    def name(self) -> str:
        """The solved leaves."""
        return " + ".join(one.layer.leaf for one in self.unknowns)


class RefitPlan(NamedTuple):
    """The plan of a refit.

    Attributes:
      sites: in the order of the target's computation.
      kept: why the other routed parameters are not solved.
      streams: channels for which the target uses directions.
    """

    sites: tuple[Site, ...]
    kept: Mapping[str, str]
    streams: Streams


def plan_refit(alignment: AlignmentPlan, source: FollowedModel, target: FollowedModel) -> RefitPlan:
    """Returns the plan for all aligned leaves that can be solved."""
    kept: dict[str, str] = {}
    found: dict[int, list[tuple[AlignedLeaf, Layer, Layer]]] = {}
    paths = list(target.trace.program.leaves)
    for leaf in alignment.leaves:
        if is_state(leaf.target, paths):
            continue
        try:
            layer, source_layer = target.layer(leaf.target), source.layer(leaf.source)
            if layer.dense != source_layer.dense:
                raise Unsolvable("it is another kind of layer in the source")
        except Unsolvable as reason:
            kept[leaf.target] = str(reason)
        else:
            found.setdefault(layer.end, []).append((leaf, layer, source_layer))
    sites = []
    for end in sorted(found, key=lambda value: target.trace.program.makers[value]):
        site = _site(found[end], source, target, kept)
        if site is not None:
            sites.append(site)
    written = frozenset().union(*(site.leaves for site in sites))
    for one in (unknown for site in sites for unknown in site.unknowns if unknown.bias is not None):
        kept |= {path: f"the intercept of its layer goes to {one.bias}" for path in one.layer.biases if path in kept}
    solved = {one.layer.leaf for site in sites for one in site.unknowns}
    layers = [layer for members in found.values() for leaf, layer, _ in members if leaf.target in solved]
    streams = find_streams(alignment, source, target, layers)
    return RefitPlan(tuple(sites), {path: why for path, why in kept.items() if path not in written}, streams)


def _site(
    members: Sequence[tuple[AlignedLeaf, Layer, Layer]],
    source: FollowedModel,
    target: FollowedModel,
    kept: dict[str, str],
) -> Site | None:
    """Returns the site of leaves with a common end; leaves that cannot take part are kept."""
    if any(layer.dense for _, layer, _ in members):
        members, others = [one for one in members if one[1].dense], [one for one in members if not one[1].dense]
    else:  # The first that is combined with the data; later ones scale the same channels.
        members, others = members[:1], members[1:]
    kept |= {leaf.target: "it scales what is solved for" for leaf, *_ in others}
    sites: list[Site] = []
    for leaf, layer, source_layer in members:
        try:
            site = _one_site(leaf, layer, source_layer, source, target)
            if sites and (site.source_end, site.channel_axes) != (sites[0].source_end, sites[0].channel_axes):
                raise Unsolvable("it ends in another sum in the source than the others")
        except Unsolvable as reason:
            kept[leaf.target] = str(reason)
        else:
            sites.append(site)
    if not sites:
        return None
    first = sites[0]
    unknowns = tuple(unknown for site in sites for unknown in site.unknowns)
    shapes = {value: shape for site in sites for value, shape in site.shapes.items()}
    return replace(first, unknowns=unknowns, shapes=shapes)


def _one_site(
    leaf: AlignedLeaf, layer: Layer, source_layer: Layer, source: FollowedModel, target: FollowedModel
) -> Site:
    """Returns the site of one leaf.

    Raises:
      Unsolvable: its outputs in target and source cannot be compared.
    """
    outer = {one.around for one in leaf.axes if one.around is not None}
    axes = [one for i, one in enumerate(leaf.axes) if not one.contracted and (max(one.sizes) > 1 or i in outer)]
    if any(view.arrangement is not None for view in leaf.views) or any(
        one.pair is None and one.sizes[0] != one.sizes[1] for one in axes
    ):
        raise Unsolvable("its rows are arranged by the route")
    if not axes and layer.dense:  # One channel, as of a regression.
        axes = [one for one in leaf.axes if not one.contracted]
    groups = [target.graph.channel_groups[leaf.target][one.target] for one in axes]
    source_groups = [source.graph.channel_groups[leaf.source][one.source] for one in axes]
    shape, places = target.places(layer.end, groups)
    source_shape, source_places = source.places(source_layer.end, source_groups)
    if not axes or places != source_places:
        raise Unsolvable("its channels lie along other axes in the source")
    order = sorted(range(len(axes)), key=lambda i: places[i])
    axes, groups = [axes[i] for i in order], [groups[i] for i in order]
    program = target.trace.program
    rows, source_rows = (
        tuple(size for axis, size in enumerate(one) if axis not in places) for one in (shape, source_shape)
    )
    if rows != source_rows:
        raise Unsolvable(f"its output is {source_shape} in the source, here {shape}: axes beside its channels differ")
    batch, source_batch = target.examples(layer.end), source.examples(source_layer.end)
    if None not in (batch, source_batch) and batch != source_batch:
        raise Unsolvable("its examples lie along another axis in the source")
    stride = math.prod(rows) // program.shapes[program.inputs[0]].shape[0]
    if batch is not None:
        before = math.prod(program.shapes[layer.end].shape[: batch + 1])  # Merged axes are before or after it.
        ends = list(itertools.accumulate(shape, operator.mul))
        stride = math.prod(size for axis, size in enumerate(shape) if ends[axis] > before and axis not in places)
    if not stride:
        raise Unsolvable("its output has fewer rows than there are examples")
    leaf_shape, channels = leaf.shapes[0], [one.target for one in axes]
    inputs = _dense_inputs(target, layer, math.prod(rows), groups) if layer.dense else ()
    rest = [axis for axis in range(len(leaf_shape)) if axis not in (*inputs, *channels)]
    if layer.dense and any(leaf_shape[axis] > 1 for axis in rest):
        raise Unsolvable("an axis of it is neither an input nor a channel")
    inputs = (*rest, *inputs)
    if layer.scaled:
        _check_slope(target, layer, groups)
    bias = _bias(target, layer, [group for axis, group in zip(channels, groups, strict=True) if leaf_shape[axis] > 1])
    norm = layer.norm if bias is not None and layer.biases[bias] else None
    shapes, start_axes, normed_axes = {layer.end: shape}, (), ()
    if layer.scaled:
        shapes[layer.starts[0]], start_axes = target.places(layer.starts[0], groups)
        if norm:
            shapes[norm.normed], normed_axes = target.places(norm.normed, groups)
    count = math.prod(leaf_shape[axis] for axis in inputs)
    unknown = Unknown(layer, (*inputs, *channels), count, start_axes, normed_axes, bias, norm)
    sizes = tuple(shape[axis] for axis in sorted(places))
    pairs = tuple(
        ChannelAxis(one.pair, None if one.around is None else axes.index(leaf.axes[one.around])) for one in axes
    )
    channel_axes = tuple(sorted(places))
    rows = math.prod(rows)
    ends = layer.end, source_layer.end
    return Site((unknown,), *ends, shapes, source_shape, channel_axes, sizes, pairs, rows, stride)


def _bias(target: FollowedModel, layer: Layer, channels: Sequence[str]) -> str | None:
    """Returns the leaf that is added last and has one entry per channel, in order."""
    for path in layer.biases:
        shape = target.trace.program.shapes[target.trace.program.leaves[path]].shape
        groups = target.graph.channel_groups[path]
        if [group for group, size in zip(groups, shape, strict=True) if size > 1] == list(channels):
            return path  # For one channel, a leaf with one entry.
    return None


def _dense_inputs(target: FollowedModel, layer: Layer, rows: int, channels: Sequence[str]) -> tuple[int, ...]:
    """Returns the contracted axes of a leaf, in their order in `entering`.

    Raises:
      Unsolvable: the examples or positions differ from those at its end, or their order is unknown.
    """
    program, equation = target.trace.program, layer.meets
    x = program.shapes[next(one for one in equation.reads if one in program.data)].shape
    if equation.name == "dot_general":
        (left, right), (batch, _) = equation.params["dimension_numbers"]
        if batch:
            raise Unsolvable("it is a kernel for each entry of a batch axis")
        leaf_first = equation.inputs[0] not in program.data
        inputs, summed = (left, right) if leaf_first else (right, left)
        count = math.prod(size for axis, size in enumerate(x) if axis not in summed)
    else:
        numbers = equation.params["dimension_numbers"]
        if equation.params["batch_group_count"] != 1:
            raise Unsolvable("it is a convolution of groups of examples")
        made = program.shapes[layer.starts[0]].shape
        inputs = (*numbers.rhs_spec[2:], numbers.rhs_spec[1])
        count = math.prod(made) // made[numbers.out_spec[1]]
    if count != rows:
        raise Unsolvable("it ends at other places than where it meets the data")
    _check_order(target, layer, channels)
    kernel = next(one for one in equation.reads if one not in program.data)
    merged = merged_axes(program, layer.leaf, kernel)
    assert merged is not None  # find_layer
    return tuple(itertools.chain.from_iterable(merged[axis] for axis in inputs))


def _check_slope(target: FollowedModel, layer: Layer, channels: Sequence[str]) -> None:
    """Raises Unsolvable if the slope of the way depends on the position."""
    program = target.trace.program
    for value in layer.values.difference(layer.starts):
        equation = program.equations[program.makers[value]]
        if equation.name in ("mul", "div"):
            beside = [one for one in equation.inputs if isinstance(one, Constant) or one not in program.data]
            if not program.varying_axes(beside[0]) <= target.whole_axes(value, channels):
                raise Unsolvable("its output is scaled differently at different positions")


def _check_order(target: FollowedModel, layer: Layer, channels: Sequence[str]) -> None:
    """Raises Unsolvable if a transposition changes the order of the rows."""
    program = target.trace.program
    for value in layer.values:
        equation = program.equations[program.makers[value]]
        if equation.name == "transpose" and value not in layer.starts:
            whole = target.whole_axes(equation.reads[0], channels)
            rows = [axis for axis in equation.params["permutation"] if axis not in whole]
            if rows != sorted(rows):
                raise Unsolvable("its rows are reordered before its output")
