"""The ends of a model's layers: for each kernel, the last value that is linear in it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from merge_jax.transfers.channels.merged_axes import merged_from
from merge_jax.transfers.channels.program import Equation, Program

__all__ = ["VIEWS", "Layer", "Norm", "Unsolvable", "find_layer", "is_dense", "is_state", "merged_axes"]

_ALIASES = {"convert_element_type", "copy", "copy_p", "stop_gradient", "optimization_barrier"}
_MOVES = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "slice", "transpose", "neg"}
VIEWS = {"reshape", "squeeze", "expand_dims", "transpose"} | _ALIASES
_SUMS = {"add", "add_any", "sub"}
_ALONG = {"mul", "div", "neg"} | _SUMS | VIEWS


class Unsolvable(Exception):  # noqa: N818  # It is a reason, and ends up in a report.
    """A leaf cannot be solved; the message gives the reason."""


class Norm(NamedTuple):
    """Leaves that normalise a layer's output: running statistics and gain; `normed` is the normalised value."""

    mean: str
    var: str
    gain: str
    normed: int


class Layer(NamedTuple):
    """A leaf in which a model is linear, from its product with the data to the last linear value.

    Attributes:
      leaf: its path.
      dense: whether it sums over input channels; otherwise each channel has separate entries, as in the gain of a norm
        and a depthwise kernel.
      starts: its products with the data; only one for a dense leaf.
      meets: the equation that computes the first of them.
      end: the last value that is linear in the leaf.
      values: all values from start to end, inclusive.
      biases: leaves added on the way, the last first, and whether each is added after the norm.
      norm: the norm on the way that uses running statistics of this layer's output alone.
      scaled: whether the path from start to end does not depend on the data, so that it has one slope per channel.
    """

    leaf: str
    dense: bool
    starts: tuple[int, ...]
    meets: Equation
    end: int
    values: frozenset[int]
    biases: Mapping[str, bool]
    norm: Norm | None
    scaled: bool


def is_state(path: str, paths: Sequence[str]) -> bool:
    """Returns whether a leaf is not a parameter: if the tree has `params`, any leaf outside it."""
    return any(one.startswith("params/") for one in paths) and not path.startswith("params/")


def find_layer(program: Program, leaf: str) -> Layer:
    """Returns the layer of a leaf of parameters.

    Raises:
      Unsolvable: the model is not linear in it, or uses it in several places.
    """
    linear = _linear_in(program, leaf)
    meets = sorted({place for value in linear for place in program.users[value] if place >= 0})
    meets = [place for place in meets if _makes_data(program, program.equations[place])]
    if _used_otherwise(program, leaf, linear):
        raise Unsolvable("it is transformed nonlinearly before it is applied to the data")
    if not meets:
        raise Unsolvable("it is not applied to anything computed from the inputs")
    equations = [program.equations[place] for place in meets]
    dense = [one for one in equations if is_dense(one)]
    read = [one for one in dense[0].reads if one in linear] if dense else []
    if dense and (len(equations) > 1 or len(read) != 1 or merged_axes(program, leaf, read[0]) is None):
        raise Unsolvable("it is used in several places, or reshaped before it is used")
    if all(one.name in _SUMS for one in equations):
        raise Unsolvable("it is added, but not on the path from a solved layer to its output")
    if not dense and not all(_by_channel(one, linear) for one in equations):
        name = equations[0].name
        if name == "gather":
            raise Unsolvable("it is a table whose rows are looked up")
        raise Unsolvable(f"it is applied to the data by the operation {name!r}, which is not linear in it")
    ways = [_way(program, one.outputs[0], through_data=not dense) for one in equations]
    if len({end for _, end in ways}) > 1:
        raise Unsolvable("it reaches more than one end")
    if _times_itself(ways, linear):
        raise Unsolvable("it is multiplied with its own output")
    starts, (last, end) = tuple(one.outputs[0] for one in equations), ways[-1]
    scaled = all(_other(program, one, value) is None for one, value in last if one.name in ("mul", "div"))
    values = frozenset({end, *(value for way, _ in ways for _, value in way)})
    norm = _norm(program, last, values)
    return Layer(leaf, bool(dense), starts, equations[0], end, values, _biases(program, last, norm), norm, scaled)


def merged_axes(program: Program, leaf: str, value: int) -> list[tuple[int, ...]] | None:
    """Returns for each axis of a value the axes of a leaf that it is merged from; None if it is not that leaf."""
    number = program.leaves[leaf]
    if value == number:
        return [(axis,) for axis in range(len(program.shapes[number].shape))]
    equation = program.equations[program.makers[value]] if value in program.makers else None
    if equation is None or equation.name not in {"reshape", *_ALIASES} or len(equation.reads) != 1:
        return None
    before = merged_axes(program, leaf, equation.reads[0])
    if before is None or equation.name != "reshape":
        return before
    found = merged_from(program.shapes[equation.reads[0]].shape, program.shapes[value].shape)
    return None if found is None else [tuple(axis for one in own for axis in before[one]) for own in found]


