"""Plans and checks a study's runs, executes them one by one or in parallel, and reports."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from merge_jax.checks import error_context
from merge_jax.runs.folder import RunFolder, numbered_folder
from merge_jax.study.cli import parse
from merge_jax.study.config import RunConfig, run_options
from merge_jax.study.contents import extended_options, run_identity
from merge_jax.study.experiment import find_grid, load_experiment
from merge_jax.study.grids.command import Command, Outcome, last_line, open_session
from merge_jax.study.grids.executors import Engine, check_executor, open_engine
from merge_jax.study.grids.grid import Grid, GridRun, Options, make_runs, read_grid, select
from merge_jax.study.grids.queue import Job, Progress, run_jobs
from merge_jax.study.grids.report import write_report
from merge_jax.study.options import TransferOptions
from merge_jax.study.runner import check_run, prepare_run
from merge_jax.study.scenario import Scenario
from merge_jax.training.compilation_cache import use_cache

__all__ = ["run_study"]

# Options that cannot affect a source trained before the target. A control changes what methods receive; only another
# seed is another source.
_TARGET_OPTIONS = frozenset(
    {
        *(field.name for field in fields(TransferOptions)),
        *("routes", "cycle", "update", "labels", "steps", "direction"),
        *("temperature", "distillation_weight", "source_control"),
    }
)
_REPORT_SHARE = 50  # A report is rewritten after this many times the seconds of the last one.

_README = """\
# A study: `{command}`

- `grid.toml`: its settings and rows.
- `environment.json`: command, date, versions, devices and commit, and of each resumption.
- `table.txt`, `table.md`, `differences.png`, and `sizes.png`, where settings make a curve: what came out.
- `results.json`: every row, setting and seed, with the command that gives it.
- `<setting>/<row>/`: the folder of a run, which may have several rows; `<setting>/<row>.log` is what it printed.

