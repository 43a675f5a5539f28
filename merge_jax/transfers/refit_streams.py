"""Channels that linear layers alone make, add and read: there the target may have directions of them for channels."""

import contextlib
from collections.abc import Sequence

from merge_jax.transfers.alignment_plan import AlignmentPlan
from merge_jax.transfers.followed import FollowedModel
from merge_jax.transfers.layer_sites import ALIASES, VIEWS, Layer, Unsolvable, find_layer, is_dense, varying_axes
from merge_jax.transfers.program import Constant, Equation

__all__ = ["linear_streams"]


def linear_streams(
    alignment: AlignmentPlan, source: FollowedModel, target: FollowedModel, layers: Sequence[Layer]
) -> frozenset[str]:
    """Returns the pairs of channel groups whose target may have directions for channels, in the place of channels.

    The stream between inverted residuals is one: no activation is between what projects into it and what expands it.

    Args:
      alignment: of the models.
      source: which gives.
      target: which has fewer channels.
      layers: those of the target that are solved for.
    """
    groups: dict[str, str] = {}
    for leaf in alignment.leaves:
        for axis in leaf.axes:
            if axis.pair is not None:
                groups[axis.pair] = target.graph.channel_groups[leaf.target][axis.target]
    found = set()
    for name, pair in alignment.pairs.items():
        fewer = pair.sizes[0] < pair.sizes[1] and pair.around is None
        if fewer and list(groups.values()).count(groups[name]) == 1:
            makers = [layer for layer in layers if layer.dense]
            if _is_linear(target, groups[name], makers) and _is_linear(
                source, pair.source, _makers(source, pair.source)
            ):
                found.add(name)
    return frozenset(found)


def _makers(model: FollowedModel, group: str) -> list[Layer]:
    """Returns the layers that make channels of a group by sums."""
    found = []
    for path, groups in model.graph.channel_groups.items():
        if any(one == group and axis not in model.graph.inputs[path] for axis, one in enumerate(groups)):
            with contextlib.suppress(Unsolvable):
                found.append(find_layer(model.trace.program, path))
    return [layer for layer in found if layer.dense]


def _is_linear(model: FollowedModel, group: str, layers: Sequence[Layer]) -> bool:
    """Returns whether channels are made by these layers alone, and all else that is done with them is linear."""
    program = model.trace.program
    starts = {start for layer in layers for start in layer.starts}
    ways: set[int] = set().union(*(layer.values for layer in layers))
    for equation in program.equations:
        if not program.data.intersection(equation.outputs):
            continue
        read = [one for one in equation.reads if one in program.data and _axes(model, one, group)]
        if read and not _takes_any_directions(model, equation, read, group, ways):
            return False
        if not read and any(_axes(model, one, group) for one in equation.outputs) and equation.outputs[0] not in starts:
            return False
    return True


def _axes(model: FollowedModel, value: int, group: str) -> list[int]:
    return [axis for axis, node in enumerate(model.trace.nodes[value]) if model.trace.channel_group(node) == group]


def _takes_any_directions(
    model: FollowedModel, equation: Equation, read: Sequence[int], group: str, ways: set[int]
) -> bool:
    """Returns whether an operation of channels is the same for any directions, or on the way of a layer to its end."""
    program, axes = model.trace.program, _axes(model, read[0], group)
    if equation.name in VIEWS or equation.name in ALIASES or equation.name == "neg":
        return True
    if equation.name == "reduce_sum":
        return not set(axes).intersection(equation.params["axes"])
    others = [one for one in equation.inputs if isinstance(one, Constant) or one not in program.data]
    if equation.name in ("add", "add_any", "sub"):
        return not others or equation.outputs[0] in ways
    if equation.name in ("mul", "div"):
        return len(others) == 1 and (
            equation.outputs[0] in ways or not set(axes).intersection(varying_axes(program, others[0]))
        )
    if not is_dense(equation) or not others:
        return False
    if equation.name == "dot_general":
        summed, _ = equation.params["dimension_numbers"]
        return set(axes) <= set(summed[0] if equation.inputs[0] == read[0] else summed[1])
    return axes == [equation.params["dimension_numbers"].lhs_spec[1]]
