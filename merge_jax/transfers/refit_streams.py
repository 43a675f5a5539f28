"""Streams: channels of which a target may have directions, since what is done with them is the same for these."""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from merge_jax.transfers.alignment_plan import AlignmentPlan
from merge_jax.transfers.followed import FollowedModel
from merge_jax.transfers.layer_sites import ALIASES, VIEWS, Layer, Unsolvable, find_layer, is_dense, varying_axes
from merge_jax.transfers.program import Constant, Equation

__all__ = ["Streams", "find_streams"]

_VECTORS = {"add", "add_any", "sub"}
_PLACES = {"slice", "dynamic_slice", "pad", "rev", "gather", "concatenate"}
_OF_EACH = {*_VECTORS, "mul", "div", "max", "min", "sqrt", "rsqrt", "square", "integer_pow", "pow", "exp", "log"}


class Streams(NamedTuple):
    """Pairs of channel groups whose target gets directions of the source's channels, and not some of them.

    Attributes:
      pairs: their names.
      tables: leaves that make them and are not solved for, such as embeddings: these are aligned to directions.
    """

    pairs: frozenset[str]
    tables: frozenset[str]


def find_streams(
    alignment: AlignmentPlan, source: FollowedModel, target: FollowedModel, layers: Sequence[Layer]
) -> Streams:
    """Returns the streams of two models: channels that are made by layers and tables, added, normalised and read.

    The stream between inverted residuals is one: no activation is between what projects into it and what expands it.
    That of a transformer is another: what LayerNorm divides by is the same for orthonormal directions, its mean is
    nearly so, and its gain is solved for.

    Args:
      alignment: of the models.
      source: which gives.
      target: which has fewer channels.
      layers: those of the target that are solved for.
    """
    groups: dict[str, str] = {}
    makers: dict[str, set[str]] = {}
    for leaf in alignment.leaves:
        for i, axis in enumerate(leaf.axes):
            if axis.pair is not None:
                groups[axis.pair] = target.graph.channel_groups[leaf.target][axis.target]
                makers.setdefault(axis.pair, set()).update({leaf.target} if i in leaf.making else ())
    pairs, tables = set(), set()
    for name, pair in alignment.pairs.items():
        fewer = pair.sizes[0] < pair.sizes[1] and pair.around is None
        if not fewer or list(groups.values()).count(groups[name]) > 1:
            continue
        own = _Stream(target, groups[name], layers, makers[name])
        other = _Stream(source, pair.source, _layers_of(source, pair.source), source.graph.channel_groups)
        if own.has_directions() and other.has_directions():
            pairs.add(name)
            tables |= own.used
    return Streams(frozenset(pairs), frozenset(tables))


def _layers_of(model: FollowedModel, group: str) -> list[Layer]:
    """Returns the layers that have channels of a group."""
    found = []
    for path, groups in model.graph.channel_groups.items():
        if group in groups:
            with contextlib.suppress(Unsolvable):
                found.append(find_layer(model.trace.program, path))
    return found


