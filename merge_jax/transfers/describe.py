"""Summaries of a transfer: each route and its cost, counted on traces, and a table of them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from merge_jax.transfers.base import RouteSummary, Transfer
from merge_jax.transfers.pairing import LeftOut, ResolvedRoute
from merge_jax.transfers.views import AttentionView
from merge_jax.types import Params

__all__ = ["RouteCost", "Summary", "count_flops", "left_out_summaries", "route_summary", "summarize"]

# Files and pages scroll, so lines are not wrapped there; a terminal wraps them as necessary.
_UNFOLDED = 10_000


@dataclass(frozen=True, repr=False)
class Summary:
    """The routes of a transfer between two models; `str` returns the table.

    Attributes:
      routes: the pairs.
      left_out: leaves that match the routes' patterns but cannot be paired, with the reasons.
    """

    routes: tuple[RouteSummary, ...]
    left_out: tuple[RouteSummary, ...]

    def __str__(self) -> str:  # noqa: D105
        console = Console(width=_UNFOLDED, color_system=None, force_terminal=False)
        with console.capture() as capture:
            _print(self, console)
        return capture.get()

    def __repr__(self) -> str:  # noqa: D105
        return f"Summary({_count(len(self.routes), 'route')}, {len(self.left_out)} left out)"


def summarize(transfer: Transfer, source_params: Params, target_params: Params) -> Summary:
    """Prints a summary of a transfer, and returns it.

    The first table lists the routes: leaves, shapes, matrices, the overlap of both matrices if it is not the whole
    source (the block that a copy copies), rank, adapter parameters and cost. The second lists leaves that match a
    pattern but cannot be paired, with reasons: `Route(..., unmatched="skip")` leaves them out, and any other route
    raises an error when it runs.

    In a notebook, the table is HTML. Nothing is computed, and only shapes are needed, so both trees may hold
    `jax.ShapeDtypeStruct`s. The cost is the number of floating point operations of the matrix products in one pass; a
    gradient takes about three times as many. Routes of one batch have one entry in the adapter, named after the first
    of them.

    Raises:
      ValueError: an error of the routes that `transfer.init` finds, except for leaves that match a pattern but cannot
        be paired.
    """
    rows = transfer.describe(source_params, target_params)
    summary = Summary(tuple(row for row in rows if not row.left_out), tuple(row for row in rows if row.left_out))
    console = Console()
    if not console.is_terminal or console.is_jupyter:
        console.width = _UNFOLDED
    _print(summary, console)
    return summary


def _print(summary: Summary, console: Console) -> None:
    if summary.routes:
        _print_routes(summary.routes, console)
    elif not summary.left_out:
        console.print("a transfer without routes: nothing moves by a named path")
    if summary.left_out:
        table = _table("target", "source", "cannot be paired")
        for row in summary.left_out:
            table.add_row(row.target, row.source, row.left_out)
        console.print(table)
        console.print(
            f"{_count(len(summary.left_out), 'pair')} left out by a route with unmatched='skip'; any other is refused",
            highlight=False,
        )


def _print_routes(rows: tuple[RouteSummary, ...], console: Console) -> None:
    table = _table("target", "source")
    for heading in ("shape", "matrix", "overlap", "view", "rank", "batch", "adapter parameters", "cost"):
        table.add_column(heading, justify="right")
    batch_numbers: dict[str, int] = {}
    for row in rows:
        number = batch_numbers.setdefault(row.adapter, len(batch_numbers) + 1)
        table.add_row(row.target, row.source, *_numbers(row, str(number) if row.adapter else ""))
    parameters, flops = (sum(getattr(row, name) for row in rows) for name in ("parameters", "flops"))
    console.print(table)
    counts = f"{_count(len(rows), 'route')} in {_count(len(batch_numbers), 'batch', 'batches')}"
    console.print(f"{counts}: {parameters:,} adapter parameters, {_flops(flops)} a pass", highlight=False)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _numbers(row: RouteSummary, batch: str) -> tuple[str, ...]:
    shape = " + ".join("x".join(map(str, shape)) for shape in row.shapes)
    m, n = row.target_matrix
    p, q = row.source_matrix
    cut = row.overlap != row.source_matrix
    overlap = f"{row.overlap[0]}x{row.overlap[1]} of {p}x{q}" if cut else "whole"
    rank = "whole" if row.rank is None else f"{row.rank}"
    parameters = f"{row.parameters:,}" if row.parameters or not row.adapter else "shared"
    return shape, f"{m}x{n} from {p}x{q}", overlap, row.view, rank, batch, parameters, _flops(row.flops)


def _flops(flops: int) -> str:
    """Returns a number of operations as text, with three digits and a unit."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOP"
    return f"{flops} FLOP"


class RouteCost(NamedTuple):
    """The cost of a route's adapter; see `RouteSummary`."""

    adapter: str = ""
    parameters: int = 0
    flops: int = 0


def route_summary(route: ResolvedRoute, cost: RouteCost) -> RouteSummary:
    """Returns the summary of a route, with the cost of its adapter."""
    target_view = route.target_view
    if isinstance(target_view, AttentionView):
        view = f"attention, {target_view.heads} heads"
    else:
        view = "convolution" if target_view.taps else "matrix"
        if route.source_view.arrangement is not None:  # type: ignore[union-attr]
            view += ", rows paired"
    return RouteSummary(
        " + ".join(route.target),
        " + ".join(route.source),
        target_view.shapes,
        target_view.matrix_shape,
        route.source_view.matrix_shape,
        target_view.overlap_shape(route.source_view),  # type: ignore[arg-type]
        view,
        route.rank,
        *cost,
    )


def left_out_summaries(left_out: Iterable[LeftOut]) -> tuple[RouteSummary, ...]:
    """Returns a summary of each leaf that matches a pattern but cannot be paired, with the reason."""
    nothing = (0, 0)
    return tuple(
        RouteSummary(one.target, one.source, (), nothing, nothing, nothing, "", None, *RouteCost(), one.reason)
        for one in left_out
    )


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Returns the floating point operations of a function's matrix products, including every loop iteration.

    A product `[m, k] @ [k, n]` costs `2 m k n`; other operations are not counted, as in the usual cost models. Only
    the most expensive branch counts, and the body of a loop without a fixed number of steps counts once.

    Args:
      function: any JAX function.
      *args: its arguments, or their `jax.ShapeDtypeStruct`s.
    """
    return _count_products(jax.make_jaxpr(function)(*args).jaxpr)


def _count_products(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name == "cond":
            total += max(_count_products(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(_count_products(sub) for sub in _inner_jaxprs(params))
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
