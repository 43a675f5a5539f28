"""The order in which runs are handed to an executor, what is tried again, and what an interruption leaves."""

import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from benchmarks.simulated_study import simulated_job as job
from benchmarks.simulated_study import wait_for
from merge_jax.study.grids.command import Outcome, open_session
from merge_jax.study.grids.executors import Engine, open_engine
from merge_jax.study.grids.queue import Ended, Progress, run_jobs
from tests.study.simulated import began


class Manual:
    """An executor whose runs end when the test says so."""

    def __init__(self):
        self.futures = {}

    def submit(self, run, command):
        future = self.futures[command.run_dir.rpartition("/")[2]] = Future()
        future.set_running_or_notify_cancel()
        return future

    def end(self, *names, outcome=None):
        for name in names:
            self.futures[name].set_result(outcome or Outcome(1.0, None))


@pytest.fixture
def done(monkeypatch):
    """Results are where they should be."""
    monkeypatch.setattr("merge_jax.study.grids.queue.Job.done", True)


def names(ended):
    return [one.job.folder.path.name for one in ended]


def jobs_with_sources(folder):
    return [
        job(folder, "reads", base="first"),
        job(folder, "first"),
        job(folder, "other"),
        job(folder, "last", base="other"),
    ]


def test_runs_that_read_a_source_wait_for_the_one_that_trains_it(tmp_path, done):
    manual = Manual()
    with open_session(tmp_path) as session:
        runs = run_jobs(jobs_with_sources(tmp_path), Engine(manual, None), session)
        ended = []
        thread = threading.Thread(target=lambda: ended.extend(runs), daemon=True)
        thread.start()
        wait_for(lambda: set(manual.futures) == {"first", "other"})
        manual.end("other")
        wait_for(lambda: "last" in manual.futures)
        assert "reads" not in manual.futures
        manual.end("last", "first")
        wait_for(lambda: "reads" in manual.futures)
        manual.end("reads")
        thread.join()
    assert names(ended) == ["other", "last", "first", "reads"]


def test_runs_whose_source_failed_are_not_begun(tmp_path, done):
    begun = []

    def run(command):
        begun.append(command.run_dir.rpartition("/")[2])
        return Outcome(1.0, "no memory" if begun[-1] == "first" else None)

    with open_session(tmp_path) as session, ThreadPoolExecutor(1) as executor:
        ended = {
            one.job.folder.path.name: one.outcome
            for one in run_jobs(jobs_with_sources(tmp_path), Engine(executor, run), session)
        }
    assert begun == ["first", "other", "last"]
    assert ended["first"].problem == "no memory"
    assert ended["reads"].problem == "the run that trains its source, set/first, failed"
    assert ended["last"].problem is None


@pytest.mark.parametrize(
    ("kinds", "tries", "problem"),
    [
        (["stopped", "lost", "done"], 3, None),
        (["lost", "lost", "lost", "done"], 3, "its worker was lost: OSError: gone"),
        (["failed", "done"], 1, "a failure"),
    ],
)
def test_a_run_that_is_stopped_or_lost_is_tried_again(kinds, tries, problem, tmp_path, done):
    left = list(kinds)

    def run(command):
        kind = left.pop(0)
        if kind == "lost":
            raise OSError("gone")
        return Outcome(1.0, None if kind == "done" else "a failure", stopped=kind == "stopped")

    with open_session(tmp_path) as session, ThreadPoolExecutor(1) as executor:
        (ended,) = run_jobs([job(tmp_path, "one")], Engine(executor, run), session)
    assert ended.outcome.problem == problem
    assert len(kinds) - len(left) == tries


def test_an_unfit_worker_ends_the_study(tmp_path):
    with open_session(tmp_path) as session, ThreadPoolExecutor(1) as executor:
        engine = Engine(executor, lambda command: Outcome(0.0, "jax is 0.1 on there", unfit=True))
        with pytest.raises(ValueError, match=r"jax is 0\.1 on there"):
            list(run_jobs([job(tmp_path, "one"), job(tmp_path, "two")], engine, session))
        assert not session.goes_on()


def test_results_that_are_not_in_the_folder_are_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("merge_jax.study.grids.queue._SEEN", 0.0)
    with open_session(tmp_path) as session, ThreadPoolExecutor(1) as executor:
        (ended,) = run_jobs([job(tmp_path, "one")], Engine(executor, lambda command: Outcome(1.0)), session)
    assert ended.outcome.problem == f"it ended well, but its results are not in {tmp_path}/set/one"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_cancels_what_waits_and_saves_what_runs(number, tmp_path):
    jobs = [job(tmp_path, name, seconds=60) for name in ("runs", "waits")]
    handler = signal.getsignal(signal.SIGTERM)

    def interrupt():
        wait_for((tmp_path / "set" / "runs" / "saved.json").exists)
        os.kill(os.getpid(), number)

    interrupter = threading.Thread(target=interrupt)
    shares = [set(), set()]
    with open_session(tmp_path) as session, open_engine("local", shares, tmp_path, None, None) as engine:
        one_at_a_time = ThreadPoolExecutor(1)
        begun = []
        run = lambda command: (begun.append(command.run_dir), engine.run(command))[1]  # noqa: E731
        interrupter.start()
        with pytest.raises(KeyboardInterrupt), one_at_a_time:
            list(run_jobs(jobs, engine._replace(executor=one_at_a_time, run=run), session))
    interrupter.join()
    assert begun == [str(tmp_path / "set" / "runs")]
    assert "which is saved" in (tmp_path / "set" / "runs.log").read_text()
    assert not (tmp_path / "set" / "waits.log").exists()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_study_goes_on_where_it_was_interrupted(tmp_path):
    one = job(tmp_path, "one", seconds=60)
    with open_session(tmp_path) as session, ThreadPoolExecutor(1) as executor:
        runs = run_jobs([one], Engine(executor, _run), session)
        thread = threading.Thread(target=lambda: (wait_for((one.folder.path / "saved.json").exists), session.end()))
        thread.start()
        assert next(runs).outcome.problem.endswith("which is saved")
        thread.join()
    shorter = replace(one, arguments=("--seconds", "0.1", *one.arguments[2:]))
    with (
        open_session(tmp_path) as session,
        ThreadPoolExecutor(1) as executor,
        closing(run_jobs([shorter], Engine(executor, _run), session)) as runs,
    ):
        assert next(runs).outcome.problem is None
    first, second = began(one.folder.path)
    assert first["done"] == 0 < second["done"]


def _run(command):
    from merge_jax.study.grids.command import run_command

    return run_command(command)


def test_progress_tells_the_time_to_the_end_by_rows(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("merge_jax.study.grids.queue.time.monotonic", lambda: now[0])
    jobs = [job(tmp_path, "a", rows=2), job(tmp_path, "b"), job(tmp_path, "c", rows=3)]
    progress = Progress(jobs)
    now[0] = 60.0
    assert progress.line(Ended(jobs[0], Outcome(60.0))) == "set: a, a1: 60 s; 2 to do, about 2 min"
    now[0] = 90.0
    assert progress.line(Ended(jobs[2], Outcome(30.0))) == "set: c, c1, c2: 30 s; 1 to do, about 18 s"
    assert progress.line(Ended(jobs[1], Outcome(1.0, "no memory"))).endswith(
        "failed, see " + f"{tmp_path}/set/b.log: no memory; 0 to do"
    )