@dataclass(frozen=True)
class _Stream:
    """The channels of a group in a model, with its layers and the leaves that may be tables of them.

    Attributes:
      used: the tables.
    """

    model: FollowedModel
    group: str
    layers: Sequence[Layer]
    leaves: Collection[str]
    used: set[str] = field(default_factory=set)

    def has_directions(self) -> bool:
        """Returns whether all that is done with the channels is the same for directions."""
        program, ways, starts = self.model.trace.program, set[int](), set[int]()
        for layer in self.layers:
            if layer.dense or program.size(program.leaves[layer.leaf]) == self._size(layer.leaf):
                starts.update(layer.starts)
                ways |= layer.values
        flat: set[int] = set()  # Values that are the same for all channels.
        squares: set[int] = set()  # Squares of entries, which are to be summed.
        gains: set[int] = set()  # Gains of norms, times what is the same for all channels.
        for equation in program.equations:
            if not program.data.intersection(equation.outputs):
                continue
            read = [one for one in equation.reads if one in program.data and self._axes(one)]
            made = [one for one in equation.outputs if self._axes(one)]
            if not read:
                if made and not (made[0] in starts or self._is_flat(equation) or self._is_table(equation)):
                    return False
                if starts.intersection(made) and not is_dense(equation):
                    gains.update(made)
                elif self._is_flat(equation):
                    flat.update(made)
            elif flat.issuperset(read):
                if equation.name not in _OF_EACH | VIEWS | ALIASES:
                    return False
                if not self._uniform(equation) and not starts.intersection(made):
                    return False
                (flat if self._uniform(equation) else gains).update(made)
            elif gains.issuperset(read) and equation.name == "broadcast_in_dim":
                gains.update(made)
            elif squares.intersection(read):
                if equation.name != "reduce_sum" or not set(self._axes(read[0])) <= set(equation.params["axes"]):
                    return False
            elif self._squared(equation, read):
                squares.update(made)
            elif not self._takes_directions(equation, read, flat, gains, starts, ways):
                return False
        return True

    def _axes(self, value: int) -> list[int]:
        trace = self.model.trace
        return [axis for axis, node in enumerate(trace.nodes[value]) if trace.channel_group(node) == self.group]

    def _size(self, leaf: str) -> int:
        groups = self.model.graph.channel_groups[leaf]
        shape = self.model.trace.program.shapes[self.model.trace.program.leaves[leaf]].shape
        return max((size for size, group in zip(shape, groups, strict=True) if group == self.group), default=0)

    def _others(self, equation: Equation) -> list[int | Constant]:
        """Returns the operands that do not depend on the inputs."""
        return [one for one in equation.inputs if isinstance(one, Constant) or one not in self.model.trace.program.data]

    def _uniform(self, equation: Equation) -> bool:
        """Returns whether operands that do not depend on the inputs are the same for all channels."""
        axes, program = set(self._axes(equation.outputs[0])), self.model.trace.program
        return not any(axes.intersection(varying_axes(program, one)) for one in self._others(equation))

    def _is_flat(self, equation: Equation) -> bool:
        """Returns whether what has no channels is given to all of them."""
        return equation.name == "broadcast_in_dim"

    def _is_table(self, equation: Equation) -> bool:
        """Returns whether channels are looked up in one of the leaves."""
        others = self._others(equation)
        return equation.name == "gather" and len(others) == 1 and self._is_leaf(others[0])

    def _is_leaf(self, value: int | Constant) -> bool:
        """Returns whether a value is one of the leaves, moved or broadcast, and notes that it is used as a table."""
        program = self.model.trace.program
        if isinstance(value, Constant) or len(program.leaves_of[value]) != 1:
            return False
        (path,) = program.leaves_of[value]
        while value != program.leaves[path]:
            equation = program.equations[program.makers[value]]
            if equation.name not in VIEWS | ALIASES | {"broadcast_in_dim", "slice", "gather"}:
                return False
            value = next(one for one in equation.reads if program.leaves_of[one])
        self.used.add(path)
        return path in self.leaves

    def _squared(self, equation: Equation, read: Sequence[int]) -> bool:
        twice = equation.name == "mul" and len(read) == 2 and read[0] == read[1]
        return twice or equation.name == "square" or (equation.name == "integer_pow" and equation.params["y"] == 2)

    def _takes_directions(
        self,
        equation: Equation,
        read: Sequence[int],
        flat: set[int],
        gains: set[int],
        starts: set[int],
        ways: set[int],
    ) -> bool:
        """Returns whether an operation is the same for any directions, or of a layer on its way to its end."""
        name, others = equation.name, self._others(equation)
        whole = [one for one in read if one not in flat]
        if name in VIEWS or name in ALIASES or name in ("neg", "reduce_sum"):
            return True
        if name in _VECTORS:
            return equation.outputs[0] in ways or all(self._is_leaf(one) for one in others)
        if name in ("mul", "div"):
            on_the_way = equation.outputs[0] in ways or equation.outputs[0] in starts
            if len(whole) > 1:
                return name == "mul" and on_the_way and len(gains.intersection(whole)) == 1
            if name == "div" and equation.inputs[0] != whole[0]:
                return False
            return not others or on_the_way or self._uniform(equation)
        if name in _PLACES:  # Where channels are cut or padded themselves, they are others afterwards.
            return bool(self._axes(equation.outputs[0])) and all(self._is_leaf(one) for one in others)
        if not is_dense(equation) or len(read) > 1:
            return False
        axes = set(self._axes(read[0]))
        if name == "conv_general_dilated":
            return bool(others) and axes == {equation.params["dimension_numbers"].lhs_spec[1]}
        summed, matched = ({*both[equation.inputs[0] != read[0]]} for both in equation.params["dimension_numbers"])
        # Read by a kernel, or summed over places with weights, as by an attention or a mean.
        return axes <= summed if others else not axes & (summed | matched)
