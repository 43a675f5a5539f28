"""A run as one self-contained HTML file: no network, no other files."""

import base64
import html
import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from merge_jax.runs.curves import as_svg, draw, followed, judged
from merge_jax.runs.run import Run
from merge_jax.runs.table import Rows, meaning, notes, result_tables

__all__ = ["html_report"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: 1rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.options td { text-align: left; }
img { max-width: 100%; }
code, pre { background: #f5f5f5; padding: .1rem .3rem; overflow-wrap: anywhere; white-space: pre-wrap; }
summary { cursor: pointer; }
.notes { color: #555; font-size: .9rem; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd; } th, td { border-color: #444; } code, pre { background: #2b2b2b; }
  .notes { color: #aaa; } img { background: #fff; }
}
"""


def html_report(run: Run) -> str:
    """Returns the report of a run: plan, table, curves, gates, samples, options, machine and date."""
    curves, label = judged(run)
    sections = [
        _section("What was done", _list(run.plan.lines())),
        _section(
            "Results", f"<p>{html.escape(meaning(run))}</p>", *map(_table, result_tables(run)), _notes(notes(run))
        ),
        _section("Curves", _picture(as_svg(draw(curves, label)).encode(), "svg+xml", label)),
    ]
    gates, label = followed(run)
    if gates:
        sections.append(_section("Gates", _picture(as_svg(draw(gates, label)).encode(), "svg+xml", label)))
    samples = run.path / "samples.png"
    if samples.exists():
        sections.append(_section("Samples", _picture(samples.read_bytes(), "png", "test images and answers")))
    sections += [
        _section("Options", *_options(run)),
        _section("Sessions", *(_pairs(_flat(session)) for session in run.sessions)),
        _section("Go on", _commands(run)),
    ]
    title = html.escape(f"{run.plan.experiment}: {run.plan.models}")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n<h1>{title}</h1>\n'
        + "\n".join(sections)
        + "\n</html>\n"
    )


def _section(heading: str, *contents: str) -> str:
    return "\n".join([f"<h2>{html.escape(heading)}</h2>", *contents])


def _list(lines: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{html.escape(line)}</li>" for line in lines) + "\n</ul>"


def _notes(lines: Iterable[str]) -> str:
    return "\n".join(f'<p class="notes">{html.escape(line)}</p>' for line in lines)


def _table(table: Rows) -> str:
    rows = [("th", table.headings), *(("td", row) for row in table.rows)]
    cells = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return _wide(f"<table>\n<caption>{html.escape(table.title)}</caption>\n{body}\n</table>")


def _wide(table: str) -> str:
    # A table wider than a phone scrolls by itself, not with the page.
    return f'<div class="wide">\n{table}\n</div>'


def _pairs(entries: Mapping[str, str]) -> str:
    rows = (
        f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(value)}</code></td></tr>"
        for name, value in entries.items()
    )
    return _wide('<table class="options">\n' + "\n".join(rows) + "\n</table>")


def _options(run: Run) -> list[str]:
    """Returns the options set by the command, and all others folded."""
    given = _given(run)
    tables = {True: {}, False: {}}
    for name, value in run.config.items():
        tables[name in given][name] = json.dumps(value)
    shown = _pairs(tables[True]) if tables[True] else "<p>The command changed none.</p>"
    count = len(tables[False])
    summary = f"<summary>The other {count}, from the preset</summary>"
    return [shown, f"<details>\n{summary}\n{_pairs(tables[False])}\n</details>"] if count else [shown]


def _given(run: Run) -> set[str]:
    """Returns the options the run was started with, by their config names."""
    words = shlex.split(run.command)
    # tyro takes `-` for `_`; `--no-x` is False for x; `--x.y` is a part of x.
    names = {word[2:].partition("=")[0].replace("-", "_").partition(".")[0] for word in words if word[:2] == "--"}
    return names | {name.removeprefix("no_") for name in names}


def _flat(session: Mapping[str, Any]) -> dict[str, str]:
    own = {name: value for name, value in session.items() if name != "versions"}
    return {
        name: str(value) for name, value in {**own, "devices": ", ".join(own["devices"]), **session["versions"]}.items()
    }


def _picture(content: bytes, kind: str, words: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/{kind};base64,{data}">'


def _commands(run: Run) -> str:
    export = ""
    if run.trained is not None:
        export = f"\nmerge-jax export {run.trained} {run.path.name}.safetensors    # the target"
    return (
        "<p>From the folder in which the run was started:</p>\n<pre>"
        + html.escape(
            f"{_resuming(run)}    # go on, if it was stopped\n"
            f"merge-jax compare {run.path} ANOTHER_RUN    # this run beside others\n"
            f"merge-jax summary {run.path}                # what its checkpoints hold{export}"
        )
        + "</pre>"
    )


def _resuming(run: Run) -> str:
    """Returns the command that resumes a run."""
    given = any(word.split("=")[0].replace("_", "-") == "--run-dir" for word in shlex.split(run.command))
    where = "" if given else f" --run-dir {shlex.quote(str(run.path))}"
    return f"{run.command}{where} --resume"
