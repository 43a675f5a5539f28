"""The runs of a study: planned and checked before the first trains, run one by one or side by side, and reported."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from merge_jax.checks import error_context
from merge_jax.runs.folder import RunFolder, numbered_folder
from merge_jax.study.cli import parse
from merge_jax.study.config import RunConfig, run_options
from merge_jax.study.contents import current_options, run_identity
from merge_jax.study.experiment import find_experiment, find_grid, load_experiment
from merge_jax.study.grid import Grid, GridRun, Options, make_runs, read_grid, select
from merge_jax.study.options import TransferOptions
from merge_jax.study.report import write_report
from merge_jax.study.runner import check_run, prepare_run
from merge_jax.study.scenario import Scenario
from merge_jax.training.compilation_cache import use_cache

__all__ = ["run_study"]

# Options that cannot touch a source that is trained before the target. The control is of what methods are handed,
# but for another seed, which is another source.
_TARGET_OPTIONS = frozenset(
    {
        *(field.name for field in fields(TransferOptions)),
        *("routes", "cycle", "update", "labels", "steps", "direction"),
        *("temperature", "distillation_weight", "source_control"),
    }
)
_PATIENCE = 30.0  # Seconds that an interrupted process has to save and end.


_README = """\
# A study: `{command}`

- `grid.toml`: its settings and rows.
- `environment.json`: command, date, versions, devices and commit, and of each resumption.
- `table.txt`, `table.md`, `differences.png`, and `sizes.png`, where settings make a curve: what came out.
- `results.json`: every row, setting and seed, with the command that gives it.
- `<setting>/<row>/`: the folder of a run, which may have several rows; `<setting>/<row>.log` is what it printed.

