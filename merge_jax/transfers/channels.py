"""Wiring: which axes of a model's leaves are one space of channels, found by following its computation."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from merge_jax.paths import flatten, near_misses
from merge_jax.types import Params

__all__ = ["FOLLOWED", "Wiring", "input_moments", "wiring"]

_CALLS = {
    *("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
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
    {*_CALLS, *_REDUCTIONS, *_BY_ENTRY, *_FORMS, *_ALONG, "optimization_barrier", "cond", "platform_index", "iota"}
)
"""Names of the primitives that are followed (`cond` where it asks for the platform alone)."""


@dataclass(frozen=True)
class Wiring:
    """How the axes of a model's leaves hang together.

    Attributes:
      spaces: `{leaf path: name of the space of each of its axes}`. Axes of one space are tied: to permute the channels
        of the space is to permute all of them alike. A space is named after the first of its axes, such as
        `stage1_0/conv1/kernel:3`.
      inputs: `{leaf path: axes that are only summed over with what enters the layer}`; the other axes make channels.
      both: `{leaf path: axes that make channels in one place and are summed over in another}`, as in an embedding
        that is the last layer too.
      read: spaces that are summed over anywhere, by a layer or, as in attention, with other channels.
      hidden: spaces that layers of the model both make and read. The others are bound to what is outside of it: tokens
        that are looked up, inputs that a layer reads, labels.
      within: `{space: space around it}` of hidden spaces that are only met inside of one channel of another, as the
        channels of an attention are in its heads. Those of one head may change places without those of the next.
    """

    spaces: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    both: Mapping[str, tuple[int, ...]]
    read: frozenset[str]
    hidden: frozenset[str]
    within: Mapping[str, str]

    def of(self, path: str) -> tuple[str, ...]:
        """Returns the spaces of a leaf.

        Raises:
          ValueError: there is no such leaf.
        """
        if path not in self.spaces:
            raise ValueError(f"the wiring is of a model without a leaf {path!r}; {near_misses(path, self.spaces)}")
        return self.spaces[path]

    def summed(self, path: str) -> tuple[int, ...]:
        """Returns the axes of a leaf that are summed over anywhere, in their order."""
        return tuple(sorted((*self.inputs[path], *self.both[path])))


class _Value(NamedTuple):
    """A value of the computation with the node of each of its axes, and whether it is made of leaves alone."""

    value: Any
    nodes: tuple[int, ...]
    of_leaves: bool = False


class _Sum(NamedTuple):
    """A sum over axes of a leaf and of what enters there, or of two values that are no leaves.

    Attributes:
      path: of the leaf; None where there is none.
      axes: of the leaf that are summed over, in their order.
      entering: what enters the leaf, or both values.
      places: the axes of each of them that are summed over.
    """

    path: str | None
    axes: tuple[int, ...]
    entering: tuple[_Value, ...]
    places: tuple[tuple[int, ...], ...]


_OnSum = Callable[[_Sum], None]


def wiring(fn: Callable[..., Any], params: Params, *inputs: Any, strict: bool = True) -> Wiring:
    """Returns the wiring of a model: which axes of its leaves are tied by residual sums, norms, biases and products.

    `fn(params, *inputs)` is traced for shapes alone and nothing is computed, so that both may be arrays or
    `jax.ShapeDtypeStruct`s. It is any JAX function of a parameter tree, such as
    `lambda params, x: model.apply({"params": params, **state}, x, train=False)`; no library of layers is asked. What
    ties axes: sums and products entry by entry, products of matrices, convolutions, and the lookup of embeddings.
    Channels do not go through reshapes that split or merge them, concatenation, slices, padding, sums and sorting along
    them, groups of a convolution, loops (`nn.scan`), nor any operation that is not known. Not seen is where channels
    have an order of their own by a constant, as with fixed sines of positions. Our choice; Git Re-Basin
    (arXiv:2209.04836) writes down by hand for each model what is found here.

    Args:
      fn: the model.
      params: its parameters.
      *inputs: what it reads.
      strict: refuse channels that go where they cannot be followed. Without it their axes come apart there: those of
        the leaves before it, and those of the leaves that read what comes out, are of two spaces.

    Raises:
      ValueError: leaves that cannot be named, as `flatten`; `strict` and channels that a leaf makes, or a leaf itself,
        in an operation that cannot be followed.
    """
    trace = _Trace(fn, params, inputs)
    found = trace.structure(params, inputs)
    if strict:
        trace.check()
    return found


def input_moments(fn: Callable[..., Any], params: Params, *inputs: Any) -> dict[str, jax.Array]:
    """Returns the second moments of what is summed over in a model: by leaf, and by space where no leaf is summed over.

    `{leaf path: X^T X / N}`, with `X [N, n]` the inputs of the layer whose kernel is the leaf: one row for each
    example and place, summed over all calls of the layer. It is `[n, n]`; `[h, d, h, d]` of a leaf that is summed over
    along two axes together, as the last kernel of an attention is. A leaf that is summed over along other axes in
    other places, such as the one kernel of a tied autoencoder, has none: the moments are those of the spaces.

    `{space: (Q^T Q / N) * (K^T K / M)}`, entry by entry, for values `Q [N, d]` and `K [M, d]` that are multiplied and
    are no leaves, such as queries and keys: the moments of the products `q_i k_i` that are summed, for queries and keys
    that are drawn apart. It is `[d, d]`, and `[h, d, d]` of a space that is within another. Products that are summed
    over several axes together have none.

    Float32. `fn` is as in `wiring` without `strict`, computed once on `inputs`. It may be jitted. Moments are not
    centred. They are what channel pruning reconstructs from (He et al., arXiv:1707.06168); to take them at all layers
    in one pass, and those of products, is our choice.

    Raises:
      ValueError: leaves that cannot be named, as `flatten`.
    """
    trace = _Trace(fn, params, inputs)
    of_model = trace.structure(params, inputs)
    found: dict[str, list[tuple[tuple[int, ...], jax.Array]]] = {}

    def take(one: _Sum) -> None:
        if one.path is not None:
            moments = _moments(one.entering[0].value, one.places[0])
            found.setdefault(one.path, []).append((one.axes, moments))
            return
        space = trace.space(one.entering[0].nodes[one.places[0][0]])
        if len(one.places[0]) > 1 or space not in of_model.hidden:
            return
        around, factors = of_model.within.get(space), []
        for value, places in zip(one.entering, one.places, strict=True):
            outer = [axis for axis, node in enumerate(value.nodes) if around and trace.space(node) == around]
            factors.append(_moments(value.value, places, tuple(outer)))
        found.setdefault(space, []).append(((), factors[0] * factors[1]))

    trace.run(params, inputs, take)
    sums: dict[str, list[jax.Array]] = {}
    for name, of_name in found.items():
        alike = len({axes for axes, _ in of_name}) == 1
        for axes, moments in of_name:
            if alike:
                sums.setdefault(name, []).append(moments)
            elif len(axes) == 1:
                sums.setdefault(of_model.spaces[name][axes[0]], []).append(moments)
    return {name: sum(of_name[1:], of_name[0]) for name, of_name in sums.items()}


def _moments(value: jax.Array, axes: tuple[int, ...], around: tuple[int, ...] = ()) -> jax.Array:
    """Returns the second moments `[*around, *axes, *axes]` of a value's entries along axes, for each place around."""
    sizes = [[value.shape[axis] for axis in group] for group in (around, axes)]
    rest = [axis for axis in range(value.ndim) if axis not in (*around, *axes)]
    rows = value.transpose(*rest, *around, *axes).astype(jnp.float32)
    rows = rows.reshape(-1, *map(math.prod, sizes))
    # The highest precision: alignment solves for what is left of them.
    moments = jnp.einsum("nam,nak->amk", rows, rows, precision=lax.Precision.HIGHEST)
    return moments.reshape(*sizes[0], *sizes[1], *sizes[1]) / rows.shape[0]


