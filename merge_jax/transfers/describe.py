"""A transfer told in a table."""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from merge_jax.types import Params, RouteSummary, Transfer

__all__ = ["Summary", "summarize"]

# Nothing is folded in a file or on a page, which scrolls; a terminal folds what it must.
_UNFOLDED = 10_000


@dataclass(frozen=True, repr=False)
class Summary:
    """What a transfer does with two models; `str` is the table.

    Attributes:
      routes: what is paired.
      left_out: what patterns of the routes name and what cannot be paired, with the reasons.
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
    """Prints what a transfer does, and returns the same.

    First a table of its routes: leaves, shapes, matrices, the block that both matrices have where it is not all of the
    source's (all that is copied, where a transfer copies), rank, adapter parameters, cost. Then what patterns of the
    routes name and what cannot be paired, with reasons: what `Route(..., unmatched="skip")` leaves out, and what any
    other route is refused for as soon as it runs.

    In a notebook it is an HTML table. Nothing is computed: shapes are all that is needed, so both trees may hold
    `jax.ShapeDtypeStruct`s. The cost is the floating point operations of the matrix products of one pass; a
    gradient takes about three times as many. Routes of one group have one entry in the adapter, named
    after the first of them.

    Raises:
      ValueError: whatever `transfer.init` finds wrong with the routes, but for leaves that a pattern names and that
        cannot be paired.
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
    for heading in ("shape", "matrix", "overlap", "view", "rank", "group", "adapter parameters", "cost"):
        table.add_column(heading, justify="right")
    numbers: dict[str, int] = {}
    for row in rows:
        number = numbers.setdefault(row.adapter, len(numbers) + 1)
        table.add_row(row.target, row.source, *_numbers(row, str(number) if row.adapter else ""))
    parameters, flops = (sum(getattr(row, name) for row in rows) for name in ("parameters", "flops"))
    console.print(table)
    counts = f"{_count(len(rows), 'route')} in {_count(len(numbers), 'group')}"
    console.print(f"{counts}: {parameters:,} adapter parameters, {_flops(flops)} a pass", highlight=False)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _numbers(row: RouteSummary, group: str) -> tuple[str, ...]:
    shape = " + ".join("x".join(map(str, shape)) for shape in row.shapes)
    m, n = row.target_matrix
    p, q = row.source_matrix
    cut = row.overlap != row.source_matrix
    overlap = f"{row.overlap[0]}x{row.overlap[1]} of {p}x{q}" if cut else "whole"
    rank = "whole" if row.rank is None else f"{row.rank}{' core' if row.core else ''}"
    parameters = f"{row.parameters:,}" if row.parameters or not row.adapter else "shared"
    return shape, f"{m}x{n} from {p}x{q}", overlap, row.view, rank, group, parameters, _flops(row.flops)


def _flops(flops: int) -> str:
    """Returns a number of operations with three digits and a unit."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOP"
    return f"{flops} FLOP"
