"""A function as one list of JAX operations: calls are inlined, and any value can be computed from others."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from merge_jax.checks import check_arrays
from merge_jax.paths import flatten
from merge_jax.transfers.channels.merged_axes import Factors, apart
from merge_jax.types import Params

__all__ = ["BY_ENTRY", "CALLS", "Constant", "Equation", "Program"]

CALLS = frozenset(
    {
        *("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
        *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    }
)
"""Names of the primitives that call another function and are inlined."""
BY_ENTRY = frozenset(
    {
        *("add", "add_any", "sub", "mul", "div", "rem", "max", "min", "pow", "integer_pow", "atan2", "nextafter"),
        *("neg", "sign", "abs", "floor", "ceil", "round", "square", "one_minus_square", "sqrt", "rsqrt", "cbrt"),
        *("exp", "exp2", "log", "expm1", "log1p", "tanh", "logistic", "erf", "erfc", "erf_inv", "lgamma", "digamma"),
        *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "is_finite"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "select_n", "clamp"),
        *("shift_left", "shift_right_logical", "shift_right_arithmetic", "population_count", "stop_gradient"),
        *("convert_element_type", "reduce_precision", "copy", "copy_p", "name", "sharding_constraint", "pvary"),
    }
)
"""Names of the elementwise primitives."""


class Constant(NamedTuple):
    """An operand that is a number or a constant array of the program."""

    value: Any


class Equation(NamedTuple):
    """One operation: its primitive and parameters, its operands, and the numbers of its results."""

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[int | Constant, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.primitive.name

    @property
    def reads(self) -> tuple[int, ...]:
        """The numbers of the values among its operands."""
        return tuple(one for one in self.inputs if not isinstance(one, Constant))

    def run(self, values: Sequence[Any]) -> list[Any]:
        """Returns its results, given the values of its operands."""
        made = self.primitive.bind(*values, **self.primitive.get_bind_params(dict(self.params)))
        return list(made) if self.primitive.multiple_results else [made]


class Program:
    """A traced function of a tree and of inputs; its values are numbered, those of the leaves first.

    If the function selects by platform, only the branch for any platform is used.

    Attributes:
      leaves: `{leaf path: number}`.
      inputs: numbers of the leaves of the inputs.
      outputs: its results.
      equations: in order.
      shapes: `{number: shape and dtype}` of all values.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Params,
        inputs: Sequence[Any],
        factors: Mapping[str, Factors] | None = None,
    ):
        """Takes a function of a tree and inputs; leaves with merged axes are given in shapes with split axes.

        `params` is the tree as the function reads it.
        """
        check_arrays("model's", params)
        given, tree = jax.tree.flatten(params)
        shapes = [jnp.shape(leaf) for leaf in given]

        def run(leaves: Sequence[Any], *inputs: Any) -> Any:
            whole = [leaf.reshape(shape) for leaf, shape in zip(leaves, shapes, strict=True)]
            return fn(jax.tree.unflatten(tree, whole), *inputs)

        leaves = apart(flatten(params), factors or {})
        closed = jax.make_jaxpr(run)(list(leaves.values()), *inputs) if factors else jax.make_jaxpr(fn)(params, *inputs)
        self.shapes: dict[int, Any] = {}
        self.equations: list[Equation] = []
        numbers = [self._number(var.aval) for var in closed.jaxpr.invars]
        paths = list(flatten(params))
        self.leaves = dict(zip(paths, numbers, strict=False))
        self.inputs = tuple(numbers[len(paths) :])
        self.outputs = tuple(self._inline(closed, numbers))

    def evaluate(self, known: Mapping[int, Any], wanted: Iterable[int]) -> dict[int, Any]:
        """Returns the known values, the wanted ones, and all intermediate values."""
        values = dict(known)
        equations, needed = self.needed(values.keys(), wanted)
        if needed:
            raise AssertionError(f"values {sorted(needed)} are neither known nor computed")
        for equation in equations:
            operands = [one.value if isinstance(one, Constant) else values[one] for one in equation.inputs]
            values |= dict(zip(equation.outputs, equation.run(operands), strict=True))
        return values

    def leaves_for(self, known: Collection[int], wanted: Iterable[int]) -> set[int]:
        """Returns the numbers of the leaves that values depend on, given the known values."""
        return self.needed(known, wanted)[1].intersection(self.leaves.values())

    def needed(self, known: Collection[int], wanted: Iterable[int]) -> tuple[list[Equation], set[int]]:
        """Returns the equations that compute values from the known ones, and the other values that these read."""
        needed, equations = set(wanted) - set(known), []
        for equation in reversed(self.equations):
            if needed.intersection(equation.outputs):
                equations.append(equation)
                needed.difference_update(equation.outputs)
                needed.update(set(equation.reads) - set(known))
        return equations[::-1], needed

    def ancestors(self, values: Iterable[int]) -> set[int]:
        """Returns the values and all values that they depend on."""
        needed = set(values)
        for equation in reversed(self.equations):
            if needed.intersection(equation.outputs):
                needed.update(equation.reads)
        return needed

    def size(self, value: int) -> int:
        """Returns the number of entries of a value."""
        return math.prod(self.shapes[value].shape)

    @cached_property
    def makers(self) -> dict[int, int]:
        """`{value: index of the equation that computes it}`."""
        return {value: place for place, equation in enumerate(self.equations) for value in equation.outputs}

    @cached_property
    def users(self) -> dict[int, list[int]]:
        """`{value: indices of the equations that read it, once per use}`; -1 stands for the outputs."""
        found: dict[int, list[int]] = {value: [] for value in self.shapes}
        for place, equation in enumerate(self.equations):
            for value in equation.reads:
                found[value].append(place)
        for one in self.outputs:
            if not isinstance(one, Constant):
                found[one].append(-1)
        return found

    @cached_property
    def last_read(self) -> dict[int, list[int]]:
        """`{index of an equation: values that nothing reads after it}`, except the outputs."""
        found: dict[int, list[int]] = {}
        for value, places in self.users.items():
            if -1 not in places:
                found.setdefault(max(places, default=self.makers.get(value, -1)), []).append(value)
        return found

    @cached_property
    def leaves_of(self) -> dict[int, frozenset[str]]:
        """`{value: the leaves that it depends on}`."""
        found = {number: frozenset({path}) for path, number in self.leaves.items()}
        found |= {number: frozenset() for number in self.inputs}
        for equation in self.equations:
            union = frozenset().union(*(found[value] for value in equation.reads))
            found |= dict.fromkeys(equation.outputs, union)
        return found

    @cached_property
    def data(self) -> frozenset[int]:
        """The values that depend on the inputs."""
        found = set(self.inputs)
        for equation in self.equations:
            if found.intersection(equation.reads):
                found.update(equation.outputs)
        return frozenset(found)

    def varying_axes(self, one: int | Constant) -> frozenset[int]:
        """Returns the axes along which a value that does not depend on the inputs may differ."""
        return _long_axes(np.shape(one.value)) if isinstance(one, Constant) else self._varying[one]

    @cached_property
    def _varying(self) -> dict[int, frozenset[int]]:
        found = {number: _long_axes(self.shapes[number].shape) for number in self.leaves.values()}
        for equation in self.equations:
            if self.data.isdisjoint(equation.outputs):
                inner = [
                    _long_axes(np.shape(one.value)) if isinstance(one, Constant) else found[one]
                    for one in equation.inputs
                ]
                for value in equation.outputs:
                    found[value] = self._varying_of(equation, inner, self.shapes[value].shape)
        return found

    def _varying_of(
        self, equation: Equation, inner: Sequence[frozenset[int]], shape: tuple[int, ...]
    ) -> frozenset[int]:
        """Returns the axes along which a result of an equation may differ, from those of its operands."""
        every = _long_axes(shape)
        if not inner:  # As of `iota`.
            return every
        shapes = [
            np.shape(one.value) if isinstance(one, Constant) else self.shapes[one].shape for one in equation.inputs
        ]
        if equation.name == "broadcast_in_dim":
            places = equation.params["broadcast_dimensions"]
            return frozenset(places[axis] for axis in inner[0])
        if equation.name in ("reshape", "squeeze", "expand_dims"):
            old, new = sorted(_long_axes(shapes[0])), sorted(every)
            if [shapes[0][axis] for axis in old] == [shape[axis] for axis in new]:
                return frozenset(axis for before, axis in zip(old, new, strict=True) if before in inner[0])
            return every if inner[0] else frozenset()
        by_entry = equation.name in BY_ENTRY and all(other in ((), shape) for other in shapes)
        return frozenset().union(*inner) if by_entry else every

    def _number(self, aval: Any) -> int:
        number = len(self.shapes)
        self.shapes[number] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return number

    def _inline(self, closed: Any, operands: Sequence[int | Constant]) -> list[int | Constant]:
        """Adds the equations of a function called with these operands, and returns its results."""
        jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())
        known: dict[Any, int | Constant] = dict(zip(jaxpr.constvars, map(Constant, consts), strict=True))
        known |= dict(zip(jaxpr.invars, operands, strict=True))
        platform_values: set[Any] = set()

        def read(var: Any) -> int | Constant:
            return Constant(var.val) if isinstance(var, core.Literal) else known[var]

        for eqn in jaxpr.eqns:
            name, asks = eqn.primitive.name, platform_values.intersection(_vars(eqn))
            if name == "platform_index" or (asks and name != "cond"):
                # Only a cond uses this, and all its branches compute the same; the last is for any platform.
                platform_values |= set(eqn.outvars)
                continue
            if name in CALLS:
                outputs = self._inline(_inner(eqn.params), [read(var) for var in eqn.invars])
            elif name == "cond" and asks and eqn.invars[0] in platform_values:
                outputs = self._inline(eqn.params["branches"][-1], [read(var) for var in eqn.invars[1:]])
            else:
                outputs = [self._number(var.aval) for var in eqn.outvars]
                inputs = tuple(read(var) for var in eqn.invars)
                self.equations.append(Equation(eqn.primitive, eqn.params, inputs, tuple(outputs)))
            known |= dict(zip(eqn.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]


def _long_axes(shape: Sequence[int]) -> frozenset[int]:
    """Returns the axes with several entries."""
    return frozenset(axis for axis, size in enumerate(shape) if size > 1)


def _inner(params: Mapping[str, Any]) -> Any:
    return next(params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params)


def _vars(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, core.Literal)]
