"""Submits a study's runs to an executor: each as soon as the run that trains its source is done."""

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from merge_jax.runs.folder import RunFolder
from merge_jax.study.config import RunConfig
from merge_jax.study.experiment import find_experiment
from merge_jax.study.grids.command import PATIENCE, Command, Outcome, Session
from merge_jax.study.grids.executors import Engine
from merge_jax.study.grids.grid import GridRun

__all__ = ["Ended", "Job", "Progress", "run_jobs"]

_TRIES = 3  # For a run stopped from elsewhere, or with a lost worker.
_LOOK = 1.0  # Seconds between checks whether the executor still answers.
_SEEN = 60.0  # Seconds until an NFS host sees another's writes.


@dataclass(frozen=True)
class Job:
    """A run of the study.

    Attributes:
      run: the run of the grid.
      alone: its config with a separate source.
      config: its config, whose source may be that of the run `base`.
      arguments: its command line arguments.
      base: the name of the run that trains its source; None if it trains its own, or has none.
    """

    run: GridRun
    alone: RunConfig
    config: RunConfig
    arguments: tuple[str, ...]
    base: str | None

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        assert self.config.run_dir is not None
        return RunFolder(self.config.run_dir)

    @property
    def log(self) -> Path:
        """The file with the run's output."""
        path = self.folder.path
        return path.with_name(f"{path.name}.log")

    @property
    def begun(self) -> bool:
        """Whether the folder holds the run."""
        return (self.folder.path / "config.json").exists()

    @property
    def done(self) -> bool:
        """Whether every row and seed has its result."""
        return len(self.folder.read_json("results.json", [])) == self.config.seeds * len(self.run.rows)

    @property
    def words(self) -> list[str]:
        """The command line to execute the run alone."""
        return ["python", "-m", find_experiment(self.run.setting.experiment), *self.arguments]

    def command(self, session: Session) -> Command:
        """Returns the run as plain data."""
        cache = self.config.compilation_cache  # These belong to the study, not to the run's command.
        extra = () if cache == "default" else ("--compilation-cache", str(cache))
        _, _, module, *words = self.words
        return Command(module, (*words, *extra), str(self.folder.path), str(self.log), session)


class Ended(NamedTuple):
    """A finished run and its outcome."""

    job: Job
    outcome: Outcome


class Progress:
    """The remaining runs of a study and an estimate of the time, from the rows finished so far."""

    def __init__(self, jobs: Sequence[Job]):
        """Starts the clock."""
        self._left = list(jobs)
        self._rows = 0
        self._start = time.monotonic()

    def line(self, ended: Ended) -> str:
        """Returns the progress line of a finished run."""
        job, outcome = ended
        self._left.remove(job)
        self._rows += 0 if outcome.problem else len(job.run.rows)
        rows = ", ".join(row.name for row in job.run.rows)
        how = f"{outcome.seconds:.0f} s" if outcome.problem is None else f"failed, see {job.log}: {outcome.problem}"
        return f"{job.run.setting.name}: {rows}: {how}; {len(self._left)} to do{self._expected()}"

    def _expected(self) -> str:
        left = sum(len(job.run.rows) for job in self._left)
        if not left or not self._rows:
            return ""
        minutes = (time.monotonic() - self._start) / self._rows * left / 60
        return f", about {minutes:.0f} min" if minutes >= 1.5 else f", about {60 * minutes:.0f} s"


def run_jobs(left: Sequence[Job], engine: Engine, session: Session) -> Generator[Ended, None, None]:
    """Submits runs and yields each as it ends; runs that train a source for others go first.

    A run stopped from elsewhere, or with a lost worker, is resubmitted. On interruption or close, waiting runs are
    cancelled, and active ones save and end.

    Raises:
      ValueError: a worker is unfit, or the executor accepts no more runs.
    """
    waiting = sorted(left, key=lambda job: job.base is not None)
    running: dict[Future[Outcome], Job] = {}
    tries: dict[str, int] = {}
    failed: set[str] = set()
    ended: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
    with _sigterm_as_interrupt():
        try:
            while waiting or running:
                job = _next(waiting, list(running.values()))
                if job is not None and job.base in failed:
                    waiting.remove(job)
                    failed.add(job.run.name)
                    yield Ended(job, Outcome(0.0, f"the run that trains its source, {job.base}, failed"))
                elif job is not None:
                    waiting.remove(job)
                    future = _submit(engine, job, session)
                    running[future] = job
                    future.add_done_callback(ended.put)
                with contextlib.suppress(queue.Empty):
                    future = ended.get(block=job is None, timeout=_LOOK)
                    job = running.pop(future)
                    outcome = _outcome(future, job)
                    tries[job.run.name] = tries.get(job.run.name, 0) + 1
                    if outcome.unfit:
                        raise ValueError(outcome.problem)
                    if outcome.stopped and tries[job.run.name] < _TRIES:
                        waiting.insert(0, job)
                        continue
                    if outcome.problem is not None:
                        failed.add(job.run.name)
                    yield Ended(job, outcome)
                problem = engine.problem()
                if problem is not None:
                    raise ValueError(problem)
        finally:
            _stop(running, engine, session)


def _next(waiting: Sequence[Job], running: Sequence[Job]) -> Job | None:
    """Returns the first run that does not wait for another."""
    busy = {job.run.name for jobs in (waiting, running) for job in jobs}
    return next((job for job in waiting if job.base not in busy), None)


def _submit(engine: Engine, job: Job, session: Session) -> Future[Outcome]:
    try:
        return engine.executor.submit(engine.run, job.command(session))
    except Exception as error:
        raise ValueError(f"the executor accepts no more runs: {error}") from error


def _outcome(future: Future[Outcome], job: Job) -> Outcome:
    """Returns how a run ended; its reported results must be in its folder."""
    try:
        outcome = future.result()
    except (Exception, CancelledError) as error:  # From the executor: runs raise nothing.
        lines = str(error).strip().splitlines() or [""]
        return Outcome(0.0, f"its worker was lost: {type(error).__name__}: {lines[-1]}", stopped=True)
    until = time.monotonic() + _SEEN
    while outcome.problem is None and not job.done:
        if time.monotonic() > until:
            return outcome._replace(problem=f"it ended well, but its results are not in {job.folder.path}")
        time.sleep(1)
    return outcome


def _stop(running: dict[Future[Outcome], Job], engine: Engine, session: Session) -> None:
    """Ends the session, cancels waiting runs, and lets active ones save."""
    session.end()
    for future in running:
        engine.cancel(future)
    wait(running, PATIENCE + 10)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Generator[None, None, None]:
    """Lets SIGTERM interrupt, so that nothing is left running behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
