"""Runs that compute nothing, as they are handed to a worker."""

import json
import os

from merge_jax.study.grids.command import Command, Session, package_versions


def command(folder, *words):
    """A run in a folder whose session goes on."""
    folder.mkdir(exist_ok=True)
    (folder / "session.json").write_text(json.dumps({"token": "token"}))
    session = Session(str(folder), "token", os.getcwd(), package_versions())
    run_dir = folder / "run"
    words = (*words, "--run-dir", str(run_dir))
    return Command("benchmarks.simulated_run", words, str(run_dir), str(folder / "run.log"), session)


def began(folder):
    """The times at which a run was begun, with what was done before."""
    return [json.loads(line) for line in (folder / "began.jsonl").read_text().splitlines()]