Go on after an interruption with the command above and `--resume --run-dir` this folder.
"""


@dataclass(frozen=True)
class _Job:
    """A run of the study.

    Attributes:
      run: of the grid.
      alone: its config with a source of its own.
      config: its config, whose source may be that of the run `base`.
      arguments: words of its command line.
      base: the name of the run that trains the source it reads; None for one of its own, or none.
    """

    run: GridRun
    alone: RunConfig
    config: RunConfig
    arguments: tuple[str, ...]
    base: str | None

    @property
    def folder(self) -> RunFolder:
        assert self.config.run_dir is not None
        return RunFolder(self.config.run_dir)

    @property
    def log(self) -> Path:
        path = self.folder.path
        return path.with_name(f"{path.name}.log")

    @property
    def begun(self) -> bool:
        return (self.folder.path / "config.json").exists()

    @property
    def done(self) -> bool:
        return len(self.folder.read_json("results.json", [])) == self.config.seeds * len(self.run.rows)

    @property
    def command(self) -> list[str]:
        return ["python", "-m", find_experiment(self.run.setting.experiment), *self.arguments]


class _Ended(NamedTuple):
    """A run that has ended, after so many seconds, with a problem or without."""

    job: _Job
    seconds: float
    problem: str | None


def run_study(options: Options) -> None:
    """Checks, runs and reports; what is wrong with grid or options is one line on standard error and exit code 2.

    A run that fails is named, and the others go on; then the exit code is 1.
    """
    if options.jobs > 1:
        # Several processes share an accelerator: none may take all of its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        use_cache(options.compilation_cache)
        shares = _shares(options.jobs)
        path = find_grid(options.grid)
        grid = read_grid(path, options.seeds)
        runs = make_runs(grid, apart=options.apart)
        with numbered_folder(f"ablation-{grid.name}", options.resume, given=options.run_dir) as run_dir:
            jobs = [
                replace(job, config=replace(job.config, compilation_cache=options.compilation_cache))
                for job in _make_jobs(runs, select(runs, options.only), run_dir)
            ]
            _check(jobs, traced=options.traced)
            if options.dry_run:
                for job in jobs:
                    print(shlex.join(job.command))
                return
            folder = RunFolder.open(run_dir, {"grid": grid.name}, resume=options.resume)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_text("README.md", _README.format(command=folder.read_json("environment.json", [])[0]["command"]))
    folder.write_text("grid.toml", path.read_text())
    try:
        failed = _run_all(jobs, shares, grid, runs, folder)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command with --resume --run-dir {run_dir} goes on", file=sys.stderr)
        raise SystemExit(130) from None
    print(write_report(grid, runs, folder))
    print(f"run folder: {run_dir}")
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def _shares(jobs: int) -> list[set[int]]:
    """Returns the cores of each job, none where a process cannot be held to some."""
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if not hasattr(os, "sched_setaffinity"):
        return [set() for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        raise ValueError(f"jobs must be at most {len(cores)}, the number of cores, got {jobs}")
    bounds = [i * len(cores) // jobs for i in range(jobs + 1)]
    return [set(cores[first:last]) for first, last in itertools.pairwise(bounds)]


def _make_jobs(runs: Sequence[GridRun], chosen: Sequence[GridRun], run_dir: Path) -> list[_Job]:
    """Returns the chosen runs, with those that train a source that they read, in the order of the grid.

    Raises:
      ValueError: options that an experiment refuses, of any run.
    """
    alone = {run.name: _parsed(run, run.arguments, run_dir) for run in runs}
    # What a run reads must not depend on what else is chosen, or it would be another run.
    settings = {run.setting.name for run in chosen}
    bases = _bases([run for run in runs if run.setting.name in settings], alone)
    names = {run.name for run in chosen}
    names |= {bases[name] for name in names if name in bases}
    jobs = []
    for run in runs:
        if run.name in names:
            base, arguments = bases.get(run.name), run.arguments
            if base is not None:
                arguments += ["--source", "frozen", "--source-from", str(run_dir / base)]
            config = _parsed(run, arguments, run_dir)
            words = (*arguments, "--run-dir", str(run_dir / run.name))
            jobs.append(_Job(run, alone[run.name], config, words, base))
    return jobs


def _parsed(run: GridRun, arguments: Sequence[str], run_dir: Path) -> RunConfig:
    module = load_experiment(run.setting.experiment)
    with _naming(run):
        try:
            config = replace(parse(module.PRESETS, module.__name__, "", arguments), run_dir=run_dir / run.name)
        except SystemExit:  # What is wrong is printed already.
            raise ValueError(f"its command is python -m {module.__name__} {shlex.join(arguments)}") from None
        config.check()
    return config


def _naming(run: GridRun) -> contextlib.AbstractContextManager[None]:
    """Puts the rows and the setting of a run before the message of a ValueError."""
    names = ", ".join(repr(row.name) for row in run.rows)
    return error_context(f"{names} of the setting {run.setting.name!r}")


def _bases(runs: Sequence[GridRun], configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """Returns the name of the run that trains the source, by the names of those that read it."""
    sharing: dict[str, list[GridRun]] = {}
    for run in runs:
        config = configs[run.name]
        if config.source == "pretrained" and config.source_control not in ("random", "other_seed"):
            options = {name: value for name, value in run_options(config).items() if name not in _TARGET_OPTIONS}
            sharing.setdefault(repr((run.setting.name, options)), []).append(run)
    return {
        run.name: first.name
        for first, *others in sharing.values()
        if others and _build(first, configs[first.name]).source is not None
        for run in others
    }


def _build(run: GridRun, config: RunConfig) -> Scenario:
    with _naming(run):
        return load_experiment(run.setting.experiment).build(config)


def _check(jobs: Sequence[_Job], *, traced: bool) -> None:
    """Raises ValueError for a run that cannot be, or that its folder holds with other options."""
    for job in jobs:
        source = job.config.source_from
        if job.begun and (source is None or source.exists()):  # One that is not there is trained before.
            RunFolder.check(job.folder.path, run_identity(job.config), resume=True, translate=current_options)
    left = [job for job in jobs if not job.done]
    for number, job in enumerate(left, 1):
        print(f"checking {number}/{len(left)}: {job.run.name}", file=sys.stderr)
        # A source to be read does not exist yet: one of its own has the same shapes.
        scenario = _build(job.run, job.alone)
        if traced:
            with _naming(job.run):
                check_run(scenario, job.alone)


def _run_all(
    jobs: Sequence[_Job], shares: Sequence[set[int]], grid: Grid, runs: Sequence[GridRun], folder: RunFolder
) -> list[str]:
    """Runs what is not done yet, reports after each run, and returns the names of those that failed."""
    left = [job for job in jobs if not job.done]
    rows = sum(len(job.run.rows) for job in jobs)
    print(f"{len(jobs)} runs of {rows} rows: {len(jobs) - len(left)} done, {len(left)} to do")
    if left:
        print(f"what a run prints is in {folder.path}/<setting>/<row>.log", flush=True)
    failed = []
    ended = _one_by_one(left) if len(shares) == 1 else _side_by_side(left, shares)
    with contextlib.closing(ended):
        for number, (job, seconds, problem) in enumerate(ended, 1):
            rows = ", ".join(row.name for row in job.run.rows)
            outcome = f"{seconds:.0f} s" if problem is None else f"failed, see {job.log}: {problem}"
            print(f"{job.run.setting.name}: {rows}: {outcome}; {len(left) - number} to do", flush=True)
            if problem is not None:
                failed.append(job.run.name)
            write_report(grid, runs, folder)
    return failed


def _one_by_one(left: Sequence[_Job]) -> Generator[_Ended, None, None]:
    """Runs in this process."""
    failed: set[str] = set()
    for job in left:
        start = time.perf_counter()
        problem = _lacks(job, failed) or _run_here(job)
        if problem is not None:
            failed.add(job.run.name)
        yield _Ended(job, time.perf_counter() - start, problem)


def _run_here(job: _Job) -> str | None:
    """Returns what went wrong in a run, if anything."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            config = replace(job.config, resume=job.begun)
            run = prepare_run(_build(job.run, config), config)
            _write_command(job)
            run()
        except SystemExit as left:
            if left.code not in (1, 2):  # Of an interruption.
                raise KeyboardInterrupt from None
            return _last_line(job.log)
        except Exception as error:
            traceback.print_exc()
            return str(error) or type(error).__name__
    return None


