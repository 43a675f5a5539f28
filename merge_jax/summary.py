"""A transfer told in a table."""

from rich import box
from rich.console import Console
from rich.table import Table

from merge_jax.types import Params, RouteSummary, Transfer

__all__ = ["summarize"]


def summarize(transfer: Transfer, source_params: Params, target_params: Params) -> None:
    """Prints a table of a transfer's routes: leaves, shapes, matrices, rank, adapter parameters, cost.

    In a notebook it is an HTML table. Nothing is computed: shapes are all that is needed, so both trees may hold
    `jax.ShapeDtypeStruct`s. The cost is the floating point operations of the matrix products of one pass; a
    gradient takes about three times as many. Routes of one group have one entry in the adapter, named
    after the first of them.

    Raises:
      ValueError: whatever `transfer.init` finds wrong with the routes.
    """
    rows = transfer.describe(source_params, target_params)
    console = Console()
    if not console.is_terminal or console.is_jupyter:
        console.width = (
            10_000  # Nothing is folded in a file or on a page, which scrolls; a terminal folds what it must.
        )
    if not rows:
        console.print("a transfer without routes: nothing moves by a named path")
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("target", "source"):
        table.add_column(heading, overflow="fold")
    for heading in ("shape", "matrix", "view", "rank", "group", "adapter parameters", "cost"):
        table.add_column(heading, justify="right")
    numbers: dict[str, int] = {}
    for row in rows:
        number = numbers.setdefault(row.adapter, len(numbers) + 1)
        table.add_row(row.target, row.source, *_numbers(row, str(number) if row.adapter else ""))
    parameters, flops = (sum(getattr(row, name) for row in rows) for name in ("parameters", "flops"))
    groups = len(numbers)
    console.print(table)
    plural = f"{len(rows)} route{'s' if len(rows) > 1 else ''} in {groups} group{'s' if groups > 1 else ''}"
    console.print(f"{plural}: {parameters:,} adapter parameters, {_flops(flops)} a pass", highlight=False)


def _numbers(row: RouteSummary, group: str) -> tuple[str, ...]:
    shape = " + ".join("x".join(map(str, shape)) for shape in row.shapes)
    m, n = row.target_matrix
    p, q = row.source_matrix
    rank = "whole" if row.rank is None else f"{row.rank}{' core' if row.core else ''}"
    parameters = f"{row.parameters:,}" if row.parameters or not row.adapter else "shared"
    return shape, f"{m}x{n} from {p}x{q}", row.view, rank, group, parameters, _flops(row.flops)


def _flops(flops: int) -> str:
    """Returns a number of operations with three digits and a unit."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOP"
    return f"{flops} FLOP"