def _linear_in(program: Program, leaf: str) -> dict[int, str]:
    """Returns the values that depend only on leaves and are linear in one: `whole` if they equal that leaf.

    Its axes may be merged.
    """
    found = {program.leaves[leaf]: "whole"}
    for equation in program.equations:
        if any(value in program.data for value in equation.outputs):
            continue
        read = [value for value in equation.reads if value in found]
        alias = equation.name in _ALIASES and len(equation.outputs) == 1
        moved = equation.name in _MOVES
        scaled = len(read) == 1 and (equation.name == "mul" or (equation.name == "div" and equation.inputs[0] in found))
        scaled = scaled and not any(leaf in program.leaves_of[value] for value in equation.reads if value not in found)
        if read and (alias or moved or scaled):
            whole = alias or merged_axes(program, leaf, equation.outputs[0]) is not None
            found[equation.outputs[0]] = found[read[0]] if whole else "made"
    return found


def _used_otherwise(program: Program, leaf: str, linear: dict[int, str]) -> bool:
    """Returns whether the data is combined with a value that depends on a leaf and is not linear in it."""
    return any(
        leaf in program.leaves_of[value] and value not in linear and value not in program.data
        for equation in program.equations
        if _makes_data(program, equation)
        for value in equation.reads
    )


def _times_itself(ways: Sequence[tuple[list[tuple[Equation, int]], int]], linear: dict[int, str]) -> bool:
    """Returns whether two values that are linear in a leaf are multiplied."""
    on_the_way = {value for way, _ in ways for _, value in way}.union(linear)
    return any(
        equation.name in ("mul", "div") and on_the_way.intersection(equation.reads) - {value}
        for way, _ in ways
        for equation, value in way
    )


def _makes_data(program: Program, equation: Equation) -> bool:
    return any(value in program.data for value in equation.outputs)


def is_dense(equation: Equation) -> bool:
    """Returns whether an operation sums over channels, with a kernel or with other data."""
    return equation.name == "dot_general" or (
        equation.name == "conv_general_dilated" and equation.params["feature_group_count"] == 1
    )


def _by_channel(equation: Equation, linear: dict[int, str]) -> bool:
    read = [i for i, one in enumerate(equation.inputs) if one in linear]
    if len(read) != 1:
        return False
    depthwise = equation.name == "conv_general_dilated" and equation.params["feature_group_count"] > 1
    return equation.name == "mul" or (equation.name == "div" and read == [0]) or (depthwise and read == [1])


def _way(program: Program, start: int, *, through_data: bool) -> tuple[list[tuple[Equation, int]], int]:
    """Returns the equations after a value that are linear in it, each with its operand, and the last value."""
    way: list[tuple[Equation, int]] = []
    value = start
    while True:
        users = program.users[value]
        equation = program.equations[users[0]] if len(users) == 1 and users[0] >= 0 else None
        if equation is not None and is_dense(equation) and any(one not in program.data for one in equation.reads):
            while way and way[-1][0].name in VIEWS:  # They belong to the next kernel, which reads it as rows.
                value = way.pop()[1]
            return way, value
        if equation is None or equation.name not in _ALONG or len(equation.outputs) != 1:
            return way, value
        if equation.name == "div" and equation.inputs[0] != value:
            return way, value
        if equation.name in ("mul", "div") and not through_data and _other(program, equation, value) is not None:
            return way, value
        way.append((equation, value))
        value = equation.outputs[0]


def _other(program: Program, equation: Equation, value: int) -> int | None:
    """Returns the other operand of an equation if it depends on the inputs."""
    others = [one for one in equation.reads if one != value and one in program.data]
    return others[0] if others else None


def _leaf_beside(program: Program, equation: Equation, value: int) -> dict[str, str]:
    """Returns the leaves of the other operand: `{path: "whole", "made" if it is linear in it, or "else"}`.

    None of them is used elsewhere.
    """
    others = [one for one in equation.reads if one != value and one not in program.data]
    found = {}
    for other in others:
        for path in program.leaves_of[other]:
            linear = _linear_in(program, path)
            uses = {place for one in linear for place in program.users[one] if place >= 0}
            uses = {place for place in uses if _makes_data(program, program.equations[place])}
            if len(uses) == 1 or other not in linear:
                found[path] = linear.get(other, "else")
    return found


def _biases(program: Program, way: Sequence[tuple[Equation, int]], norm: Norm | None) -> dict[str, bool]:
    paths, found, normed = list(program.leaves), {}, False
    for equation, value in way:
        normed = normed or (norm is not None and value == norm.normed)
        if equation.name in ("add", "add_any"):
            beside = _leaf_beside(program, equation, value)
            if len(beside) == 1:
                (path, kind), *_ = beside.items()
                if kind != "else" and not is_state(path, paths):
                    found[path] = normed
    return dict(reversed(found.items()))


def _norm(program: Program, way: Sequence[tuple[Equation, int]], own: frozenset[int]) -> Norm | None:
    paths, mean, var, gain, normed = list(program.leaves), None, None, None, None
    for equation, value in way:
        if equation.name in _SUMS and _other(program, equation, value) not in (None, *own):
            break  # A norm of a sum has not the statistics of the layer's output alone, nor its gain.
        if equation.name not in ("sub", "mul"):
            continue
        for path, kind in _leaf_beside(program, equation, value).items():
            if equation.name == "sub" and is_state(path, paths) and equation.inputs[0] == value:
                mean, normed = path, value
            elif equation.name == "mul" and is_state(path, paths):
                var = path
            elif equation.name == "mul" and kind != "else":
                gain = path
    if mean is None or var is None or gain is None or normed is None:
        return None
    return Norm(mean, var, gain, normed)
