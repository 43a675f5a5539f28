"""What a refit solves, and in which order: sites of a target, each with the end of the source that it is solved to."""

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from merge_jax.transfers.alignment_plan import AlignedLeaf, AlignmentPlan
from merge_jax.transfers.followed import FollowedModel
from merge_jax.transfers.layer_sites import Layer, Norm, Unsolvable, is_state, merged_axes
from merge_jax.transfers.program import Constant
from merge_jax.transfers.refit_streams import Streams, find_streams

__all__ = ["ChannelAxis", "RefitPlan", "Site", "Unknown", "plan_refit"]


class ChannelAxis(NamedTuple):
    """An axis of channels at the end of a site.

    Attributes:
      name: of its matrix in the alignment; None where entries meet one by one.
      around: number, at the site, of the axis that its channels are within; None where there is none.
    """

    name: str | None
    around: int | None


class Unknown(NamedTuple):
    """A leaf that is solved for.

    Attributes:
      layer: of the target.
      axes: of the leaf, those of its inputs first, those of its channels last, as the channels stand at the end.
      inputs: how many numbers each channel has.
      start_axes: of the start, in the order of the channels at the end; empty where the way depends on the data.
      normed_axes: of the value that a norm on the way normalises.
      bias: the leaf that gets the intercept; None for none.
      norm: what gets the statistics: one on the way, of which a bias makes up for the mean; None for none.
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
    """Leaves that are solved for together, since they end in one sum.

    Attributes:
      unknowns: the leaves.
      end: the value of the target that they end in.
      source_end: the value of the source that this is solved to.
      shapes: `{value: shape}` of the target's values with channels, merged axes of these apart.
      source_shape: the same of the source's end.
      channel_axes: of both values, with merged axes apart.
      channels: sizes of these axes, of the target's value.
      pairs: what each of them is in the alignment.
      rows: how many places a batch has, all examples together.
      stride: how many rows lie from one example to the next; the examples come first where that is unknown.
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
        """How many numbers each channel has."""
        return sum(one.inputs for one in self.unknowns)

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves that it writes: those that are solved for, biases, norms."""
        found = {one.layer.leaf for one in self.unknowns} | {one.bias for one in self.unknowns if one.bias is not None}
        norms = [one.norm for one in self.unknowns if one.norm]
        return frozenset(found.union(*((one.mean, one.var, one.gain) for one in norms)))

    @property
    def name(self) -> str:
        """The leaves that are solved for."""
        return " + ".join(one.layer.leaf for one in self.unknowns)


class RefitPlan(NamedTuple):
    """What is solved for.

    Attributes:
      sites: in the order of the target's computation.
      kept: why the other routed parameters keep what they are.
      streams: channels of which the target gets directions.
    """

    sites: tuple[Site, ...]
    kept: Mapping[str, str]
    streams: Streams


def plan_refit(alignment: AlignmentPlan, source: FollowedModel, target: FollowedModel) -> RefitPlan:
    """Returns what of the aligned leaves can be solved for."""
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
    """Returns the site of leaves that have one end; those that have no part in it are kept."""
    if any(layer.dense for _, layer, _ in members):
        members, others = [one for one in members if one[1].dense], [one for one in members if not one[1].dense]
    else:  # The first that meets the data: what comes after it scales the same channels.
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
      Unsolvable: what it makes in the target cannot be compared with what it makes in the source.
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
        raise Unsolvable(f"its output is {source_shape} in the source and {shape} here: the positions differ")
    batch, source_batch = target.examples(layer.end), source.examples(source_layer.end)
    if None not in (batch, source_batch) and batch != source_batch:
        raise Unsolvable("its examples lie along another axis in the source")
    stride = math.prod(rows) // program.shapes[program.inputs[0]].shape[0]
    if batch is not None:
        before = math.prod(program.shapes[layer.end].shape[: batch + 1])  # Merged axes are behind or before it.
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
    """Returns the leaf that has one number for each channel, in their order, and is added last."""
    for path in layer.biases:
        shape = target.trace.program.shapes[target.trace.program.leaves[path]].shape
        groups = target.graph.channel_groups[path]
        if [group for group, size in zip(groups, shape, strict=True) if size > 1] == list(channels):
            return path  # Of one channel a leaf of one number.
    return None


def _dense_inputs(target: FollowedModel, layer: Layer, rows: int, channels: Sequence[str]) -> tuple[int, ...]:
    """Returns the axes of a leaf that is summed over along them, in the order in which `entering` has them.

    Raises:
      Unsolvable: other examples or places than where it ends, or their order is not known.
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
    """Raises Unsolvable where the way has another slope at other places."""
    program = target.trace.program
    for value in layer.values.difference(layer.starts):
        equation = program.equations[program.makers[value]]
        if equation.name in ("mul", "div"):
            beside = [one for one in equation.inputs if isinstance(one, Constant) or one not in program.data]
            if not program.varying_axes(beside[0]) <= target.whole_axes(value, channels):
                raise Unsolvable("its output is scaled differently at different positions")


def _check_order(target: FollowedModel, layer: Layer, channels: Sequence[str]) -> None:
    """Raises Unsolvable where a transposition changes the order of the rows."""
    program = target.trace.program
    for value in layer.values:
        equation = program.equations[program.makers[value]]
        if equation.name == "transpose" and value not in layer.starts:
            whole = target.whole_axes(equation.reads[0], channels)
            rows = [axis for axis in equation.params["permutation"] if axis not in whole]
            if rows != sorted(rows):
                raise Unsolvable("its rows are reordered before its output")
