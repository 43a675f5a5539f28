"""The overhead of the study engine besides its runs, which are simulated here by sleeping.

    python -m benchmarks.study_engine                      # 100 runs of 2 s, 500 in the queue, two workers and one
    python -m benchmarks.study_engine --runs 20 --queued 50

Each local slot and each Dask worker executes one run at a time. The overhead of a run is the workers' time not used by
runs; its share refers to runs of one minute. CPU seconds are those of all processes, minus those of the same commands
alone. Slurm is not measured, since its scheduling delay depends on the cluster.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple

from benchmarks.simulated_study import dask_processes, simulated_job, wait_for
from merge_jax.study.grids.command import open_session, run_command
from merge_jax.study.grids.executors import Engine, open_engine
from merge_jax.study.grids.grid import SlurmOptions
from merge_jax.study.grids.queue import run_jobs

__all__ = ["main"]

_MINUTE = 60.0


class Measured(NamedTuple):
    """What some runs took.

    Attributes:
      wall: seconds from the first submission to the last end.
      first: seconds from the first submission to the first run's begin.
      cpu: seconds of all processes.
    """

    wall: float
    first: float
    cpu: float


def measure(engine: str, workers: int, runs: int, seconds: float, begin_alone: bool = False) -> Measured:
    """Returns what runs of so many seconds take on so many workers; with `begin_alone`, until the first has begun."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        study = folder / "study"
        study.mkdir()
        cpu = _cpu()
        executor = "local"
        if engine == "dask":
            address, _ = stack.enter_context(dask_processes(folder, workers))
            executor = f"dask:{address}"
        opened: AbstractContextManager[Engine] = open_engine(
            executor, [set()] * max(workers, 2), study, SlurmOptions(), run_command
        )
        running = stack.enter_context(opened)
        if engine == "local":  # One worker too is a process of its own here.
            running = running._replace(executor=stack.enter_context(ThreadPoolExecutor(workers)))
        else:
            wait_for(lambda: len(running.executor._client.nthreads()) == workers)  # type: ignore[attr-defined]
        session = stack.enter_context(open_session(study))
        jobs = [simulated_job(study, f"run{i}", seconds) for i in range(runs)]
        start, begun = time.monotonic(), time.time()
        ended = run_jobs(jobs, running, session)
        outcomes = [next(ended)] if begin_alone else list(ended)
        wall = time.monotonic() - start
        ended.close()
        if bad := [one for one in outcomes if one.outcome.problem]:
            raise RuntimeError(f"{len(bad)} runs failed: {bad[0].outcome.problem}")
        first = min(file.stat().st_mtime for file in study.glob("set/*/config.json")) - begun
    return Measured(wall, first, _cpu() - cpu)


def _cpu() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def _alone(seconds: float, runs: int = 5) -> float:
    """Returns the CPU seconds of a run's command by itself."""
    with tempfile.TemporaryDirectory() as name:
        start = _cpu()
        for i in range(runs):
            words = ("--seconds", str(seconds), "--run-dir", f"{name}/{i}")
            subprocess.run([sys.executable, "-m", "benchmarks.simulated_run", *words], check=True)
        return (_cpu() - start) / runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--queued", type=int, default=500)
    options = parser.parse_args(arguments)
    alone = _alone(options.seconds)
    print(f"a run's command alone: {alone:.2f} s of CPU\n")
    print(
        "| engine | workers | runs | s a run | overhead s a run | of one minute, % | CPU s a run, beyond the command |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    walls: dict[tuple[str, int], float] = {}
    for engine in ("local", "dask"):
        for workers in (2, 1):
            runs = options.runs if workers == 2 else max(options.runs // 5, 1)
            found = measure(engine, workers, runs, options.seconds)
            walls[engine, workers] = found.wall / runs
            overhead = found.wall * workers / runs - options.seconds
            cpu = found.cpu / runs - alone
            print(
                f"| {engine} | {workers} | {runs} | {options.seconds:g} | {overhead:.3f} | "
                f"{100 * overhead / _MINUTE:.2f} | {cpu:.3f} |",
                flush=True,
            )
    print()
    for engine in ("local", "dask"):
        first = measure(engine, 2, options.queued, options.seconds, begin_alone=True).first
        ratio = walls[engine, 2] / walls[engine, 1]
        print(f"{engine}: the first of {options.queued} queued runs begins after {first:.2f} s", flush=True)
        print(f"{engine}: two workers take {ratio:.2f} of one's time", flush=True)


if __name__ == "__main__":
    main()
