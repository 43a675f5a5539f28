"""What a function costs, counted on its trace: no model of it to maintain, and nothing is computed."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

__all__ = ["count_flops"]


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Returns the floating point operations of a function's matrix products, loops counted as often as they run.

    A product `[m, k] @ [k, n]` costs `2 m k n`; all else is left out, as it is by the usual models of cost. The
    longest branch counts, and the body of a loop without a fixed number of steps counts once.

    Args:
      function: any JAX function.
      *args: its arguments, or their `jax.ShapeDtypeStruct`s.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(_count(sub) for sub in _inner_jaxprs(params))
            total += inner * (params["length"] if name == "scan" else 1)
    return total


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(shape[axis] for axis in contracted) * math.prod(equation.outvars[0].aval.shape)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        inner = getattr(value, "jaxpr", value)  # A closed jaxpr holds one.
        if hasattr(inner, "eqns"):
            yield inner
