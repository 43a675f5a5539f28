"""Streams: channels that a target may replace by directions, since all their operations are the same for these."""

import contextlib
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from merge_jax.transfers.alignment.plan import AlignmentPlan
from merge_jax.transfers.channels.layer_sites import VIEWS, Layer, Unsolvable, is_dense
from merge_jax.transfers.channels.program import Constant, Equation
from merge_jax.transfers.fitted.followed import FollowedModel

__all__ = ["Streams", "find_streams"]

_SUMS = {"add", "add_any", "sub"}
_PLACES = {"slice", "dynamic_slice", "pad", "rev", "gather", "concatenate"}
_OF_EACH = {*_SUMS, "mul", "div", "max", "min", "sqrt", "rsqrt", "square", "integer_pow", "pow", "exp", "log"}


class Streams(NamedTuple):
    """Pairs of channel groups whose target uses directions of the source's channels instead of a choice.

    Attributes:
      pairs: their names.
      tables: leaves that write to them and are not solved, such as embeddings: these are aligned to directions.
    """

    pairs: frozenset[str]
    tables: frozenset[str]


def find_streams(
    alignment: AlignmentPlan, source: FollowedModel, target: FollowedModel, layers: Sequence[Layer]
) -> Streams:
    """Returns the streams of two models: channels that layers and tables write, add, normalise and read.

    One example is the stream between inverted residuals: there is no activation between projection and expansion. The
    stream of a transformer is another: LayerNorm's divisor is the same for orthonormal directions, its mean nearly so,
    and its gain is solved for.

    Args:
      alignment: of the models.
      source: the source model.
      target: the target model, with fewer channels.
      layers: the target's layers to solve.
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
            tables |= own.tables
    return Streams(frozenset(pairs), frozenset(tables))


def _layers_of(model: FollowedModel, group: str) -> list[Layer]:
    """Returns the layers that have channels of a group."""
    found = []
    for path, groups in model.graph.channel_groups.items():
        if group in groups:
            with contextlib.suppress(Unsolvable):
                found.append(model.layer(path))
    return found


class _Stream:
    """The channels of a group, and a model's operations on them.

    Attributes:
      tables: leaves that are looked up or added as channels, found by `has_directions`.
    """

    def __init__(self, model: FollowedModel, group: str, layers: Iterable[Layer], leaves: Collection[str]):
        """Takes the layers that may write and scale channels, and the leaves that may be tables."""
        self.tables: set[str] = set()
        self._program, self._axes, self._leaves = model.trace.program, model.channel_axes.get(group, {}), leaves
        own = [layer for layer in layers if layer.dense or self._is_gain(layer.leaf)]
        self._starts = {start for layer in own for start in layer.starts}
        self._on_the_way: set[int] = set().union(*(layer.values for layer in own))
        # Kinds of values: equal for all channels, gains of norms times those, and squares that must be summed.
        self._flat, self._gains, self._squares = set[int](), set[int](), set[int]()

    def has_directions(self) -> bool:
        """Returns whether all operations on the channels are the same for directions."""
        return all(self._follow(one) for one in self._program.equations if self._program.data & {*one.outputs})

    def _follow(self, equation: Equation) -> bool:
        """Returns whether an operation on channels is the same for any directions, and records its results."""
        read = [one for one in equation.reads if one in self._program.data and one in self._axes]
        made = [one for one in equation.outputs if one in self._axes]
        gain = not is_dense(equation) and bool(self._starts.intersection(made))
        if self._flat.issuperset(read):  # Or no channels are read.
            if gain:
                self._gains.update(made)
            elif self._is_flat(equation) if read else equation.name == "broadcast_in_dim":
                self._flat.update(made)
            else:
                return not read and (not made or made[0] in self._starts or self._is_lookup(equation))
        elif self._gains.issuperset(read) and equation.name == "broadcast_in_dim":
            self._gains.update(made)
        elif self._squares.intersection(read):
            return equation.name == "reduce_sum" and {*self._axes[read[0]]} <= {*equation.params["axes"]}
        elif _is_square(equation, read):
            self._squares.update(made)
        else:
            return self._takes_directions(equation, read)
        return True

    def _takes_directions(self, equation: Equation, read: Sequence[int]) -> bool:
        """Returns whether an operation is the same for any directions, or belongs to a layer before its end."""
        name, others, on_the_way = equation.name, self._others(equation), equation.outputs[0] in self._on_the_way
        whole = [one for one in read if one not in self._flat]
        if name in VIEWS or name in ("neg", "reduce_sum"):
            return True
        if name in _SUMS:
            return on_the_way or all(map(self._is_table, others))
        if name in ("mul", "div"):
            if len(whole) > 1:
                return name == "mul" and on_the_way and len(self._gains.intersection(whole)) == 1
            scaled = name == "mul" or equation.inputs[0] == whole[0]
            return scaled and (on_the_way or self._is_uniform(equation))
        if name in _PLACES:  # Cutting or padding along the channels changes them.
            return equation.outputs[0] in self._axes and all(map(self._is_table, others))
        if not is_dense(equation) or len(read) > 1:
            return False
        axes = {*self._axes[read[0]]}
        if name == "conv_general_dilated":
            return bool(others) and axes == {equation.params["dimension_numbers"].lhs_spec[1]}
        summed, matched = ({*both[equation.inputs[0] != read[0]]} for both in equation.params["dimension_numbers"])
        # Read by a kernel, or a weighted sum over positions, as in an attention or a mean.
        return axes <= summed if others else not axes & (summed | matched)

    def _is_gain(self, path: str) -> bool:
        """Returns whether a leaf has one entry per channel."""
        leaf = self._program.leaves[path]
        shape = self._program.shapes[leaf].shape
        return any(shape[axis] == self._program.size(leaf) for axis in self._axes.get(leaf, ()))

    def _others(self, equation: Equation) -> list[int | Constant]:
        """Returns the operands that do not depend on the inputs."""
        return [one for one in equation.inputs if isinstance(one, Constant) or one not in self._program.data]

    def _is_uniform(self, equation: Equation) -> bool:
        """Returns whether operands that do not depend on the inputs are the same for all channels."""
        axes = self._axes.get(equation.outputs[0], ())
        return not any({*axes} & self._program.varying_axes(one) for one in self._others(equation))

    def _is_flat(self, equation: Equation) -> bool:
        """Returns whether an operation maps values that are equal for all channels to such values."""
        return (equation.name in _OF_EACH or equation.name in VIEWS) and self._is_uniform(equation)

    def _is_lookup(self, equation: Equation) -> bool:
        others = self._others(equation)
        return equation.name == "gather" and len(others) == 1 and self._is_table(others[0])

    def _is_table(self, value: int | Constant) -> bool:
        """Returns whether a value is one of the leaves, moved, cut or broadcast, and records which."""
        if isinstance(value, Constant) or len(self._program.leaves_of[value]) != 1:
            return False
        (path,) = self._program.leaves_of[value]
        while value != self._program.leaves[path]:
            equation = self._program.equations[self._program.makers[value]]
            if equation.name not in VIEWS | {"broadcast_in_dim", "slice", "gather"}:
                return False
            value = next(one for one in equation.reads if self._program.leaves_of[one])
        if path in self._leaves:
            self.tables.add(path)
        return path in self._leaves


def _is_square(equation: Equation, read: Sequence[int]) -> bool:
    twice = equation.name == "mul" and len(read) == 2 and read[0] == read[1]
    return twice or equation.name == "square" or (equation.name == "integer_pow" and equation.params["y"] == 2)