def _write_command(job: _Job) -> None:
    """Lets the folder of a run name the command of that, and not of the study."""
    sessions = job.folder.read_json("environment.json", [])
    readme = job.folder.path / "README.md"
    job.folder.write_text("README.md", readme.read_text().replace(sessions[-1]["command"], shlex.join(job.command)))
    sessions[-1]["command"] = shlex.join(job.command)
    job.folder.write_json("environment.json", sessions)


def _side_by_side(left: Sequence[_Job], shares: Sequence[set[int]]) -> Generator[_Ended, None, None]:
    """Runs in as many processes as there are shares of the cores; those that train a source for others go first."""
    waiting = sorted(left, key=lambda job: job.base is not None)
    running: dict[int, tuple[_Job, subprocess.Popen[bytes], float]] = {}
    failed: set[str] = set()
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)  # Nothing is left running behind.
    try:
        while waiting or running:
            for slot, cores in enumerate(shares):
                busy = {job.run.name for job, *_ in running.values()} | {job.run.name for job in waiting}
                ready = next((job for job in waiting if job.base not in busy), None)
                if slot in running or ready is None:
                    continue
                waiting.remove(ready)
                problem = _lacks(ready, failed)
                if problem is None:
                    running[slot] = (ready, _start(ready, cores), time.perf_counter())
                else:
                    failed.add(ready.run.name)
                    yield _Ended(ready, 0.0, problem)
            for slot, (job, process, start) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    problem = None if process.returncode == 0 else _last_line(job.log)
                    if problem is not None:
                        failed.add(job.run.name)
                    yield _Ended(job, time.perf_counter() - start, problem)
            time.sleep(0.1)
    finally:
        _stop([process for _, process, _ in running.values()])
        signal.signal(signal.SIGTERM, terminated)


def _start(job: _Job, cores: set[int]) -> subprocess.Popen[bytes]:
    """Starts the command of a run on some of the cores, with its output in the log."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    cache = job.config.compilation_cache  # Of the study, so not of the run's own command.
    command = [sys.executable, *job.command[1:]]
    command += ["--resume"] * job.begun + ["--compilation-cache", str(cache)] * (cache != "default")
    paths = [path or os.getcwd() for path in sys.path]  # What can be imported here can be there.
    everything = os.sched_getaffinity(0) if cores else set()
    with job.log.open("ab") as log:
        try:
            if cores:
                os.sched_setaffinity(0, cores)  # A process has those of its parent from its first instruction on.
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # An interruption comes from here, once.
            )
        finally:
            if cores:
                os.sched_setaffinity(0, everything)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupts processes, and terminates those that do not hear it: in the background, it may be ignored."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


def _lacks(job: _Job, failed: set[str]) -> str | None:
    return f"the run that trains its source, {job.base}, failed" if job.base in failed else None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()]
    return next((line for line in reversed(lines) if line), "it printed nothing")
