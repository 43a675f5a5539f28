"""Wiring: which axes of a model's leaves are one space of channels, found by following its computation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from merge_jax.paths import flatten, near_misses
from merge_jax.types import Params

__all__ = ["Wiring", "input_moments", "wiring"]

_CALLS = {
    *("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
_REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
    *("argmax", "argmin"),
}
_BY_ENTRY = {
    *("add", "add_any", "sub", "mul", "div", "rem", "max", "min", "pow", "integer_pow", "atan2", "nextafter"),
    *("neg", "sign", "abs", "floor", "ceil", "round", "square", "sqrt", "rsqrt", "cbrt", "is_finite"),
    *("exp", "exp2", "log", "expm1", "log1p", "tanh", "logistic", "erf", "erfc", "erf_inv"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "select_n", "clamp"),
    *("convert_element_type", "reduce_precision", "copy", "copy_p", "name", "sharding_constraint", "pvary"),
}
_WINDOWS = {"reduce_window", "reduce_window_max", "reduce_window_sum"}


@dataclass(frozen=True)
class Wiring:
    """How the axes of a model's leaves hang together.

    Attributes:
      spaces: `{leaf path: name of the space of each of its axes}`. Axes of one space are tied: to permute the channels
        of the space is to permute all of them alike. A space is named after the first of its axes, such as
        `stage1_0/conv1/kernel:3`.
      inputs: `{leaf path: axes that are summed over with what enters the layer}`; the other axes make channels.
      read: spaces that are summed over anywhere, by a layer or, as in attention, with other channels.
    """

    spaces: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    read: frozenset[str]

    def of(self, path: str) -> tuple[str, ...]:
        """Returns the spaces of a leaf.

        Raises:
          ValueError: there is no such leaf.
        """
        if path not in self.spaces:
            raise ValueError(f"the wiring is of a model without a leaf {path!r}; {near_misses(path, self.spaces)}")
        return self.spaces[path]


class _Value(NamedTuple):
    """A value of the computation with the node of each of its axes, and whether it is made of leaves alone."""

    value: Any
    nodes: tuple[int, ...]
    of_leaves: bool = False


class _Site(NamedTuple):
    """A sum over one axis of a leaf and what enters there: its path, the axis, the input and the input's axis."""

    path: str
    axis: int
    entering: Any
    entering_axis: int


def wiring(fn: Callable[..., Any], params: Params, *inputs: Any) -> Wiring:
    """Returns the wiring of a model: which axes of its leaves are tied by residual sums, norms, biases and products.

    `fn(params, *inputs)` is traced for shapes alone and nothing is computed, so that both may be arrays or
    `jax.ShapeDtypeStruct`s. It is any JAX function of a parameter tree, such as
    `lambda params, x: model.apply({"params": params, **state}, x, train=False)`; no library of layers is asked. What
    ties axes: sums and products entry by entry, products of matrices, convolutions, and the lookup of embeddings.
    Nothing is tied across reshapes that split or merge channels, concatenation and padding along them, groups of a
    convolution, and inside of loops (`nn.scan`); and it is not seen where channels have an order of their own, as in
    rotary embeddings. Our choice; Git Re-Basin (arXiv:2209.04836) writes down by hand for each model what is found
    here.

    Raises:
      ValueError: leaves that cannot be named, as `flatten`.
    """
    trace = _Trace(fn, params, inputs)
    sites: list[_Site] = []
    jax.eval_shape(lambda params, *inputs: trace.run(params, inputs, sites.append), params, *inputs)
    names: dict[int, str] = {}
    spaces = {}
    for path, nodes in trace.leaves.items():
        roots = [trace.root(node) for node in nodes]
        spaces[path] = tuple(names.setdefault(root, f"{path}:{axis}") for axis, root in enumerate(roots))
    contracted: dict[str, set[int]] = {}
    for site in sites:
        contracted.setdefault(site.path, set()).add(site.axis)
    for path, axis in trace.looked_up:  # A table that is read as a kernel too makes channels first of all.
        contracted.get(path, set()).discard(axis)
    read = frozenset(names[root] for root in map(trace.root, trace.read) if root in names)
    return Wiring(spaces, {path: tuple(sorted(contracted.get(path, ()))) for path in spaces}, read)


