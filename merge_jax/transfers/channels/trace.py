"""Follows a computation axis by axis: the channels that each JAX operation ties, produces, consumes or loses."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.paths import flatten
from merge_jax.transfers.channels.axes import ChannelGraph
from merge_jax.transfers.channels.merged_axes import Factors, apart
from merge_jax.transfers.channels.program import BY_ENTRY, CALLS, Constant, Equation, Program
from merge_jax.transfers.channels.sums import OnSum, Sum, SummedAxes, Value
from merge_jax.transfers.host_leaves import any_on_host, on_device
from merge_jax.types import Params

__all__ = ["FOLLOWED", "ChannelTrace"]

_REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"),
    *("argmax", "argmin"),
}
_FORMS = {
    *("dot_general", "conv_general_dilated", "transpose", "broadcast_in_dim", "reshape", "squeeze", "expand_dims"),
    *("gather", "scatter", "scatter-add", "scatter-mul", "dynamic_update_slice", "concatenate"),
    *("stack", "unstack", "tile"),
}
_Axes = Callable[[Mapping[str, Any], Sequence[int], Sequence[int]], Iterable[int]]
# The axes along which a primitive mixes, reorders or cuts entries, from its parameters, the old and the new shape.
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
    {*CALLS, *_REDUCTIONS, *BY_ENTRY, *_FORMS, *_ALONG, "optimization_barrier", "cond", "platform_index", "iota"}
)
"""Names of the primitives that are followed (`cond` only if it selects by platform)."""


class ChannelTrace(SummedAxes):
    """A traced function whose axes are followed."""

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Params,
        inputs: Sequence[Any],
        factors: Mapping[str, Factors] | None = None,
    ):
        """Takes a function of a tree and inputs, and the factors of leaves whose merged axes should be split."""
        self.factors = factors or {}
        super().__init__({path: jnp.shape(leaf) for path, leaf in self._apart(params).items()}, self.factors)
        self.program = Program(fn, params, inputs, self.factors)
        self.nodes: dict[int, tuple[int, ...]] = {}
        """The nodes of the axes of each value of the program, available after tracing."""
        self.sums: list[Sum] = []
        """The contractions without their values, in order; available after `followed`."""

    @classmethod
    def followed(
        cls, fn: Callable[..., Any], params: Params, inputs: Sequence[Any], *, strict: bool
    ) -> tuple["ChannelTrace", ChannelGraph]:
        """Follows a function for shapes only; returns the trace and the axes. `strict` calls `check`.

        If merged axes of leaves turn out to contain channels, it is followed again with these axes split.
        """
        factors: dict[str, Factors] = {}
        while True:
            trace = cls(fn, params, inputs, factors)
            jax.eval_shape(lambda params, *inputs, to=trace: to.run(params, inputs, to.note), params, *inputs)
            graph = trace.graph()
            if not (more := trace.merged()):
                break
            factors = factors | {path: _refined(factors.get(path), found) for path, found in more.items()}
        if strict:
            trace.check()
        return trace, graph

    def run(self, params: Params, inputs: Sequence[Any], on_sum: OnSum) -> list[Any]:
        """Evaluates the function, and passes on each contraction with a leaf, or of two values.

        Outside `jit`, a value is freed after its last use, and NumPy leaves are moved to the device when they are read.
        """
        program, leaves = self.program, self._apart(params)
        known = {number: Value(leaves[path], self._leaves[path], True) for path, number in program.leaves.items()}
        known |= {
            number: Value(leaf, self._fresh(jnp.shape(leaf)))
            for number, leaf in zip(program.inputs, jax.tree.leaves(tuple(inputs)), strict=True)
        }
        self._inputs.update(node for number in program.inputs for node in known[number].nodes)
        self._carried += [one.nodes for one in known.values()]

        def read(one: int | Constant) -> Value:
            if not isinstance(one, Constant):
                return known[one]
            return Value(one.value, self._bind(self._fresh(np.shape(one.value)), one), from_leaves=True)

        self.nodes = {number: one.nodes for number, one in known.items()}
        for place, equation in enumerate(program.equations):
            values = [read(one) for one in equation.inputs]
            operands = [one.value for one in values]
            results = equation.run(on_device(operands))
            if any_on_host(operands):  # Otherwise the next leaves would be on the device too early.
                jax.block_until_ready(results)
            made = self._follow(equation, values, results, on_sum)
            known |= dict(zip(equation.outputs, made, strict=True))
            self.nodes |= {number: one.nodes for number, one in zip(equation.outputs, made, strict=True)}
            self._carried += [one.nodes for one in made]
            for number in program.last_read.get(place, ()):
                del known[number]
        return [read(one).value for one in program.outputs]

    def note(self, one: Sum) -> None:
        """Adds a contraction to `sums`."""
        entering = tuple(value._replace(value=None) for value in one.entering)
        self.sums.append(one._replace(entering=entering))

    def _apart(self, params: Params) -> dict[str, Any]:
        return apart(flatten(params), self.factors)

    def _follow(self, eqn: Equation, values: Sequence[Value], results: Sequence[Any], on_sum: OnSum) -> list[Value]:
        """Returns the results with the nodes of their axes."""
        if eqn.name == "optimization_barrier":
            return [one._replace(value=result) for one, result in zip(values, results, strict=True)]
        from_leaves = all(one.from_leaves for one in values)
        nodes = (
            self._nodes(eqn, values, [jnp.shape(result) for result in results], on_sum) if values and results else None
        )
        if nodes is None:
            nodes = [self._fresh(jnp.shape(result)) for result in results]
            if results:  # A whole leaf as operand might produce channels.
                for one in values:
                    self._lose(eqn.name, one.nodes)
                    self._touch(one.nodes)
        for own, number in zip(nodes, eqn.outputs, strict=True):
            if number not in self.program.data and not self.program.leaves_of[number]:
                self._bind(own, number)
        return [Value(result, own, from_leaves) for result, own in zip(results, nodes, strict=True)]

    def _bind(self, nodes: tuple[int, ...], constant: int | Constant) -> tuple[int, ...]:
        """Returns the nodes of a constant. Its order binds the axes combined with it, as with rotary angles."""
        self._bound.update(nodes[axis] for axis in self.program.varying_axes(constant))
        return nodes

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
            return [self._convolution(params, values, new_shape, on_sum)]
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
        if name == "stack":
            return [self._stacked(values, params["axis"], new_shape)]
        if name == "unstack":
            return [tuple(node for axis, node in enumerate(nodes) if axis != params["axis"])] * len(new_shapes)
        if name == "tile":
            return [self._tiled(nodes, params["reps"])]
        if name in ("slice", "split") and (parts := self._cut_out(params, values[0], shape, new_shapes)):
            return parts
        if name in _ALONG:
            operands = values if len(values) == len(new_shapes) else [values[0]] * len(new_shapes)
            return [
                self._without(name, one, _ALONG[name](params, jnp.shape(one.value), new), new)
                for one, new in zip(operands, new_shapes, strict=True)
            ]
        if name in BY_ENTRY and all(_broadcasts(one, new_shape) for one in shapes):
            return [self._by_entry(values, new_shape)]
        return None

    def _by_entry(self, values: Sequence[Value], shape: Sequence[int], skip: int | None = None) -> tuple[int, ...]:
        arrays = [one for one in values if one.nodes]
        # A value with one entry is a scalar, such as a kernel's spectral norm.
        arrays = [one for one in arrays if jnp.size(one.value) > 1] or arrays
        if len(arrays) == 1 and jnp.shape(arrays[0].value) == shape:
            return arrays[0].nodes  # A cast or scaled leaf is still a leaf.
        nodes, from_leaves = list(self._fresh(shape)), all(one.from_leaves for one in values)
        for axis, node in enumerate(nodes):
            for one in arrays:
                if axis != skip and jnp.shape(one.value)[axis] == shape[axis]:
                    self._tie(node, one.nodes[axis])
                    if from_leaves and self._is_leaf(one.nodes[axis]):
                        nodes[axis] = one.nodes[axis]  # A kernel scaled by other leaves is still that kernel.
        return tuple(nodes)

    def _placed(
        self, nodes: Sequence[int], shape: Sequence[int], places: Sequence[int], new_shape: Sequence[int]
    ) -> tuple[int, ...]:
        placed = list(self._fresh(new_shape))
        for node, size, place in zip(nodes, shape, places, strict=True):
            if size == new_shape[place]:
                placed[place] = node
        return tuple(placed)

    def _reshaped(self, value: Value, shape: Sequence[int], new_shape: Sequence[int]) -> tuple[int, ...]:
        """Merged and split axes keep their nodes as factors; axes of size 1 may be added or removed."""
        added = len(new_shape) - len(shape)
        if tuple(new_shape) == (
            *(1,) * added,
            *shape,
        ):  # An axis of size 1, a single head, is identified only by its position.
            return (*self._fresh((1,) * added), *value.nodes)
        new_nodes, lost = self._regrouped(value.nodes, shape, new_shape)
        self._lose("reshape", lost)
        if value.from_leaves:
            self._cut(set(new_nodes).difference(value.nodes), lost)
            leaf_nodes = [node for node in value.nodes if node in self._leaf_axes]
            self._origins |= {atom: node for node in leaf_nodes for atom in self.atoms(node) if atom != node}
        return new_nodes

    def _joined(self, values: Sequence[Value], axis: int, shape: Sequence[int]) -> tuple[int, ...]:
        """Concatenated channels are tied, in pieces of a size that divides all parts."""
        nodes = list(self._by_entry(values, shape, skip=axis))
        if len(values) > 1:
            lost = tuple(one.nodes[axis] for one in values)
            from_leaves = all(one.from_leaves for one in values)
            unit = math.gcd(*self.sizes(lost))
            pieces = [] if from_leaves or unit == 1 else self._pieces("concatenate", lost, unit)
            if pieces:
                for piece in pieces[1:]:
                    self._tie(pieces[0], piece)
                nodes[axis] = self._merged((*self._fresh((shape[axis] // unit,)), *self.atoms(pieces[0])))
            else:
                self._lose("concatenate", lost)
                if not self._bound.isdisjoint(lost):
                    self._bound.add(nodes[axis])
            if from_leaves:
                self._cut((nodes[axis],), lost)
        return tuple(nodes)

    def _stacked(self, values: Sequence[Value], axis: int, shape: Sequence[int]) -> tuple[int, ...]:
        along = [
            one._replace(
                value=jnp.expand_dims(one.value, axis),
                nodes=(*one.nodes[:axis], *self._fresh((1,)), *one.nodes[axis:]),
            )
            for one in values
        ]
        return self._by_entry(along, shape, skip=axis)

    def _tiled(self, nodes: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            node
            if count == 1
            else self._merged((*self._fresh((count,)), *(one for one in self.atoms(node) if self._sizes[one] > 1)))
            for node, count in zip(nodes, counts, strict=True)
        )

    def _pieces(self, operation: str, nodes: Sequence[int], unit: int) -> list[int]:
        """Returns the nodes of equal pieces of axes; none if an axis cannot be cut so."""
        cut = [
            ((None, node), []) if self._sizes[node] == unit else
            self._regrouped((node,), self.sizes((node,)), (self._sizes[node] // unit, unit))
            for node in nodes
        ]  # fmt: skip
        if any(lost for _, lost in cut):
            return []
        self._lose(operation, (which for (which, _), _ in cut if which is not None))
        return [piece for (_, piece), _ in cut]

    def _cut_out(self, params: Any, value: Value, shape: Sequence[int], new_shapes: Sequence[Sequence[int]]) -> Any:
        """Returns the nodes of parts of a value, cut along one axis at multiples of one size; otherwise None."""
        axes = [axis for axis, size in enumerate(shape) if size != new_shapes[0][axis]]
        if value.from_leaves or len(axes) != 1 or any(one != 1 for one in params.get("strides") or ()):
            return None
        (axis,) = axes
        ends = params["limit_indices"][axis : axis + 1] if "limit_indices" in params else ()
        unit = math.gcd(shape[axis], *(new[axis] for new in new_shapes), *ends)
        pieces = [] if unit == 1 else self._pieces("slice", value.nodes[axis : axis + 1], unit)
        if not pieces:
            return None
        (piece,), parts = pieces, []
        for new in new_shapes:
            count = new[axis] // unit
            own = self._tied(piece) if count == 1 else self._merged((*self._fresh((count,)), *self.atoms(piece)))
            parts.append((*value.nodes[:axis], own, *value.nodes[axis + 1 :]))
        return parts

    def _without(self, operation: str, value: Value, axes: Iterable[int], new_shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the nodes of a value, with new ones for these axes, whose entries have changed."""
        axes, fresh = set(axes), self._fresh(new_shape)
        lost = [axis for axis in axes if jnp.shape(value.value)[axis] > 1]
        self._lose(operation, (value.nodes[axis] for axis in lost))
        if value.from_leaves:
            for axis in lost:
                self._cut((fresh[axis],), (value.nodes[axis],))
        return tuple(fresh[axis] if axis in axes else node for axis, node in enumerate(value.nodes))

    def _gathered(self, params: Any, value: Value, shape: Sequence[int], new_shape: Sequence[int]) -> tuple[int, ...]:
        numbers, gathered, nodes = params["dimension_numbers"], list(self._fresh(new_shape)), value.nodes
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        kept = [axis for axis in range(len(shape)) if axis not in gone]
        whole = {axis for axis in kept if params["slice_sizes"][axis] == shape[axis]}
        for axis, place in zip(kept, numbers.offset_dims, strict=True):
            if axis in whole:
                gathered[place] = self._tied(nodes[axis])
                self._make(nodes[axis])
        cut = [nodes[axis] for axis, size in enumerate(shape) if size > 1 and axis not in whole]
        self._bound.update(cut)
        if not value.from_leaves:  # Looked-up tokens have a meaning outside the model; see `ChannelGraph.hidden`.
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
        """Returns the nodes of a value into which another is written, at offsets along these axes."""
        value, update = values
        shape, new_shape = jnp.shape(value.value), jnp.shape(update.value)
        whole = [(axis, place) for axis, place in zip(axes, places, strict=True) if shape[axis] == new_shape[place]]
        for axis, place in whole:
            self._tie(value.nodes[axis], update.nodes[place])
        self._lose(
            operation, (node for place, node in enumerate(update.nodes) if place not in {two for _, two in whole})
        )
        return self._without(operation, value, set(range(len(shape))).difference(axis for axis, _ in whole), shape)

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

    def _convolution(
        self, params: Any, values: Sequence[Value], new_shape: Sequence[int], on_sum: OnSum
    ) -> tuple[int, ...]:
        numbers, (x, kernel) = params["dimension_numbers"], values
        in_axis, (out_axis, kernel_in) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
        nodes = list(self._fresh(new_shape))
        self._windows.update(kernel.nodes[axis] for axis in numbers.rhs_spec[2:])
        # Positions have an order, which other layers may use.
        self._bound.update(
            (nodes[axis] for axis in numbers.out_spec[2:]), (x.nodes[axis] for axis in numbers.lhs_spec[2:])
        )
        nodes[numbers.out_spec[0]] = self._tied(x.nodes[numbers.lhs_spec[0]])
        feature_groups, channels = params["feature_group_count"], jnp.shape(kernel.value)[out_axis]
        depthwise = feature_groups == channels == jnp.shape(x.value)[in_axis]
        if feature_groups == 1:
            self._sum_over(x, (in_axis,), kernel, (kernel_in,), (), on_sum)
            self._make(kernel.nodes[out_axis])
        if feature_groups == 1 or depthwise:
            nodes[numbers.out_spec[1]] = self._tied(kernel.nodes[out_axis])
        if feature_groups > 1 and depthwise:  # Each channel separately.
            self._tie(x.nodes[in_axis], kernel.nodes[out_axis])
        if feature_groups > 1 and not depthwise:
            self._make(kernel.nodes[out_axis])
            self._lose("conv_general_dilated in groups", (x.nodes[in_axis], kernel.nodes[out_axis]))
        return tuple(nodes)


def _refined(factors: Factors | None, found: Factors) -> Factors:
    """Returns the factors of a whole leaf, given those found for the leaf with split axes."""
    if factors is None:
        return found
    rest = iter(found)
    return tuple(tuple(itertools.chain.from_iterable(next(rest) for _ in own)) for own in factors)


def _broadcasts(shape: Sequence[int], result: Sequence[int]) -> bool:
    return not shape or (len(shape) == len(result) and all(a in (1, b) for a, b in zip(shape, result, strict=True)))
