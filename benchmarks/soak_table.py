"""Formats the figures of `benchmarks.soak` as the table of docs/long_runs.md.

python -m benchmarks.soak_table runs/benchmarks/soak.json                     # prints it
python -m benchmarks.soak_table runs/benchmarks/soak.json docs/long_runs.md   # writes it into the document
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["put", "table_of"]

_BEGIN, _END = "<!-- soak -->", "<!-- end of soak -->"


def table_of(content: Mapping[str, Any]) -> str:
    """Returns the figures that `benchmarks.soak` has written as a table in Markdown, with a line below it."""
    figures = content["figures"]
    listed = ", ".join(f"{count} {name}" for name, count in content["events"].items())
    rows = [
        (f"events: {listed}", sum(content["events"].values()), "-"),
        ("saves known to have finished", content["finished"], "-"),
        ("resumed and compared with an undisturbed run", content["resumed"], "-"),
        ("finished saves lost", content["lost"], "0"),
        ("undetected changes", content["silent"], "0"),
        ("refusals with a clear message", sum(content["refused"].values()), "-"),
        ("refusals without a clear message", content["unclear"], "0"),
        ("events given up because a process hung, or worse", figures.get("events given up", 0), "0"),
        ("resumed with incomplete metrics", figures.get("incomplete metrics", 0), "0"),
        *_sizes(content["saves"]),
    ]
    lines = ["| count | result | goal |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    environment, seconds = content["environment"], content["seconds"]
    lines += [
        "",
        f"Seed {content['config']['seed']}, {seconds / 3600:.3g} h, {environment['cpu_count']} CPU cores, jax "
        f"{environment['versions']['jax']}, {environment['date'][:10]}, commit {environment['commit']}.",
        f"{figures.get('kills in a save', 0)} kills came during a save. The full disk was {content['full_disk']}.",
    ]
    return "\n".join(lines)


def _sizes(saves: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the rows on a process that saves often: at its first sample, in the middle and at the end."""
    sizes = [size for size in saves.get("sizes", []) if size["saves"]]
    if not sizes:
        return []
    chosen = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    at = ", ".join(f"{size['saves']:,}" for size in chosen)
    return [
        (f"memory (MiB) after {at} saves", ", ".join(f"{size['rss'] / 2**20:.0f}" for size in chosen), "flat"),
        ("open files at the same times", ", ".join(str(size["files"]) for size in chosen), "flat"),
        ("threads at the same times", ", ".join(str(size["threads"]) for size in chosen), "flat"),
    ]


def put(table: str, document: Path) -> None:
    """Replaces what stands between the two marks of a document; raises ValueError where they are not there."""
    before, begin, rest = document.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{document} has no place for the table, between {_BEGIN} and {_END}")
    document.write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}")


if __name__ == "__main__":
    figures, *documents = sys.argv[1:]
    made = table_of(json.loads(Path(figures).read_text()))
    print(made)
    for name in documents:
        put(made, Path(name))
