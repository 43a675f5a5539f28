"""A computation, followed axis by axis: what each operation of JAX ties, makes, consumes or loses."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.transfers.channel_axes import AxisNodes, ChannelGraph
from merge_jax.transfers.host_leaves import any_on_host, on_device
from merge_jax.transfers.program import CALLS, Constant, Equation, Program
from merge_jax.types import Params

__all__ = ["FOLLOWED", "ChannelTrace", "Sum"]

_REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"),
    *("argmax", "argmin"),
}
_BY_ENTRY = {
    *("add", "add_any", "sub", "mul", "div", "rem", "max", "min", "pow", "integer_pow", "atan2", "nextafter"),
    *("neg", "sign", "abs", "floor", "ceil", "round", "square", "sqrt", "rsqrt", "cbrt", "is_finite"),
    *("exp", "exp2", "log", "expm1", "log1p", "tanh", "logistic", "erf", "erfc", "erf_inv", "lgamma", "digamma"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "select_n", "clamp"),
    *("shift_left", "shift_right_logical", "shift_right_arithmetic", "population_count", "stop_gradient"),
    *("convert_element_type", "reduce_precision", "copy", "copy_p", "name", "sharding_constraint", "pvary"),
}
_FORMS = {
    *("dot_general", "conv_general_dilated", "transpose", "broadcast_in_dim", "reshape", "squeeze", "expand_dims"),
    *("gather", "scatter", "scatter-add", "scatter-mul", "dynamic_update_slice", "concatenate"),
}
_Axes = Callable[[Mapping[str, Any], Sequence[int], Sequence[int]], Iterable[int]]
# Of what mixes, reorders or cuts entries along some axes: those, from its parameters, the old shape and the new.
_ALONG: Mapping[str, _Axes] = {
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), lambda params, *_: (params["axis"],)),
    "sort": lambda params, *_: (params["dimension"],),
    "rev": lambda params, *_: params["dimensions"],
    "split": lambda params, *_: (params["axis"],),
    "pad": lambda params, *_: [axis for axis, sides in enumerate(params["padding_config"]) if any(sides)],
    **dict.fromkeys(
        ("slice", "dynamic_slice"),
        lambda _, shape, new: [axis for axis, (a, b) in enumerate(zip(shape, new, strict=True)) if a != b],
    ),
    **dict.fromkeys(
        ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"),
        lambda params, *_: [axis for axis, size in enumerate(params["window_dimensions"]) if size > 1],
    ),
}

FOLLOWED = frozenset(
    {*CALLS, *_REDUCTIONS, *_BY_ENTRY, *_FORMS, *_ALONG, "optimization_barrier", "cond", "platform_index", "iota"}
)
"""Names of the primitives that are followed (`cond` where it asks for the platform alone)."""


class Value(NamedTuple):
    """A value of the computation with the node of each of its axes, and whether it is made of leaves alone."""

    value: Any
    nodes: tuple[int, ...]
    from_leaves: bool = False


class Sum(NamedTuple):
    """A sum over axes of a leaf and of what enters there, or of two values that are no leaves.

    Attributes:
      path: of the leaf; None where there is none.
      axes: of the leaf that are summed over, in their order.
      entering: what enters the leaf, or both values.
      places: the axes of each of them that are summed over.
    """

    path: str | None
    axes: tuple[int, ...]
    entering: tuple[Value, ...]
    places: tuple[tuple[int, ...], ...]


OnSum = Callable[[Sum], None]


class ChannelTrace(AxisNodes):
    """A traced function whose axes are followed."""

    def __init__(self, fn: Callable[..., Any], params: Params, inputs: Sequence[Any]):  # noqa: D107
        super().__init__(params)
        self.program = Program(fn, params, inputs)
        self.nodes: dict[int, tuple[int, ...]] = {}
        """The nodes of the axes of each value of the program, once it was followed."""

    def follow(self, params: Params, inputs: Sequence[Any], *, strict: bool = False) -> ChannelGraph:
        """Follows the function for shapes alone, and returns what is tied; `strict` refuses what `check` does."""
        jax.eval_shape(lambda params, *inputs: self.run(params, inputs, lambda _: None), params, *inputs)
        graph = self.graph()
        if strict:
            self.check()
        return graph

    def run(self, params: Params, inputs: Sequence[Any], on_sum: OnSum) -> list[Any]:
        """Evaluates the function, and hands over each sum over axes that are of a leaf, or of two values.

        Outside of `jit`, a value is kept until it was read for the last time, and leaves of NumPy are put on the device
        where they are read.
        """
        program, leaves = self.program, jax.tree.leaves(params)
        known = {
            number: Value(leaf, self._leaves[path], True)
            for (path, number), leaf in zip(program.leaves.items(), leaves, strict=True)
        }
        known |= {
            number: Value(leaf, self._fresh(jnp.ndim(leaf)))
            for number, leaf in zip(program.inputs, jax.tree.leaves(tuple(inputs)), strict=True)
        }
        self._inputs.update(node for number in program.inputs for node in known[number].nodes)
        self._carried += [one.nodes for one in known.values()]

        def read(one: int | Constant) -> Value:
            return Value(one.value, self._fresh(np.ndim(one.value)), True) if isinstance(one, Constant) else known[one]

        self.nodes = {number: one.nodes for number, one in known.items()}
        for place, equation in enumerate(program.equations):
            values = [read(one) for one in equation.inputs]
            operands = [one.value for one in values]
            results = equation.run(on_device(operands))
            if any_on_host(operands):  # Or what is dispatched and not yet done would hold the leaves after it.
                jax.block_until_ready(results)
            made = self._follow(equation, values, results, on_sum)
            known |= dict(zip(equation.outputs, made, strict=True))
            self.nodes |= {number: one.nodes for number, one in zip(equation.outputs, made, strict=True)}
            self._carried += [one.nodes for one in made]
            for number in program.last_read.get(place, ()):
                del known[number]
        return [read(one).value for one in program.outputs]

    def _follow(self, eqn: Equation, values: Sequence[Value], results: Sequence[Any], on_sum: OnSum) -> list[Value]:
        """Returns the results with the nodes of their axes."""
        if eqn.name == "optimization_barrier":
            return [one._replace(value=result) for one, result in zip(values, results, strict=True)]
        from_leaves = all(one.from_leaves for one in values)
        nodes = (
            self._nodes(eqn, values, [jnp.shape(result) for result in results], on_sum) if values and results else None
        )
        if nodes is None:
            nodes = [self._fresh(jnp.ndim(result)) for result in results]
            if results:  # A leaf that goes in whole might make channels there.
                for one in values:
                    self._lose(eqn.name, one.nodes)
                    self._touch(one.nodes)
        return [Value(result, own, from_leaves) for result, own in zip(results, nodes, strict=True)]

    def _nodes(
        self, eqn: Equation, values: Sequence[Value], new_shapes: Sequence[tuple[int, ...]], on_sum: OnSum
    ) -> list[tuple[int, ...]] | None:
        """Returns the nodes of each result's axes; None for an operation that cannot be followed."""
        name, params = eqn.name, eqn.params
        shapes = [jnp.shape(one.value) for one in values]
        nodes, shape, new_shape = values[0].nodes, shapes[0], new_shapes[0]
        if name == "dot_general":
            return [self._product(params["dimension_numbers"], values, on_sum)]
        if name == "conv_general_dilated" and params["batch_group_count"] == 1:
            return [self._convolution(params, values, on_sum)]
        if name == "transpose":
            return [tuple(nodes[axis] for axis in params["permutation"])]
        if name == "broadcast_in_dim":
            return [self._placed(nodes, shape, params["broadcast_dimensions"], new_shape)]
        if name in ("reshape", "squeeze", "expand_dims"):
            return [self._reshaped(values[0], shape, new_shape)]
        if name in _REDUCTIONS:
            return [tuple(node for axis, node in enumerate(nodes) if axis not in params["axes"])]
        if name == "gather":
            return [self._gathered(params, values[0], shape, new_shape)]
        if name in ("scatter", "scatter-add", "scatter-mul"):
            return [self._scattered(name, params, values, shapes)]
        if name == "dynamic_update_slice":
            return [self._written(name, values[:2], range(len(shape)), range(len(shape)))]
        if name == "concatenate":
            return [self._joined(values, params["dimension"], new_shape)]
        if name in _ALONG:
            operands = values if len(values) == len(new_shapes) else [values[0]] * len(new_shapes)
            return [
                self._without(name, one, _ALONG[name](params, jnp.shape(one.value), new))
                for one, new in zip(operands, new_shapes, strict=True)
            ]
        if name in _BY_ENTRY and all(_broadcasts(one, new_shape) for one in shapes):
            return [self._by_entry(values, new_shape)]
        return None

    def _by_entry(self, values: Sequence[Value], shape: Sequence[int], skip: int | None = None) -> tuple[int, ...]:
        arrays = [one for one in values if one.nodes]
        # What has one entry is a scalar, such as the spectral norm by which a kernel is divided.
        arrays = [one for one in arrays if jnp.size(one.value) > 1] or arrays
        if len(arrays) == 1 and jnp.shape(arrays[0].value) == shape:
            return arrays[0].nodes  # A leaf that is cast or scaled is a leaf still.
        nodes, from_leaves = list(self._fresh(len(shape))), all(one.from_leaves for one in values)
        for axis, node in enumerate(nodes):
            for one in arrays:
                if axis != skip and jnp.shape(one.value)[axis] == shape[axis]:
                    self._tie(node, one.nodes[axis])
                    if from_leaves and one.nodes[axis] in self._leaf_axes:
                        nodes[axis] = one.nodes[axis]  # A kernel that other leaves scale is that kernel still.
        return tuple(nodes)

    def _placed(
        self, nodes: Sequence[int], shape: Sequence[int], places: Sequence[int], new_shape: Sequence[int]
    ) -> tuple[int, ...]:
        placed = list(self._fresh(len(new_shape)))
        for node, size, place in zip(nodes, shape, places, strict=True):
            if size == new_shape[place]:
                placed[place] = node
        return tuple(placed)

    def _reshaped(self, value: Value, shape: Sequence[int], new_shape: Sequence[int]) -> tuple[int, ...]:
        """Axes that are neither split nor merged keep their nodes; axes of size 1 come and go."""
        new_nodes, kept = list(self._fresh(len(new_shape))), set()
        added = len(new_shape) - len(shape)
        if tuple(new_shape) == (
            *(1,) * added,
            *shape,
        ):  # An axis of size 1, a single head, is known by its place alone.
            return (*new_nodes[:added], *value.nodes)
        ends = {end: (axis, size) for axis, (end, size) in enumerate(_ends(shape)) if size > 1}
        for axis, (end, size) in enumerate(_ends(new_shape)):
            if size > 1 and end in ends and ends[end][1] == size:
                kept.add(ends[end][0])
                new_nodes[axis] = value.nodes[ends[end][0]]
        lost = tuple(value.nodes[axis] for axis, size in enumerate(shape) if size > 1 and axis not in kept)
        self._lose("reshape", lost)
        if value.from_leaves:
            self._cut(set(new_nodes).difference(value.nodes), lost)
        return tuple(new_nodes)

    def _joined(self, values: Sequence[Value], axis: int, shape: Sequence[int]) -> tuple[int, ...]:
        nodes = self._by_entry(values, shape, skip=axis)
        if len(values) > 1:
            lost = tuple(one.nodes[axis] for one in values)
            self._lose("concatenate", lost)
            if all(one.from_leaves for one in values):
                self._cut((nodes[axis],), lost)
        return nodes

    def _without(self, operation: str, value: Value, axes: Iterable[int]) -> tuple[int, ...]:
        """Returns the nodes of a value, new ones for those axes, whose entries are no longer what they were."""
        axes, fresh = set(axes), self._fresh(len(value.nodes))
        lost = [axis for axis in axes if jnp.shape(value.value)[axis] > 1]
        self._lose(operation, (value.nodes[axis] for axis in lost))
        if value.from_leaves:
            for axis in lost:
                self._cut((fresh[axis],), (value.nodes[axis],))
        return tuple(fresh[axis] if axis in axes else node for axis, node in enumerate(value.nodes))

    def _gathered(self, params: Any, value: Value, shape: Sequence[int], new_shape: Sequence[int]) -> tuple[int, ...]:
        numbers, gathered, nodes = params["dimension_numbers"], list(self._fresh(len(new_shape))), value.nodes
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        kept = [axis for axis in range(len(shape)) if axis not in gone]
        whole = {axis for axis in kept if params["slice_sizes"][axis] == shape[axis]}
        for axis, place in zip(kept, numbers.offset_dims, strict=True):
            if axis in whole:
                gathered[place] = self._tied(nodes[axis])
                self._make(nodes[axis])
        cut = [nodes[axis] for axis, size in enumerate(shape) if size > 1 and axis not in whole]
        self._bound.update(cut)
        if not value.from_leaves:  # Tokens that are looked up are bound to what is outside; see `ChannelGraph.hidden`.
            self._lose("gather", cut)
        return tuple(gathered)

    def _scattered(
        self, operation: str, params: Any, values: Sequence[Value], shapes: Sequence[Sequence[int]]
    ) -> tuple[int, ...]:
        numbers = params["dimension_numbers"]
        gone = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
        kept = [axis for axis in range(len(shapes[0])) if axis not in gone]
        return self._written(operation, (values[0], values[2]), kept, numbers.update_window_dims)

    def _written(
        self, operation: str, values: Sequence[Value], axes: Sequence[int], places: Sequence[int]
    ) -> tuple[int, ...]:
        """Returns the nodes of a value into which another is written, its axes at places along those axes."""
        value, update = values
        shape, new_shape = jnp.shape(value.value), jnp.shape(update.value)
        whole = [(axis, place) for axis, place in zip(axes, places, strict=True) if shape[axis] == new_shape[place]]
        for axis, place in whole:
            self._tie(value.nodes[axis], update.nodes[place])
        self._lose(
            operation, (node for place, node in enumerate(update.nodes) if place not in {two for _, two in whole})
        )
        return self._without(operation, value, set(range(len(shape))).difference(axis for axis, _ in whole))

    def _product(self, numbers: Any, values: Sequence[Value], on_sum: OnSum) -> tuple[int, ...]:
        ((left, right), (left_batch, right_batch)), (a, b) = numbers, values
        for axis, other in zip(left_batch, right_batch, strict=True):
            self._tie(a.nodes[axis], b.nodes[other])
        self._sum_over(a, left, b, right, [a.nodes[axis] for axis in left_batch], on_sum)
        free = [node for axis, node in enumerate(a.nodes) if axis not in (*left, *left_batch)]
        other_free = [node for axis, node in enumerate(b.nodes) if axis not in (*right, *right_batch)]
        from_leaves = a.from_leaves and b.from_leaves
        if not from_leaves:
            for node in (*free, *other_free):
                self._make(node)
        return tuple(
            self._tied(node, from_leaves) for node in (*(a.nodes[axis] for axis in left_batch), *free, *other_free)
        )

    def _convolution(self, params: Any, values: Sequence[Value], on_sum: OnSum) -> tuple[int, ...]:
        numbers, (x, kernel) = params["dimension_numbers"], values
        in_axis, (out_axis, kernel_in) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
        nodes = list(self._fresh(len(x.nodes)))
        nodes[numbers.out_spec[0]] = self._tied(x.nodes[numbers.lhs_spec[0]])
        feature_groups, channels = params["feature_group_count"], jnp.shape(kernel.value)[out_axis]
        depthwise = feature_groups == channels == jnp.shape(x.value)[in_axis]
        if feature_groups == 1:
            self._sum_over(x, (in_axis,), kernel, (kernel_in,), (), on_sum)
            self._make(kernel.nodes[out_axis])
        if feature_groups == 1 or depthwise:
            nodes[numbers.out_spec[1]] = self._tied(kernel.nodes[out_axis])
        if feature_groups > 1 and depthwise:  # Each channel by itself.
            self._tie(x.nodes[in_axis], kernel.nodes[out_axis])
        if feature_groups > 1 and not depthwise:
            self._make(kernel.nodes[out_axis])
            self._lose("conv_general_dilated in groups", (x.nodes[in_axis], kernel.nodes[out_axis]))
        return tuple(nodes)

    def _sum_over(
        self, a: Value, left: Sequence[int], b: Value, right: Sequence[int], matched: Sequence[int], on_sum: OnSum
    ) -> None:
        """Ties the axes of two values that are summed over together; `matched` are those that stay, one by one."""
        nodes = [[one.nodes[axis] for axis in axes] for one, axes in ((a, left), (b, right))]
        places = [[self._leaf_axes.get(node) for node in own] for own in nodes]
        for node, other in zip(*nodes, strict=True):
            # The oldest stands for all: an input does where nothing has tied its axis to a leaf before.
            if {self._root(node), self._root(other)} & self._inputs:
                self._bound.update({node, other} & self._leaf_axes.keys())
            self._tie(node, other)
            self._touch((*self._parts.get(node, ()), *self._parts.get(other, ())))
        self._consumed.update(nodes[0])
        beside = [tuple(nodes[0][:i] + nodes[0][i + 1 :]) for i in range(len(left))]
        if a.from_leaves and b.from_leaves:  # The product of two leaves is a kernel of which each has made a part.
            for node in (*nodes[0], *nodes[1]):
                self._make(node)
        elif any(places[0]) or any(places[1]):
            for leaf_places, entering, axes in ((places[1], a, left), (places[0], b, right)):
                for path in dict.fromkeys(place[0] for place in leaf_places if place):
                    at = sorted(
                        (place[1], axis)
                        for place, axis in zip(leaf_places, axes, strict=True)
                        if place and place[0] == path
                    )
                    summed, entered = zip(*at, strict=True)
                    self._summed.setdefault(path, set()).update(summed)
                    on_sum(Sum(path, summed, (entering,), (entered,)))
        elif left:
            beside = [(*others, *matched) for others in beside]
            on_sum(Sum(None, (), (a, b), (tuple(left), tuple(right))))
        self._beside += zip(nodes[0], beside, strict=True)


def _ends(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Returns for each axis how many entries there are up to its end, along with its size."""
    return list(zip(np.cumprod(np.asarray(shape, np.int64)).tolist(), shape, strict=True))


def _broadcasts(shape: Sequence[int], result: Sequence[int]) -> bool:
    return not shape or (len(shape) == len(result) and all(a in (1, b) for a, b in zip(shape, result, strict=True)))
