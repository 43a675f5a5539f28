"""A run as plain data: done in a process of its own, begun again where it was, and stopped with its study."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from benchmarks.simulated_study import wait_for
from merge_jax.checkpoints.lock import FolderLock
from merge_jax.study.grids.command import Outcome, open_session, run_command
from tests.study.simulated import began, command


def test_a_run_is_done_once_and_what_is_done_stays(tmp_path):
    one = command(tmp_path, "--seconds", "0")
    assert run_command(one).problem is None
    assert json.loads((tmp_path / "run" / "results.json").read_text())
    assert run_command(one).problem is None  # With --resume.
    assert len(began(tmp_path / "run")) == 2
    assert " on " in (tmp_path / "run.log").read_text()


def in_thread(one):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run_command(one)))
    thread.start()
    return thread, outcomes


def test_a_run_saves_when_its_study_ends_or_is_called_again(tmp_path):
    one = command(tmp_path, "--seconds", "60")
    thread, outcomes = in_thread(one)
    wait_for((tmp_path / "run" / "saved.json").exists)
    (tmp_path / "session.json").write_text('{"token": "another"}')
    thread.join()
    assert outcomes[0].problem.endswith("which is saved")
    assert not outcomes[0].stopped
    assert run_command(one) == Outcome(0.0, "the study has ended before it")


def test_a_run_that_is_stopped_from_elsewhere_may_go_on(tmp_path):
    thread, outcomes = in_thread(command(tmp_path, "--seconds", "60"))
    wait_for((tmp_path / "run" / "saved.json").exists)
    pid = began(tmp_path / "run")[0]["pid"]
    os.kill(pid, signal.SIGUSR2)  # Of Slurm, to all processes of a job: not for the run.
    os.kill(pid, signal.SIGTERM)
    thread.join()
    assert outcomes[0].problem.endswith("which is saved")
    assert outcomes[0].stopped


def test_a_run_saves_when_its_worker_is_killed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.study.simulated import command; "
        "from merge_jax.study.grids.command import run_command; "
        "run_command(command(Path(sys.argv[1]), '--seconds', '60'))"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    wait_for((tmp_path / "run" / "saved.json").exists)
    with pytest.raises(ValueError, match="another run is writing"):
        FolderLock(tmp_path / "run")
    worker.kill()
    worker.wait()
    wait_for(lambda: "which is saved" in (tmp_path / "run.log").read_text(), seconds=30)


def test_a_run_waits_for_another_that_writes_into_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("merge_jax.study.grids.command._LOOK", 0.05)
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    thread, outcomes = in_thread(command(tmp_path, "--seconds", "0"))
    thread.join(0.5)
    assert thread.is_alive()
    assert not (tmp_path / "run" / "began.jsonl").exists()
    lock.release()
    thread.join()
    assert outcomes[0].problem is None


def test_an_unfit_worker_is_named_before_a_run_begins(tmp_path):
    one = command(tmp_path, "--seconds", "0")
    other = replace(one, session=replace(one.session, versions={**one.session.versions, "jax": "0.1"}))
    outcome = run_command(other)
    assert outcome.unfit
    assert "jax is 0." in outcome.problem
    assert "and 0.1 where the study was called" in outcome.problem
    outcome = run_command(replace(one, session=replace(one.session, study="/nowhere")))
    assert outcome.unfit
    assert "there is no folder /nowhere on " in outcome.problem
    assert not (tmp_path / "run").exists()


def test_a_failure_is_its_last_line_and_a_kill_its_signal(tmp_path):
    assert run_command(command(tmp_path, "--seconds", "0", "--code", "1")).problem == "a simulated failure"
    thread, outcomes = in_thread(command(tmp_path / "other", "--seconds", "60"))
    wait_for((tmp_path / "other" / "run" / "saved.json").exists)
    os.kill(began(tmp_path / "other" / "run")[0]["pid"], signal.SIGKILL)
    thread.join()
    assert outcomes[0].problem.startswith("killed by SIGKILL")
    assert not outcomes[0].stopped


def test_a_session_ends_with_its_study(tmp_path):
    with contextlib.ExitStack() as later:
        with open_session(tmp_path) as first:
            assert first.goes_on()
            second = later.enter_context(open_session(tmp_path))
            assert not first.goes_on()
        assert second.goes_on()  # It does not end with an earlier one.
    assert not second.goes_on()