def input_moments(fn: Callable[..., Any], params: Params, *inputs: Any) -> dict[str, jax.Array]:
    """Returns the second moments of what enters each layer of a model: `{leaf path: X^T X / N, [n, n]}`.

    `X [N, n]` are the inputs of the layer whose kernel is the leaf: one row for each example and place, summed over
    all calls of the layer. Leaves that are summed over along one axis have an entry; float32. `fn` is as in `wiring`,
    computed once on `inputs`. It may be jitted. Moments are not centred. They are what channel pruning reconstructs
    from (He et al., arXiv:1707.06168); to take them at all layers in one pass is our choice.

    Raises:
      ValueError: as `wiring`.
    """
    trace = _Trace(fn, params, inputs)
    found: dict[str, list[tuple[int, jax.Array]]] = {}

    def take(site: _Site) -> None:
        rows = jnp.moveaxis(site.entering, site.entering_axis, -1)
        rows = rows.reshape(-1, rows.shape[-1]).astype(jnp.float32)
        found.setdefault(site.path, []).append((site.axis, rows.T @ rows / rows.shape[0]))

    trace.run(params, inputs, take)
    return {
        path: sum((moment for _, moment in moments[1:]), moments[0][1])
        for path, moments in found.items()
        if len({axis for axis, _ in moments}) == 1
    }


