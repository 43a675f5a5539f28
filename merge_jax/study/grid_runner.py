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
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from merge_jax.runs.folder import RunFolder, numbered_folder
from merge_jax.study.cli import parse
from merge_jax.study.config import RunConfig
from merge_jax.study.experiment import find_experiment, find_grid, load_experiment
from merge_jax.study.grid import Grid, GridRun, Options, read_grid, runs_of, select
from merge_jax.study.options import TransferOptions
from merge_jax.study.report import write_report
from merge_jax.study.runner import check_run, prepare_run
from merge_jax.study.scenario import Scenario
from merge_jax.training.compilation_cache import use_cache

__all__ = ["run_study"]

# Options that cannot touch a source that is trained before the target. The control is of what methods are handed,
# but for another seed, which is another source.
_OF_THE_TARGET = frozenset(
    {
        *(field.name for field in fields(TransferOptions)),
        *("routes", "cycle", "cycle_end", "update", "labels", "steps", "direction"),
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
class _Planned:
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

    one: _Planned
    seconds: float
    problem: str | None


def run_study(options: Options) -> None:
    """Checks, runs and reports; what is wrong with grid or options is one line on standard error and exit code 2.

    A run that fails is told, and the others go on; then the exit code is 1.
    """
    if options.jobs > 1:
        # Several processes share an accelerator: none may take all of its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        use_cache(options.compilation_cache)
        shares = _shares(options.jobs)
        path = find_grid(options.grid)
        grid = read_grid(path, options.seeds)
        runs = runs_of(grid, apart=options.apart)
        with numbered_folder(f"ablation-{grid.name}", options.resume, given=options.run_dir) as run_dir:
            planned = [
                replace(one, config=replace(one.config, compilation_cache=options.compilation_cache))
                for one in _plan(runs, select(runs, options.only), run_dir)
            ]
            _check(planned, traced=options.traced)
            if options.dry_run:
                for one in planned:
                    print(shlex.join(one.command))
                return
            folder = RunFolder.open(run_dir, {"grid": grid.name}, resume=options.resume)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_text("README.md", _README.format(command=folder.read_json("environment.json", [])[0]["command"]))
    folder.write_text("grid.toml", path.read_text())
    try:
        failed = _run_all(planned, shares, grid, runs, folder)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command with --resume --run-dir {run_dir} goes on", file=sys.stderr)
        raise SystemExit(130) from None
    print(write_report(grid, runs, folder))
    print(f"run folder: {run_dir}")
    if failed:
        print(f"error: {len(failed)} of {len(planned)} runs failed: {', '.join(failed)}", file=sys.stderr)
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


def _plan(runs: Sequence[GridRun], chosen: Sequence[GridRun], run_dir: Path) -> list[_Planned]:
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
    planned = []
    for run in runs:
        if run.name in names:
            base, arguments = bases.get(run.name), run.arguments
            if base is not None:
                arguments += ["--source", "frozen", "--source-from", str(run_dir / base)]
            config = _parsed(run, arguments, run_dir)
            words = (*arguments, "--run-dir", str(run_dir / run.name))
            planned.append(_Planned(run, alone[run.name], config, words, base))
    return planned


def _parsed(run: GridRun, arguments: Sequence[str], run_dir: Path) -> RunConfig:
    module = load_experiment(run.setting.experiment)
    with _told_where(run):
        try:
            config = replace(parse(module.PRESETS, module.__name__, "", arguments), run_dir=run_dir / run.name)
        except SystemExit:  # What is wrong is printed already.
            raise ValueError(f"its command is python -m {module.__name__} {shlex.join(arguments)}") from None
        config.check()
    return config


@contextlib.contextmanager
def _told_where(run: GridRun) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        names = ", ".join(repr(row.name) for row in run.rows)
        raise ValueError(f"{names} of the setting {run.setting.name!r}: {error}") from None


def _bases(runs: Sequence[GridRun], configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """Returns the name of the run that trains the source, by the names of those that read it."""
    groups: list[tuple[Any, list[GridRun]]] = []
    for run in runs:
        config = configs[run.name]
        own = config.source != "pretrained" or config.source_control in ("random", "other_seed")
        if not own and not config.vectorized:  # Seeds side by side are saved in another layout.
            identity = {name: value for name, value in config.options().items() if name not in _OF_THE_TARGET}
            key = (run.setting.name, identity)
            group = next((group for other, group in groups if other == key), None)
            if group is None:
                groups.append((key, [run]))
            else:
                group.append(run)
    return {
        run.name: group[0].name
        for _, group in groups
        if len(group) > 1 and _built(group[0], configs[group[0].name]).source is not None
        for run in group[1:]
    }


def _built(run: GridRun, config: RunConfig) -> Scenario:
    with _told_where(run):
        return load_experiment(run.setting.experiment).build(config)


def _check(planned: Sequence[_Planned], *, traced: bool) -> None:
    """Raises ValueError for a run that cannot be, or that its folder holds with other options."""
    for one in planned:
        source = one.config.source_from
        if one.begun and (source is None or source.exists()):  # One that is not there is trained before.
            RunFolder.check(one.folder.path, one.config.identity(), resume=True)
    left = [one for one in planned if not one.done]
    for number, one in enumerate(left, 1):
        print(f"checking {number}/{len(left)}: {one.run.name}", file=sys.stderr)
        # A source that is to be read is not there yet: one of its own has the same shapes.
        scenario = _built(one.run, one.alone)
        if traced:
            with _told_where(one.run):
                check_run(scenario, one.alone)


def _run_all(
    planned: Sequence[_Planned], shares: Sequence[set[int]], grid: Grid, runs: Sequence[GridRun], folder: RunFolder
) -> list[str]:
    """Runs what is not done yet, reports after each run, and returns the names of those that failed."""
    left = [one for one in planned if not one.done]
    cells = sum(len(one.run.rows) for one in planned)
    print(f"{len(planned)} runs of {cells} rows: {len(planned) - len(left)} done, {len(left)} to do")
    if left:
        print(f"what a run prints is in {folder.path}/<setting>/<row>.log", flush=True)
    failed = []
    ended = _one_by_one(left) if len(shares) == 1 else _side_by_side(left, shares)
    with contextlib.closing(ended):
        for number, (one, seconds, problem) in enumerate(ended, 1):
            rows = ", ".join(row.name for row in one.run.rows)
            outcome = f"{seconds:.0f} s" if problem is None else f"failed, see {one.log}: {problem}"
            print(f"{one.run.setting.name}: {rows}: {outcome}; {len(left) - number} to do", flush=True)
            if problem is not None:
                failed.append(one.run.name)
            write_report(grid, runs, folder)
    return failed


def _one_by_one(left: Sequence[_Planned]) -> Generator[_Ended, None, None]:
    """Runs in this process."""
    failed: set[str] = set()
    for one in left:
        start = time.perf_counter()
        problem = _lacks(one, failed) or _run_here(one)
        if problem is not None:
            failed.add(one.run.name)
        yield _Ended(one, time.perf_counter() - start, problem)


def _run_here(one: _Planned) -> str | None:
    """Returns what went wrong in a run, if anything."""
    one.log.parent.mkdir(parents=True, exist_ok=True)
    with one.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            config = replace(one.config, resume=one.begun)
            run = prepare_run(_built(one.run, config), config)
            _write_command(one)
            run()
        except SystemExit as left:
            if left.code not in (1, 2):  # Of an interruption.
                raise KeyboardInterrupt from None
            return _last_line(one.log)
        except Exception as error:
            traceback.print_exc()
            return str(error) or type(error).__name__
    return None


def _write_command(one: _Planned) -> None:
    """Lets the folder of a run name the command of that, and not of the study."""
    sessions = one.folder.read_json("environment.json", [])
    readme = one.folder.path / "README.md"
    one.folder.write_text("README.md", readme.read_text().replace(sessions[-1]["command"], shlex.join(one.command)))
    sessions[-1]["command"] = shlex.join(one.command)
    one.folder.write_json("environment.json", sessions)


def _side_by_side(left: Sequence[_Planned], shares: Sequence[set[int]]) -> Generator[_Ended, None, None]:
    """Runs in as many processes as there are shares of the cores; those that train a source for others go first."""
    waiting = sorted(left, key=lambda one: one.base is not None)
    running: dict[int, tuple[_Planned, subprocess.Popen[bytes], float]] = {}
    failed: set[str] = set()
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)  # Nothing is left running behind.
    try:
        while waiting or running:
            for slot, cores in enumerate(shares):
                busy = {one.run.name for one, *_ in running.values()} | {one.run.name for one in waiting}
                ready = next((one for one in waiting if one.base not in busy), None)
                if slot in running or ready is None:
                    continue
                waiting.remove(ready)
                problem = _lacks(ready, failed)
                if problem is None:
                    running[slot] = (ready, _start(ready, cores), time.perf_counter())
                else:
                    failed.add(ready.run.name)
                    yield _Ended(ready, 0.0, problem)
            for slot, (one, process, start) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    problem = None if process.returncode == 0 else _last_line(one.log)
                    if problem is not None:
                        failed.add(one.run.name)
                    yield _Ended(one, time.perf_counter() - start, problem)
            time.sleep(0.1)
    finally:
        _stop([process for _, process, _ in running.values()])
        signal.signal(signal.SIGTERM, terminated)


def _start(one: _Planned, cores: set[int]) -> subprocess.Popen[bytes]:
    """Starts the command of a run on some of the cores, with its output in the log."""
    one.log.parent.mkdir(parents=True, exist_ok=True)
    cache = one.config.compilation_cache  # Of the study, so not of the run's own command.
    command = [sys.executable, *one.command[1:]]
    command += ["--resume"] * one.begun + ["--compilation-cache", str(cache)] * (cache != "default")
    paths = [path or os.getcwd() for path in sys.path]  # What can be imported here can be there.
    everything = os.sched_getaffinity(0) if cores else set()
    with one.log.open("ab") as log:
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


def _lacks(one: _Planned, failed: set[str]) -> str | None:
    return f"the run that trains its source, {one.base}, failed" if one.base in failed else None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()]
    return next((line for line in reversed(lines) if line), "it printed nothing")
