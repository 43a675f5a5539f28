"""Studies of runs that compute nothing, and local Dask processes to execute them."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from merge_jax.study import RunConfig
from merge_jax.study.grids.grid import GridRun, Row, Setting
from merge_jax.study.grids.queue import Job

__all__ = ["dask_processes", "simulated_job", "wait_for"]

_Found = TypeVar("_Found")


def simulated_job(
    folder: Path, name: str, seconds: float = 0.0, code: int = 0, base: str | None = None, rows: int = 1
) -> Job:
    """Returns a run that lasts some seconds and ends with a code; it may wait for that of another name."""
    setting = Setting("set", "benchmarks.simulated_run")
    run = GridRun(setting, tuple(Row(f"{name}{i or ''}", "vanilla") for i in range(rows)), ())
    run_dir = folder / run.name
    words = ("--seconds", str(seconds), "--code", str(code), "--run-dir", str(run_dir))
    config = RunConfig(run_dir=run_dir, seeds=1)
    return Job(run, config, config, words, None if base is None else f"set/{base}")


@contextlib.contextmanager
def dask_processes(folder: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Starts a scheduler and workers on loopback; yields the address and the processes, the scheduler's first."""
    processes: list[subprocess.Popen[bytes]] = []
    scheduler_file = folder / "scheduler.json"

    def start(*words: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "dask", *words, "--no-dashboard"]
        with (folder / f"dask-{len(processes)}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

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


def wait_for(condition: Callable[[], _Found], seconds: float = 120) -> _Found:
    """Returns what a condition says as soon as that is true."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            raise TimeoutError("waited in vain")
        time.sleep(0.05)
    return found