class _Trace:
    """A traced function whose axes are followed; nodes that are tied have one root."""

    def __init__(self, fn: Callable[..., Any], params: Params, inputs: Sequence[Any]):
        self._jaxpr = jax.make_jaxpr(fn)(params, *inputs)
        self._parents: list[int] = []
        self.read: set[int] = set()
        self.looked_up: set[tuple[str, int]] = set()
        self.leaves = {path: self._fresh(len(np.shape(leaf))) for path, leaf in flatten(params).items()}
        self._place_of = {node: (path, axis) for path, nodes in self.leaves.items() for axis, node in enumerate(nodes)}

    def run(self, params: Params, inputs: Sequence[Any], on_site: Callable[[_Site], None]) -> list[Any]:
        """Evaluates the function, and hands over each sum over an axis of a leaf."""
        leaves = [_Value(leaf, self.leaves[path], True) for path, leaf in flatten(params).items()]
        rest = [_Value(leaf, self._fresh(jnp.ndim(leaf))) for leaf in jax.tree.leaves(tuple(inputs))]
        outputs = self._evaluate(self._jaxpr.jaxpr, self._jaxpr.consts, [*leaves, *rest], on_site)
        return [output.value for output in outputs]

    def root(self, node: int) -> int:
        """Returns the node that stands for all that are tied to this one."""
        while self._parents[node] != node:
            self._parents[node] = node = self._parents[self._parents[node]]
        return node

    def _fresh(self, count: int) -> tuple[int, ...]:
        first = len(self._parents)
        self._parents += range(first, first + count)
        return tuple(range(first, first + count))

    def _tie(self, node: int, other: int) -> None:
        # The older one stands for both, so that spaces are named in the order of the leaves.
        older, newer = sorted((self.root(node), self.root(other)))
        self._parents[newer] = older

    def _tied(self, node: int, of_leaves: bool = False) -> int:
        """Returns a new node that is tied to one, an axis of another value of the same space; of leaves the same."""
        if of_leaves:
            return node
        (fresh,) = self._fresh(1)
        self._tie(node, fresh)
        return fresh

    def _evaluate(
        self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Value], on_site: Callable[[_Site], None]
    ) -> list[_Value]:
        known: dict[Any, _Value] = {}

        def read(var: Any) -> _Value:
            if isinstance(var, core.Literal):
                return _Value(var.val, self._fresh(np.ndim(var.val)), True)
            return known[var]

        constants = [_Value(const, self._fresh(np.ndim(const)), True) for const in consts]
        known |= dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))
        of_platform: set[Any] = set()
        for eqn in jaxpr.eqns:
            values = [read(var) for var in eqn.invars]
            name = eqn.primitive.name
            if name == "platform_index" or (of_platform.intersection(_vars(eqn)) and name != "cond"):
                # Only asked by a cond, all of whose branches compute the same; the last is for any platform.
                of_platform |= set(eqn.outvars)
                outputs = [_Value(None, ())] * len(eqn.outvars)
            elif name in _CALLS:
                outputs = self._call(_inner(eqn.params), values, on_site)
            elif name == "cond" and eqn.invars[0] in of_platform:
                outputs = self._call(eqn.params["branches"][-1], values[1:], on_site)
            else:
                params = eqn.primitive.get_bind_params(eqn.params)
                bound = eqn.primitive.bind(*(one.value for one in values), **params)
                results = bound if eqn.primitive.multiple_results else [bound]
                outputs = self._follow(eqn, values, results, on_site)
            known |= dict(zip(eqn.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _call(self, closed: Any, values: Sequence[_Value], on_site: Callable[[_Site], None]) -> list[_Value]:
        jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())
        return self._evaluate(jaxpr, consts, values, on_site)

    def _follow(
        self, eqn: Any, values: Sequence[_Value], results: Sequence[Any], on_site: Callable[[_Site], None]
    ) -> list[_Value]:
        """Returns the results with the nodes of their axes."""
        name, params = eqn.primitive.name, eqn.params
        if name == "optimization_barrier":
            return [one._replace(value=result) for one, result in zip(values, results, strict=True)]
        of_leaves = all(one.of_leaves for one in values)
        fresh = [_Value(result, self._fresh(jnp.ndim(result)), of_leaves) for result in results]
        if not values or not results:
            return fresh
        shapes = [jnp.shape(one.value) for one in values]
        shape = jnp.shape(results[0])
        if name == "dot_general":
            nodes = self._product(params["dimension_numbers"], values, on_site)
        elif name == "conv_general_dilated":
            nodes = self._convolution(params, values, on_site)
        elif name == "transpose":
            nodes = tuple(values[0].nodes[axis] for axis in params["permutation"])
        elif name == "broadcast_in_dim":
            nodes = self._placed(values[0].nodes, shapes[0], params["broadcast_dimensions"], shape)
        elif name in ("reshape", "squeeze", "expand_dims"):
            nodes = self._reshaped(values[0].nodes, shapes[0], shape)
        elif name in _REDUCTIONS:
            nodes = tuple(node for axis, node in enumerate(values[0].nodes) if axis not in params["axes"])
        elif name == "gather":
            nodes = self._gathered(params, values[0].nodes, shapes[0], shape)
        elif name in ("slice", "dynamic_slice"):
            nodes = self._where_whole(values[0].nodes, [a == b for a, b in zip(shapes[0], shape, strict=True)])
        elif name == "pad":
            nodes = self._where_whole(values[0].nodes, [not any(sides) for sides in params["padding_config"]])
        elif name in _WINDOWS:
            nodes = self._where_whole(values[0].nodes, [size == 1 for size in params["window_dimensions"]])
        elif name == "concatenate":
            nodes = self._by_entry(values, shape, skip=params["dimension"])
        elif name in _BY_ENTRY and any(shapes) and all(_broadcasts(one, shape) for one in shapes):
            nodes = self._by_entry(values, shape)
        else:
            return fresh
        return [fresh[0]._replace(nodes=nodes), *fresh[1:]]

    def _by_entry(self, values: Sequence[_Value], shape: Sequence[int], skip: int | None = None) -> tuple[int, ...]:
        arrays = [one for one in values if one.nodes]
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

    def _reshaped(self, nodes: Sequence[int], shape: Sequence[int], new_shape: Sequence[int]) -> tuple[int, ...]:
        """Axes that are neither split nor merged keep their nodes; axes of size 1 come and go."""
        new_nodes = list(self._fresh(len(new_shape)))
        ends = {end: (axis, size) for axis, (end, size) in enumerate(_ends(shape)) if size > 1}
        for axis, (end, size) in enumerate(_ends(new_shape)):
            if size > 1 and end in ends and ends[end][1] == size:
                new_nodes[axis] = nodes[ends[end][0]]
        return tuple(new_nodes)

    def _where_whole(self, nodes: Sequence[int], whole: Sequence[bool]) -> tuple[int, ...]:
        fresh = self._fresh(len(nodes))
        return tuple(node if stays else other for node, stays, other in zip(nodes, whole, fresh, strict=True))

    def _gathered(
        self, params: Any, nodes: Sequence[int], shape: Sequence[int], new_shape: Sequence[int]
    ) -> tuple[int, ...]:
        numbers, gathered = params["dimension_numbers"], list(self._fresh(len(new_shape)))
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        kept = [axis for axis in range(len(shape)) if axis not in gone]
        for axis, place in zip(kept, numbers.offset_dims, strict=True):
            if params["slice_sizes"][axis] == shape[axis]:
                gathered[place] = self._tied(nodes[axis])
                if nodes[axis] in self._place_of:
                    self.looked_up.add(self._place_of[nodes[axis]])
        return tuple(gathered)

    def _product(self, numbers: Any, values: Sequence[_Value], on_site: Callable[[_Site], None]) -> tuple[int, ...]:
        ((left, right), (left_batch, right_batch)), (a, b) = numbers, values
        for axis, other in zip(left, right, strict=True):
            self._sum_over(a, axis, b, other, on_site)
        for axis, other in zip(left_batch, right_batch, strict=True):
            self._tie(a.nodes[axis], b.nodes[other])
        free = [node for axis, node in enumerate(a.nodes) if axis not in (*left, *left_batch)]
        other_free = [node for axis, node in enumerate(b.nodes) if axis not in (*right, *right_batch)]
        of_leaves = a.of_leaves and b.of_leaves
        return tuple(
            self._tied(node, of_leaves) for node in (*(a.nodes[axis] for axis in left_batch), *free, *other_free)
        )

    def _convolution(self, params: Any, values: Sequence[_Value], on_site: Callable[[_Site], None]) -> tuple[int, ...]:
        numbers, (x, kernel) = params["dimension_numbers"], values
        in_axis, (out_axis, kernel_in) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
        nodes = list(self._fresh(len(x.nodes)))
        nodes[numbers.out_spec[0]] = self._tied(x.nodes[numbers.lhs_spec[0]])
        groups, channels = params["feature_group_count"], jnp.shape(kernel.value)[out_axis]
        depthwise = groups == channels == jnp.shape(x.value)[in_axis]
        if groups == 1:
            self._sum_over(x, in_axis, kernel, kernel_in, on_site)
        if groups == 1 or depthwise:
            nodes[numbers.out_spec[1]] = self._tied(kernel.nodes[out_axis])
        if groups > 1 and depthwise:  # Each channel by itself.
            self._tie(x.nodes[in_axis], kernel.nodes[out_axis])
        return tuple(nodes)

    def _sum_over(self, a: _Value, axis: int, b: _Value, other: int, on_site: Callable[[_Site], None]) -> None:
        places = self._place_of.get(a.nodes[axis]), self._place_of.get(b.nodes[other])
        self._tie(a.nodes[axis], b.nodes[other])
        self.read.add(a.nodes[axis])
        if places[1] is not None and places[0] is None:
            on_site(_Site(*places[1], a.value, axis))
        elif places[0] is not None and places[1] is None:
            on_site(_Site(*places[0], b.value, other))


def _ends(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Returns for each axis how many entries there are up to its end, along with its size."""
    return list(zip(np.cumprod(np.asarray(shape, np.int64)).tolist(), shape, strict=True))


def _broadcasts(shape: Sequence[int], result: Sequence[int]) -> bool:
    return not shape or (len(shape) == len(result) and all(a in (1, b) for a, b in zip(shape, result, strict=True)))


def _inner(params: Mapping[str, Any]) -> Any:
    return next(params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params)


def _vars(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, core.Literal)]
