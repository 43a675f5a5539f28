"""Writing, reading and showing run folders: tables, curves, an HTML page, comparisons of runs."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from merge_jax.runs.comparison import Comparison, compare
    from merge_jax.runs.curves import Curve, draw, followed, judged
    from merge_jax.runs.folder import MetricsLog, RunFolder, check_space, describe_environment, numbered_folder
    from merge_jax.runs.html import html_report
    from merge_jax.runs.run import OPPONENTS, PLAN, Model, Plan, RouteStats, Run, mean_and_error
    from merge_jax.runs.table import Rows, as_text, notes, result_tables

__all__ = [
    "OPPONENTS",
    "PLAN",
    "Comparison",
    "Curve",
    "MetricsLog",
    "Model",
    "Plan",
    "RouteStats",
    "Rows",
    "Run",
    "RunFolder",
    "as_text",
    "check_space",
    "compare",
    "describe_environment",
    "draw",
    "followed",
    "html_report",
    "judged",
    "mean_and_error",
    "notes",
    "numbered_folder",
    "result_tables",
]
