"""Makes the tables of docs/efficacy.md from the results in the repository, docs/tables/*.json.

python -m benchmarks.efficacy_tables                                   # writes docs/tables/*.txt, all tables
python -m benchmarks.efficacy_tables cifar100                          # mean and standard error of each row, over seeds
python -m benchmarks.efficacy_tables cifar100 --against vanilla refit  # and paired differences to these
python -m benchmarks.efficacy_tables ag_news --seeds 6 7 8 9 10 11     # of these seeds alone
python -m benchmarks.efficacy_tables sst2 --add runs/sst2              # takes the results of a run folder in first

A file has the runs (command, commit, date, jax, cores) and, for each row and seed, test accuracy right after the write
and after the last step. A row is a method at a rate, such as `refit@0.1`; `--suffix` distinguishes rows of one method,
such as ", 200 labels". p is of a two-sided paired t-test; beside it, Holm's procedure adjusts it for all comparisons
that are printed with a row. A page that compares fewer adjusts for those.
"""

import argparse
import json
import operator
from collections import defaultdict
from pathlib import Path
from typing import Any

from merge_jax.runs.table import format_values
from merge_jax.study.statistics import holm, paired_difference

__all__ = ["add_run", "main", "table", "written"]

TABLES = Path(__file__).parent.parent / "docs" / "tables"
_COLUMNS = {"right_after": "right after the write", "test": "after the last step"}

Row = tuple[str, float | None]


def main(arguments: list[str] | None = None) -> None:
    """Prints the table of a file of results, with runs added to it if there are any; without a file writes all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="of the file in docs/tables, or a path")
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="RUN", help="run folders to take in")
    parser.add_argument("--suffix", default="", help="what is added to the names of these runs' rows")
    parser.add_argument("--against", nargs="+", default=[], metavar="ROW", help="rows to compare every other row with")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="to show; all without it")
    options = parser.parse_args(arguments)
    if options.name is None:
        for file in TABLES.glob("*.json"):
            file.with_suffix(".txt").write_text(written(file))
        return
    file = Path(options.name) if options.name.endswith(".json") else TABLES / f"{options.name}.json"
    content = json.loads(file.read_text()) if file.exists() else {"runs": [], "results": []}
    for run in options.add:
        content = add_run(content, run, options.suffix)
    if options.add:
        file.write_text(json.dumps(content, indent=1) + "\n")
    results = [one for one in content["results"] if options.seeds is None or one["seed"] in options.seeds]
    print(table(results, options.against))


def written(file: Path) -> str:
    """Returns the text of a file of results that is kept beside it: its runs, and its table."""
    content = json.loads(file.read_text())
    runs = [f"{run['command']}\n    commit {run['commit']}, {run['date']}, jax {run['jax']}" for run in content["runs"]]
    return "\n".join([table(content["results"], []), "", *runs, ""])


def add_run(content: dict[str, Any], run: Path, suffix: str = "") -> dict[str, Any]:
    """Returns the content of a file of results with those of a run folder.

    Raises:
      ValueError: a row of the run is there already.
    """
    environment = json.loads((run / "environment.json").read_text())[-1]
    rate = json.loads((run / "config.json").read_text()).get("target_rate")
    added = [
        {
            "row": result["method"] + suffix,
            "target_rate": rate,
            "seed": result["seed"],
            "right_after": result["target_start_test"],
            "probe": result["target_start_probe"],
            "test": result["target_test"],
            "probe_after": result["target_probe"],
            "validation": result["target_validation"],
        }
        for result in json.loads((run / "results.json").read_text())
    ]
    opponents = run / "opponents.json"  # A run may measure none.
    added += [
        {"row": result["opponent"] + suffix, "seed": result["seed"], "test": result["target_test"]}
        for result in (json.loads(opponents.read_text()) if opponents.exists() else [])
    ]
    there = {(*_row(result), result["seed"]) for result in content["results"]}
    twice = sorted({result["row"] for result in added if (*_row(result), result["seed"]) in there})
    if set(twice) - {result["row"] for result in added if "target_rate" not in result}:
        raise ValueError(
            f"{run}: {', '.join(twice)} with these seeds and rates are there already; --suffix tells rows apart"
        )
    described = {
        "command": environment["command"].replace(str(run), f"runs/{run.name}").replace(" --resume", ""),
        "commit": environment["commit"],
        "date": environment["date"][:10],
        "jax": environment["versions"]["jax"],
        "cores": environment["cpu_count"],
    }
    new = [result for result in added if (*_row(result), result["seed"]) not in there]
    return {"runs": [*content["runs"], described], "results": [*content["results"], *new]}


def table(results: list[dict[str, Any]], against: list[str]) -> str:
    """Returns rows, and their differences to some of them, as Markdown; accuracies in percent, paired by seed.

    Raises:
      ValueError: a row to compare with is not there, or there at several rates.
    """
    found: dict[Row, dict[str, dict[int, float]]] = defaultdict(lambda: {column: {} for column in _COLUMNS})
    for result in results:
        for column in _COLUMNS:
            if result.get(column) is not None:
                found[_row(result)][column][result["seed"]] = 100 * result[column]
    lines = [f"| row | rate | seeds | {' | '.join(_COLUMNS.values())} |", "| --- | --- | ---: | ---: | ---: |"]
    for row, columns in found.items():
        cells = [format_values(columns[column].values()) for column in _COLUMNS]
        lines.append(f"| {row[0]} | {row[1] or ''} | {max(map(len, columns.values()))} | {' | '.join(cells)} |")
    for name in against:
        bases = [row for row in found if name in (row[0], f"{row[0]}@{row[1]}")]
        if len(bases) != 1:
            rows = ", ".join(f"{row[0]}@{row[1]}" for row in bases) or ", ".join(sorted({row[0] for row in found}))
            raise ValueError(f"{name} is {len(bases)} of the rows, not one: {rows}")
        lines += ["", *_differences(found, bases[0])]
    return "\n".join(lines)


def _differences(found: dict[Row, dict[str, dict[int, float]]], base: Row) -> list[str]:
    compared = []
    for row, columns in found.items():
        for column in _COLUMNS:
            seeds = sorted(columns[column].keys() & found[base][column].keys())
            if row != base and seeds:
                pairs = [[values[column][seed] for seed in seeds] for values in (columns, found[base])]
                compared.append((row, column, pairs, paired_difference(*pairs).p_t))
    adjusted = iter(holm([p for *_, p in compared if p is not None]))
    lines = [
        f"| row - {base[0]} | rate | column | seeds | difference | p | p, adjusted |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row, column, pairs, p in compared:
        cells = [row[0], str(row[1] or ""), _COLUMNS[column], str(len(pairs[0]))]
        cells.append(format_values(map(operator.sub, *pairs), "+"))
        cells += ["", ""] if p is None else [f"{p:.1g}", f"{next(adjusted):.1g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _row(result: dict[str, Any]) -> Row:
    return result["row"], result.get("target_rate")


if __name__ == "__main__":
    main()
