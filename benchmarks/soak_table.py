"""The figures of `benchmarks.soak` as the table of docs/long_runs.md.

python -m benchmarks.soak_table runs/benchmarks/soak.json
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["table_of"]


def table_of(content: Mapping[str, Any]) -> str:
    """Returns the figures that `benchmarks.soak` has written as a table in Markdown, with a line below it."""
    figures = content["figures"]
    listed = ", ".join(f"{count} {name}" for name, count in content["events"].items())
    rows = [
        (f"events: {listed}", sum(content["events"].values()), "-"),
        ("saves that were known to have ended", content["finished"], "-"),
        ("resumed and compared with an undisturbed run", content["resumed"], "-"),
        ("finished saves lost", content["lost"], "0"),
        ("silent changes", content["silent"], "0"),
        ("refusals with a clear message", sum(content["refused"].values()), "-"),
        ("refusals without one", content["unclear"], "0"),
        ("events given up: a process hung, or worse", figures.get("events given up", 0), "0"),
        ("resumed with incomplete metrics", figures.get("incomplete metrics", 0), "0"),
        *_sizes(content["saves"]),
    ]
    lines = ["| what was counted | result | aimed for |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    environment, seconds = content["environment"], content["seconds"]
    lines += [
        "",
        f"Seed {content['config']['seed']}, {seconds / 3600:.2g} h, {environment['cpu_count']} CPU cores, jax "
        f"{environment['versions']['jax']}, {environment['date'][:10]}, commit {environment['commit']}; "
        f"{figures.get('kills in a save', 0)} kills fell into a save; full disk: {content['full_disk']}.",
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
        ("open files then", ", ".join(str(size["files"]) for size in chosen), "flat"),
        ("threads then", ", ".join(str(size["threads"]) for size in chosen), "flat"),
    ]


if __name__ == "__main__":
    print(table_of(json.loads(Path(sys.argv[1]).read_text())))