Go on after an interruption with the command above and `--resume --run-dir` this folder.
"""


def run_study(options: Options) -> None:
    """Checks, runs and reports; an invalid grid or option is one line on standard error and exit code 2.

    If a run fails, it is named and the others continue; the exit code is then 1.
    """
    if options.jobs > 1 or options.executor != "local":
        # Several processes share an accelerator: none may reserve all of its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with contextlib.ExitStack() as stack:
        try:
            check_executor(options.executor, options.jobs)
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
                if options.dry_run:
                    _check(jobs, traced=options.traced)
                    for job in jobs:
                        print(shlex.join(job.words))
                    return
                opened = open_engine(options.executor, shares, run_dir, options.slurm, _run_here)
                engine = stack.enter_context(opened)
                _check(jobs, traced=options.traced)
                folder = RunFolder.open(run_dir, {"grid": grid.name}, resume=options.resume)
        except (ValueError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        folder.write_text("README.md", _README.format(command=folder.read_json("environment.json", [])[0]["command"]))
        folder.write_text("grid.toml", path.read_text())
        go_on = f"the same command with --resume --run-dir {run_dir} goes on"
        try:
            failed = _run_all(jobs, engine, grid, runs, folder)
        except KeyboardInterrupt:
            print(f"\ninterrupted; {go_on}", file=sys.stderr)
            raise SystemExit(130) from None
        except ValueError as error:
            print(f"\nerror: {error}; {go_on}", file=sys.stderr)
            raise SystemExit(1) from None
    print(write_report(grid, runs, folder))
    print(f"run folder: {run_dir}")
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def _shares(jobs: int) -> list[set[int]]:
    """Returns the cores of each job; none if processes cannot be pinned."""
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if not hasattr(os, "sched_setaffinity"):
        return [set() for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        raise ValueError(f"jobs must be at most {len(cores)}, the number of cores, got {jobs}")
    bounds = [i * len(cores) // jobs for i in range(jobs + 1)]
    return [set(cores[first:last]) for first, last in itertools.pairwise(bounds)]


def _make_jobs(runs: Sequence[GridRun], chosen: Sequence[GridRun], run_dir: Path) -> list[Job]:
    """Returns the chosen runs and those that train their sources, in grid order.

    Raises:
      ValueError: an experiment refuses the options of a run.
    """
    alone = {run.name: _parsed(run, run.arguments, run_dir) for run in runs}
    # A run's inputs must not depend on the other chosen runs, or it would be another run.
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
            jobs.append(Job(run, alone[run.name], config, words, base))
    return jobs


def _parsed(run: GridRun, arguments: Sequence[str], run_dir: Path) -> RunConfig:
    module = load_experiment(run.setting.experiment)
    with _naming(run):
        try:
            config = replace(parse(module.PRESETS, module.__name__, "", arguments), run_dir=run_dir / run.name)
        except SystemExit:  # The error is already printed.
            raise ValueError(f"its command is python -m {module.__name__} {shlex.join(arguments)}") from None
        config.check()
    return config


def _naming(run: GridRun) -> contextlib.AbstractContextManager[None]:
    """Prefixes a ValueError's message with the run's rows and setting."""
    names = ", ".join(repr(row.name) for row in run.rows)
    return error_context(f"{names} of the setting {run.setting.name!r}")


def _bases(runs: Sequence[GridRun], configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """Returns the name of the run that trains the source, by the names of its readers."""
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


def _check(jobs: Sequence[Job], *, traced: bool) -> None:
    """Raises ValueError for an invalid run, or one saved in its folder with other options."""
    for job in jobs:
        source = job.config.source_from
        if job.begun and (source is None or source.exists()):  # A missing source is trained first.
            translate = partial(extended_options, config=job.config)
            RunFolder.check(job.folder.path, run_identity(job.config), resume=True, translate=translate)
    left = [job for job in jobs if not job.done]
    for number, job in enumerate(left, 1):
        print(f"checking {number}/{len(left)}: {job.run.name}", file=sys.stderr)
        # The source to read does not exist yet: a separate one has the same shapes.
        scenario = _build(job.run, job.alone)
        if traced:
            with _naming(job.run):
                check_run(scenario, job.alone)


def _run_all(jobs: Sequence[Job], engine: Engine, grid: Grid, runs: Sequence[GridRun], folder: RunFolder) -> list[str]:
    """Executes unfinished runs, reports as runs end, and returns the names of failed ones."""
    left = [job for job in jobs if not job.done]
    rows = sum(len(job.run.rows) for job in jobs)
    print(f"{len(jobs)} runs of {rows} rows: {len(jobs) - len(left)} done, {len(left)} to do")
    if left:
        print(f"what a run prints is in {folder.path}/<setting>/<row>.log", flush=True)
    failed = []
    progress, due = Progress(left), 0.0
    with open_session(folder.path) as session, contextlib.closing(run_jobs(left, engine, session)) as ended:
        for one in ended:
            print(progress.line(one), flush=True)
            if one.outcome.problem is not None:
                failed.append(one.job.run.name)
            start = time.monotonic()
            if start >= due:
                write_report(grid, runs, folder)
                due = time.monotonic() + _REPORT_SHARE * (time.monotonic() - start)
    return failed


def _run_here(command: Command) -> Outcome:
    """Does a run in this process."""
    start, log = time.perf_counter(), Path(command.log)
    log.parent.mkdir(parents=True, exist_ok=True)
    problem = None
    with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            module, folder = load_experiment(command.module), RunFolder(Path(command.run_dir))
            config = parse(module.PRESETS, command.module, "", command.words)
            config = replace(config, resume=(folder.path / "config.json").exists())
            run = prepare_run(module.build(config), config)
            _write_command(folder, command)
            run()
        except SystemExit as left:
            if left.code not in (1, 2):  # After an interruption.
                raise KeyboardInterrupt from None
            problem = last_line(log)
        except Exception as error:
            traceback.print_exc()
            problem = str(error) or type(error).__name__
    return Outcome(time.perf_counter() - start, problem)


def _write_command(folder: RunFolder, command: Command) -> None:
    """Records in a run's folder the run's command instead of the study's."""
    sessions = folder.read_json("environment.json", [])
    words = shlex.join(["python", "-m", command.module, *command.words])
    readme = folder.path / "README.md"
    folder.write_text("README.md", readme.read_text().replace(sessions[-1]["command"], words))
    sessions[-1]["command"] = words
    folder.write_json("environment.json", sessions)