class _Trace:
    """A traced function whose axes are followed; nodes that are tied have one root."""

    def __init__(self, fn: Callable[..., Any], params: Params, inputs: Sequence[Any]):
        self._jaxpr = jax.make_jaxpr(fn)(params, *inputs)
        self._parents: list[int] = []
        self._read: set[int] = set()
        self._made: set[int] = set()
        self._touched: set[int] = set()  # Of leaves that are used where they cannot be followed.
        self._inputs: set[int] = set()
        self._bound: set[int] = set()  # Of leaves that are looked up, or sum over what comes from outside.
        self._summed: dict[str, set[int]] = {}
        # Of each sum over a node: the nodes that are summed over or matched along with it.
        self._beside: list[tuple[int, tuple[int, ...]]] = []
        self._carried: list[tuple[int, ...]] = []
        self._lost: list[tuple[str, int]] = []
        self._parts: dict[int, tuple[int, ...]] = {}  # Of an axis that is made of lost ones of a leaf: those.
        self._leaves = {path: self._fresh(len(np.shape(leaf))) for path, leaf in flatten(params).items()}
        self._place_of = {node: (path, axis) for path, nodes in self._leaves.items() for axis, node in enumerate(nodes)}
        self._names: dict[int, str] = {}

    def structure(self, params: Params, inputs: Sequence[Any]) -> Wiring:
        """Follows the function for shapes alone, and returns what it ties."""
        jax.eval_shape(lambda params, *inputs: self.run(params, inputs, lambda _: None), params, *inputs)
        spaces = {}
        for path, nodes in self._leaves.items():
            roots = [self._root(node) for node in nodes]
            spaces[path] = tuple(self._names.setdefault(root, f"{path}:{axis}") for axis, root in enumerate(roots))
        inputs_of, both = {}, {}
        for path, nodes in self._leaves.items():
            summed = sorted(self._summed.get(path, ()))
            inputs_of[path] = tuple(axis for axis in summed if nodes[axis] not in self._made)
            both[path] = tuple(axis for axis in summed if nodes[axis] in self._made)
        read, made, bound = (self._spaces_of(nodes) for nodes in (self._read, self._made, self._bound))
        hidden = frozenset((read & made) - bound)
        return Wiring(spaces, inputs_of, both, frozenset(read), hidden, self._within(hidden))

    def run(self, params: Params, inputs: Sequence[Any], on_sum: _OnSum) -> list[Any]:
        """Evaluates the function, and hands over each sum over axes that are of a leaf, or of two values."""
        leaves = [_Value(leaf, self._leaves[path], True) for path, leaf in flatten(params).items()]
        rest = [_Value(leaf, self._fresh(jnp.ndim(leaf))) for leaf in jax.tree.leaves(tuple(inputs))]
        self._inputs.update(node for one in rest for node in one.nodes)
        outputs = self._evaluate(self._jaxpr.jaxpr, self._jaxpr.consts, [*leaves, *rest], on_sum)
        return [output.value for output in outputs]

    def space(self, node: int) -> str:
        """Returns the name of a node's space once the structure is known; empty where no leaf has it."""
        return self._names.get(self._root(node), "")

    def check(self) -> None:
        """Raises ValueError where channels that leaves make, or leaves themselves, were lost."""
        places: dict[int, tuple[str, int]] = {}
        for node in sorted(self._made | self._touched):
            places.setdefault(self._root(node), self._place_of[node])
        for operation, node in self._lost:
            if (place := places.get(self._root(node))) is not None:
                raise ValueError(
                    f"the operation {operation!r} cannot be followed: channels of {place[0]!r}, along its axis "
                    f"{place[1]}, go into it, and which leaves read them afterwards is not known. Give a function "
                    "without it, or strict=False, by which the axes before and behind it come apart: aligned_transfer "
                    "then takes them as they are where sizes are equal, and refuses them elsewhere"
                )

    def _root(self, node: int) -> int:
        while self._parents[node] != node:
            self._parents[node] = node = self._parents[self._parents[node]]
        return node

    def _spaces_of(self, nodes: Iterable[int]) -> set[str]:
        return {self.space(node) for node in nodes} - {""}

    def _within(self, hidden: frozenset[str]) -> dict[str, str]:
        """Returns the space that is around each one: every value with a channel of one has one of the other."""
        around: dict[str, set[str]] = {}
        for nodes in self._carried:
            spaces = Counter(map(self.space, nodes))
            beside = {space for space, count in spaces.items() if count == 1 and space in hidden}
            for space in spaces.keys() & hidden:
                around[space] = around.get(space, beside) & (beside - {space})
        for node, others in self._beside:
            space = self.space(node)
            if space in around:
                around[space] &= self._spaces_of(others)
        # Where several are around, as with heads of groups, none is: their channels are taken alike. Of two that are
        # only met together, the first is around the other.
        single = {space: min(others) for space, others in around.items() if len(others) == 1}
        return {space: other for space, other in single.items() if single.get(other) != space or other < space}

    def _fresh(self, count: int) -> tuple[int, ...]:
        first = len(self._parents)
        self._parents += range(first, first + count)
        return tuple(range(first, first + count))

    def _tie(self, node: int, other: int) -> None:
        # The older one stands for both, so that spaces are named in the order of the leaves.
        older, newer = sorted((self._root(node), self._root(other)))
        self._parents[newer] = older

    def _tied(self, node: int, of_leaves: bool = False) -> int:
        """Returns a new node that is tied to one, an axis of another value of the same space; of leaves the same."""
        if of_leaves:
            return node
        (fresh,) = self._fresh(1)
        self._tie(node, fresh)
        return fresh

    def _make(self, node: int) -> None:
        """Notes that channels are made along an axis, where it is of a leaf."""
        if node in self._place_of:
            self._made.add(node)
        self._touch(self._parts.get(node, ()))

    def _touch(self, nodes: Iterable[int]) -> None:
        self._touched.update(node for node in nodes if node in self._place_of)

    def _cut(self, nodes: Iterable[int], lost: Iterable[int]) -> None:
        """Notes that axes of something made of leaves are what became of axes that were lost."""
        parts = tuple(part for node in lost for part in (node, *self._parts.get(node, ())))
        if parts:
            self._parts |= dict.fromkeys(nodes, parts)

    def _lose(self, operation: str, nodes: Iterable[int]) -> None:
        self._lost += [(operation, node) for node in nodes]

    def _evaluate(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Value], on_sum: _OnSum) -> list[_Value]:
        known: dict[Any, _Value] = {}

        def read(var: Any) -> _Value:
            if isinstance(var, core.Literal):
                return _Value(var.val, self._fresh(np.ndim(var.val)), True)
            return known[var]

        constants = [_Value(const, self._fresh(np.ndim(const)), True) for const in consts]
        known |= dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))
        self._carried += [one.nodes for one in known.values()]
        of_platform: set[Any] = set()
        for eqn in jaxpr.eqns:
            values = [read(var) for var in eqn.invars]
            name = eqn.primitive.name
            if name == "platform_index" or (of_platform.intersection(_vars(eqn)) and name != "cond"):
                # Only asked by a cond, all of whose branches compute the same; the last is for any platform.
                of_platform |= set(eqn.outvars)
                outputs = [_Value(None, ())] * len(eqn.outvars)
            elif name in _CALLS:
                outputs = self._call(_inner(eqn.params), values, on_sum)
            elif name == "cond" and eqn.invars[0] in of_platform:
                outputs = self._call(eqn.params["branches"][-1], values[1:], on_sum)
            else:
                params = eqn.primitive.get_bind_params(eqn.params)
                bound = eqn.primitive.bind(*(one.value for one in values), **params)
                results = bound if eqn.primitive.multiple_results else [bound]
                outputs = self._follow(eqn, values, results, on_sum)
            known |= dict(zip(eqn.outvars, outputs, strict=True))
            self._carried += [one.nodes for one in outputs]
        return [read(var) for var in jaxpr.outvars]

    def _call(self, closed: Any, values: Sequence[_Value], on_sum: _OnSum) -> list[_Value]:
        jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())
        return self._evaluate(jaxpr, consts, values, on_sum)

    def _follow(self, eqn: Any, values: Sequence[_Value], results: Sequence[Any], on_sum: _OnSum) -> list[_Value]:
        """Returns the results with the nodes of their axes."""
        if eqn.primitive.name == "optimization_barrier":
            return [one._replace(value=result) for one, result in zip(values, results, strict=True)]
        of_leaves = all(one.of_leaves for one in values)
        nodes = (
            self._nodes(eqn, values, [jnp.shape(result) for result in results], on_sum) if values and results else None
        )
        if nodes is None:
            nodes = [self._fresh(jnp.ndim(result)) for result in results]
            if results:  # A leaf that goes in whole might make channels there.
                for one in values:
                    self._lose(eqn.primitive.name, one.nodes)
                    self._touch(one.nodes)
        return [_Value(result, of_one, of_leaves) for result, of_one in zip(results, nodes, strict=True)]

    def _nodes(
        self, eqn: Any, values: Sequence[_Value], new_shapes: Sequence[tuple[int, ...]], on_sum: _OnSum
    ) -> list[tuple[int, ...]] | None:
        """Returns the nodes of each result's axes; None for an operation that cannot be followed."""
        name, params = eqn.primitive.name, eqn.params
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

    def _by_entry(self, values: Sequence[_Value], shape: Sequence[int], skip: int | None = None) -> tuple[int, ...]:
        arrays = [one for one in values if one.nodes]
        # What has one entry is a scalar, such as the spectral norm by which a kernel is divided.
        arrays = [one for one in arrays if jnp.size(one.value) > 1] or arrays
        if len(arrays) == 1 and jnp.shape(arrays[0].value) == shape:
            return arrays[0].nodes  # A leaf that is cast or scaled is a leaf still.
        nodes, of_leaves = list(self._fresh(len(shape))), all(one.of_leaves for one in values)
        for axis, node in enumerate(nodes):
            for one in arrays:
                if axis != skip and jnp.shape(one.value)[axis] == shape[axis]:
                    self._tie(node, one.nodes[axis])
                    if of_leaves and one.nodes[axis] in self._place_of:
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

    def _reshaped(self, value: _Value, shape: Sequence[int], new_shape: Sequence[int]) -> tuple[int, ...]:
        """Axes that are neither split nor merged keep their nodes; axes of size 1 come and go."""
        new_nodes, kept = list(self._fresh(len(new_shape))), set()
        added = len(new_shape) - len(shape)
        if tuple(new_shape) == (*(1,) * added, *shape):  # An axis of size 1, a single head, is told by its place alone.
            return (*new_nodes[:added], *value.nodes)
        ends = {end: (axis, size) for axis, (end, size) in enumerate(_ends(shape)) if size > 1}
        for axis, (end, size) in enumerate(_ends(new_shape)):
            if size > 1 and end in ends and ends[end][1] == size:
                kept.add(ends[end][0])
                new_nodes[axis] = value.nodes[ends[end][0]]
        lost = tuple(value.nodes[axis] for axis, size in enumerate(shape) if size > 1 and axis not in kept)
        self._lose("reshape", lost)
        if value.of_leaves:
            self._cut(set(new_nodes).difference(value.nodes), lost)
        return tuple(new_nodes)

    def _joined(self, values: Sequence[_Value], axis: int, shape: Sequence[int]) -> tuple[int, ...]:
        nodes = self._by_entry(values, shape, skip=axis)
        if len(values) > 1:
            lost = tuple(one.nodes[axis] for one in values)
            self._lose("concatenate", lost)
            if all(one.of_leaves for one in values):
                self._cut((nodes[axis],), lost)
        return nodes

    def _without(self, operation: str, value: _Value, axes: Iterable[int]) -> tuple[int, ...]:
        """Returns the nodes of a value, new ones for those axes, whose entries are no longer what they were."""
        axes, fresh = set(axes), self._fresh(len(value.nodes))
        lost = [axis for axis in axes if jnp.shape(value.value)[axis] > 1]
        self._lose(operation, (value.nodes[axis] for axis in lost))
        if value.of_leaves:
            for axis in lost:
                self._cut((fresh[axis],), (value.nodes[axis],))
        return tuple(fresh[axis] if axis in axes else node for axis, node in enumerate(value.nodes))

    def _gathered(self, params: Any, value: _Value, shape: Sequence[int], new_shape: Sequence[int]) -> tuple[int, ...]:
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
        if not value.of_leaves:  # Tokens that are looked up are bound to what is outside; see `Wiring.hidden`.
            self._lose("gather", cut)
        return tuple(gathered)

    def _scattered(
        self, operation: str, params: Any, values: Sequence[_Value], shapes: Sequence[Sequence[int]]
    ) -> tuple[int, ...]:
        numbers = params["dimension_numbers"]
        gone = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
        kept = [axis for axis in range(len(shapes[0])) if axis not in gone]
        return self._written(operation, (values[0], values[2]), kept, numbers.update_window_dims)

    def _written(
        self, operation: str, values: Sequence[_Value], axes: Sequence[int], places: Sequence[int]
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

    def _product(self, numbers: Any, values: Sequence[_Value], on_sum: _OnSum) -> tuple[int, ...]:
        ((left, right), (left_batch, right_batch)), (a, b) = numbers, values
        for axis, other in zip(left_batch, right_batch, strict=True):
            self._tie(a.nodes[axis], b.nodes[other])
        self._sum_over(a, left, b, right, [a.nodes[axis] for axis in left_batch], on_sum)
        free = [node for axis, node in enumerate(a.nodes) if axis not in (*left, *left_batch)]
        other_free = [node for axis, node in enumerate(b.nodes) if axis not in (*right, *right_batch)]
        of_leaves = a.of_leaves and b.of_leaves
        if not of_leaves:
            for node in (*free, *other_free):
                self._make(node)
        return tuple(
            self._tied(node, of_leaves) for node in (*(a.nodes[axis] for axis in left_batch), *free, *other_free)
        )

    def _convolution(self, params: Any, values: Sequence[_Value], on_sum: _OnSum) -> tuple[int, ...]:
        numbers, (x, kernel) = params["dimension_numbers"], values
        in_axis, (out_axis, kernel_in) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
        nodes = list(self._fresh(len(x.nodes)))
        nodes[numbers.out_spec[0]] = self._tied(x.nodes[numbers.lhs_spec[0]])
        groups, channels = params["feature_group_count"], jnp.shape(kernel.value)[out_axis]
        depthwise = groups == channels == jnp.shape(x.value)[in_axis]
        if groups == 1:
            self._sum_over(x, (in_axis,), kernel, (kernel_in,), (), on_sum)
            self._make(kernel.nodes[out_axis])
        if groups == 1 or depthwise:
            nodes[numbers.out_spec[1]] = self._tied(kernel.nodes[out_axis])
        if groups > 1 and depthwise:  # Each channel by itself.
            self._tie(x.nodes[in_axis], kernel.nodes[out_axis])
        if groups > 1 and not depthwise:
            self._make(kernel.nodes[out_axis])
            self._lose("conv_general_dilated in groups", (x.nodes[in_axis], kernel.nodes[out_axis]))
        return tuple(nodes)

    def _sum_over(
        self, a: _Value, left: Sequence[int], b: _Value, right: Sequence[int], matched: Sequence[int], on_sum: _OnSum
    ) -> None:
        """Ties the axes of two values that are summed over together; `matched` are those that stay, one by one."""
        nodes = [[one.nodes[axis] for axis in axes] for one, axes in ((a, left), (b, right))]
        places = [[self._place_of.get(node) for node in of_one] for of_one in nodes]
        for node, other in zip(*nodes, strict=True):
            # The oldest stands for all: an input does where nothing has tied its axis to a leaf before.
            if {self._root(node), self._root(other)} & self._inputs:
                self._bound.update({node, other} & self._place_of.keys())
            self._tie(node, other)
            self._touch((*self._parts.get(node, ()), *self._parts.get(other, ())))
        self._read.update(nodes[0])
        beside = [tuple(nodes[0][:i] + nodes[0][i + 1 :]) for i in range(len(left))]
        if a.of_leaves and b.of_leaves:  # The product of two leaves is a kernel of which each has made a part.
            for node in (*nodes[0], *nodes[1]):
                self._make(node)
        elif any(places[0]) or any(places[1]):
            for of_leaf, entering, axes in ((places[1], a, left), (places[0], b, right)):
                for path in dict.fromkeys(place[0] for place in of_leaf if place):
                    at = sorted(
                        (place[1], axis)
                        for place, axis in zip(of_leaf, axes, strict=True)
                        if place and place[0] == path
                    )
                    summed, entered = zip(*at, strict=True)
                    self._summed.setdefault(path, set()).update(summed)
                    on_sum(_Sum(path, summed, (entering,), (entered,)))
        elif left:
            beside = [(*others, *matched) for others in beside]
            on_sum(_Sum(None, (), (a, b), (tuple(left), tuple(right))))
        self._beside += zip(nodes[0], beside, strict=True)


def _ends(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Returns for each axis how many entries there are up to its end, along with its size."""
    return list(zip(np.cumprod(np.asarray(shape, np.int64)).tolist(), shape, strict=True))


def _broadcasts(shape: Sequence[int], result: Sequence[int]) -> bool:
    return not shape or (len(shape) == len(result) and all(a in (1, b) for a, b in zip(shape, result, strict=True)))


def _inner(params: Mapping[str, Any]) -> Any:
    return next(params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params)


def _vars(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, core.Literal)]
