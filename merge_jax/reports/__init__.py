"""Run folders, read and shown: tables, curves, an HTML page, several runs side by side."""

from merge_jax.reports.compare import Comparison, compare
from merge_jax.reports.curves import Curve, draw, followed, judged
from merge_jax.reports.html import html_report
from merge_jax.reports.run import PLAN, Model, Moved, Plan, Run, mean_and_error
from merge_jax.reports.table import Rows, as_text, notes, result_tables

__all__ = [
    "PLAN",
    "Comparison",
    "Curve",
    "Model",
    "Moved",
    "Plan",
    "Rows",
    "Run",
    "as_text",
    "compare",
    "draw",
    "followed",
    "html_report",
    "judged",
    "mean_and_error",
    "notes",
    "result_tables",
]
