"""Runs that compute nothing, as jobs of a study, and Dask processes to do them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

from merge_jax.study.command import Command, Session, package_versions
from merge_jax.study.grid import GridRun, Row, Setting
from merge_jax.study.grid_queue import Job


def job(folder, name, seconds=0.0, code=0, base=None, rows=1):
    setting = Setting("set", "benchmarks.simulated_run")
    run = GridRun(setting, tuple(Row(f"{name}{i or ''}", "vanilla") for i in range(rows)), ())
    run_dir = folder / run.name
    words = ("--seconds", str(seconds), "--code", str(code), "--run-dir", str(run_dir))
    config = SimpleNamespace(run_dir=run_dir, seeds=1, compilation_cache="default")
    return Job(run, config, config, words, None if base is None else f"set/{base}")


def command(folder, *words, token="token"):
    """A run in a folder whose session goes on."""
    folder.mkdir(exist_ok=True)
    (folder / "session.json").write_text(json.dumps({"token": "token"}))
    session = Session(str(folder), token, os.getcwd(), package_versions())
    run_dir = folder / "run"
    words = (*words, "--run-dir", str(run_dir))
    return Command("benchmarks.simulated_run", words, str(run_dir), str(folder / "run.log"), session)


def began(folder):
    """The times at which a run was begun, with what was done before."""
    path = folder / "began.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def dask(folder, workers):
    """A scheduler and workers on loopback; yields the address and the processes, the scheduler's first."""

    def start(*words):
        command = [sys.executable, "-W", "ignore", "-m", "dask", *words, "--no-dashboard"]
        with (folder / f"dask-{len(processes)}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        return processes[-1]

    processes = []
    scheduler_file = folder / "scheduler.json"
    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(scheduler_file))
        wait_for(lambda: scheduler_file.exists() and scheduler_file.read_text().endswith("}"))
        address = json.loads(scheduler_file.read_text())["address"]
        for _ in range(workers):
            local = ("--local-directory", str(folder / f"worker{len(processes)}"))
            start("worker", address, "--nthreads", "1", "--no-nanny", *local)
        yield address, processes
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
