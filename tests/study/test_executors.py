"""Engines: what each refuses and names; a real Dask scheduler with workers that die, and submitit's local executor."""

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.simulated_study import dask_processes as dask
from benchmarks.simulated_study import simulated_job as job
from benchmarks.simulated_study import wait_for
from merge_jax.study.grids import ablation, executors
from merge_jax.study.grids.command import open_session
from merge_jax.study.grids.executors import check_executor, open_engine
from merge_jax.study.grids.grid import SlurmOptions
from merge_jax.study.grids.queue import run_jobs
from tests.study.grids import LITTLE, write
from tests.study.simulated import began

cores = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be held to cores here")


@pytest.mark.parametrize(
    ("name", "jobs", "message"),
    [
        ("locl", 1, "unknown executor 'locl'; did you mean 'local'"),
        ("dask", 1, "the executor must be local, slurm, or dask:HOST:PORT as `dask scheduler` prints it, such as"),
        ("dask:", 1, "got 'dask:'"),
        ("dask:10.0.0.1", 1, "got 'dask:10.0.0.1'"),
        ("dask:http://10.0.0.1:8786", 1, "got 'dask:http://10.0.0.1:8786'"),
        ("dask:tcp://10.0.0.1:port", 1, "such as dask:tcp://10.0.0.1:8786"),
        ("slurm:gpu", 1, "unknown executor 'slurm:gpu'"),
        ("local", 0, "jobs must be a whole number of at least 1, got 0"),
        ("dask:10.0.0.1:8786", 2, "--jobs is for --executor local: with dask, the number of workers sets how many"),
    ],
)
def test_names_that_are_no_executors(name, jobs, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check_executor(name, jobs)


@pytest.mark.parametrize(
    "address", ["10.0.0.1:8786", "tcp://10.0.0.1:8786", "tls://host.name:8786", "tcp://[::1]:8786"]
)
def test_addresses_of_dask(address):
    check_executor(f"dask:{address}", 1)


@pytest.mark.parametrize(
    ("module", "name", "extra"), [("distributed", "dask:h:1", "dask"), ("submitit", "slurm", "slurm")]
)
def test_a_missing_extra_is_told_with_its_command(module, name, extra, tmp_path, untraced, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stopped:
        ablation.main(
            "experiments.ablation",
            None,
            [str(write(tmp_path, LITTLE)), "--executor", name, "--run-dir", str(tmp_path / "s")],
        )
    assert stopped.value.code == 2
    assert f"which is not installed: pip install 'merge_jax[{extra}]'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("listens", [True, False])
def test_an_address_that_nobody_answers_is_named(listens, tmp_path, monkeypatch):
    """One that accepts and says nothing too, such as that of another program."""
    monkeypatch.setattr(executors, "_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        with pytest.raises(ValueError, match=f"no Dask scheduler answers at tcp://{address} within 0.5 s"):
            open_engine(f"dask:{address}", [set()], tmp_path, SlurmOptions(), None).__enter__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SlurmOptions(), "there is no sbatch on this machine"),
        (SlurmOptions(minutes=0), "minutes must be a whole number of at least 1"),
        (SlurmOptions(other=("mem",)), "an option of sbatch must be name=value, such as account=physics, got 'mem'"),
    ],
)
def test_slurm_that_is_not_there_or_wrong_options(options, message, tmp_path, monkeypatch):
    if options.other:
        monkeypatch.setattr("shutil.which", lambda name: name)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=message), open_engine("slurm", [set()], tmp_path, options, None):
        pass


class Workers:
    """What a client of Dask is asked, with workers that answer as the test says."""

    def __init__(self, version="same", threads=1, seen=True):
        self.version, self.threads, self.seen = version, threads, seen

    def wait_for_workers(self, count, timeout):
        if self.threads == 0:
            raise TimeoutError

    def nthreads(self):
        return {"tcp://w:1": 1, "tcp://w:2": self.threads}

    def run(self, function, *arguments, on_error):
        answer = function(*arguments)
        if function is importlib.metadata.version and arguments == ("jax",) and self.version != "same":
            answer = self.version
        if function is os.access and not self.seen:
            answer = False
        return {"tcp://w:1": function(*arguments), "tcp://w:2": answer}

    def run_on_scheduler(self, function, name):
        if self.version is None:
            raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (Workers(threads=0), "the Dask scheduler at A has no workers: `dask worker A --nthreads 1` starts one"),
        (Workers(threads=8), "the Dask worker tcp://w:2 has 8 threads, .* `dask worker A --nthreads 1`"),
        (Workers(version="0.1"), "the Dask worker tcp://w:2 has jax 0.1, and here it is .*: install the same"),
        (Workers(version=importlib.metadata.PackageNotFoundError("jax")), "the Dask worker tcp://w:2 has no jax"),
        (
            Workers(seen=False),
            "tcp://w:2 does not see the folder .*: the study's folder .* on a disk that all machines",
        ),
    ],
)
def test_unfit_workers_are_named_before_the_first_run(workers, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        executors._check_workers(workers, "A", tmp_path / "study")
    assert not list(tmp_path.iterdir())


def test_fit_workers_are_taken(tmp_path):
    executors._check_workers(Workers(), "A", tmp_path / "study")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ValueError, match=r"the study.s folder .*study cannot be written: Permission denied"):
        executors._check_workers(Workers(), "A", tmp_path / "study")


@cores
def test_each_local_run_is_held_to_its_share_from_the_start():
    everything = os.sched_getaffinity(0)
    core = max(everything)
    with open_engine("local", [{core}, everything], None, None, None) as engine:
        futures = [engine.executor.submit(lambda: (time.sleep(0.1), os.sched_getaffinity(0))[1]) for _ in range(2)]
        assert sorted(future.result() == {core} for future in futures) == sorted([True, everything == {core}])
    assert os.sched_getaffinity(0) == everything


def parent_of(pid):
    """The process that waits for a run."""
    return int(subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_gives_its_run_to_another(tmp_path):
    """Which goes on where that one had saved."""
    study = tmp_path / "study"
    study.mkdir()
    with (
        dask(tmp_path, 2) as (address, processes),
        open_engine(f"dask:{address}", [set()], study, SlurmOptions(), None) as engine,
        open_session(study) as session,
    ):
        wait_for(lambda: len(engine.executor._client.nthreads()) == 2)
        bad, short = job(study, "bad", code=1), job(study, "short")
        jobs = [job(study, "long", seconds=10), short, job(study, "reads", base="short"), bad]
        long = study / "set" / "long"

        def kill():
            wait_for((long / "saved.json").exists)
            worker = parent_of(began(long)[0]["pid"])
            next(process for process in processes if process.pid == worker).kill()

        killer = threading.Thread(target=kill)
        killer.start()
        ended = list(run_jobs(jobs, engine, session))
        killer.join()
    problems = {one.job.folder.path.name: one.outcome.problem for one in ended}
    assert problems == {"short": None, "reads": None, "bad": "a simulated failure", "long": None}
    first, second = began(long)
    assert first["done"] == 0 < second["done"]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_runs_on_dask_save_when_a_study_is_interrupted_or_its_scheduler_is_lost(lost, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    jobs = [job(study, name, seconds=60) for name in ("runs", "waits")]
    with dask(tmp_path, 1) as (address, processes):

        def interrupt():
            wait_for((study / "set" / "runs" / "saved.json").exists)
            if lost:
                processes[0].kill()
            else:
                os.kill(os.getpid(), signal.SIGINT)

        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        error = pytest.raises(ValueError, match="is lost") if lost else pytest.raises(KeyboardInterrupt)
        with (
            error,
            open_engine(f"dask:{address}", [set()], study, SlurmOptions(), None) as engine,
            open_session(study) as session,
        ):
            list(run_jobs(jobs, engine, session))
        interrupter.join()
        wait_for(lambda: "which is saved" in (study / "set" / "runs.log").read_text())
    assert not (study / "set" / "waits.log").exists()


@pytest.mark.slow
def test_submitit_does_runs_and_puts_one_back_whose_time_is_up(tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    options = SlurmOptions(minutes=5)  # Without a checkpoint, submitit gives up a job that short.
    with executors._slurm(options, study, cluster="local") as engine, open_session(study) as session:
        jobs = [job(study, "long", seconds=4), job(study, "bad", code=1)]
        runs = run_jobs(jobs, engine, session)
        ended = {}
        one = next(runs)
        ended[one.job.folder.path.name] = one.outcome.problem
        long = study / "set" / "long"
        wait_for((long / "saved.json").exists)
        os.kill(parent_of(began(long)[0]["pid"]), signal.SIGUSR2)
        ended |= {one.job.folder.path.name: one.outcome.problem for one in runs}
    assert ended == {"long": None, "bad": "a simulated failure"}
    assert len(list((study / "slurm").glob("*_submitted.pkl"))) == 2  # The same job goes on, not another.
    first, second = began(long)
    assert first["done"] == 0 < second["done"]


def test_what_a_run_asks_of_slurm(tmp_path, monkeypatch):
    """And what sbatch refuses is the run's failure."""
    for name, code in {"srun": "", "sbatch": f'cp "$1" {tmp_path}/asked; echo no such account >&2; exit 1'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = SlurmOptions(partition="short", minutes=7, cpus=3, gpus=1, other=("account=physics",))
    with open_engine("slurm", [set()], tmp_path, options, None) as engine, open_session(tmp_path) as session:
        (ended,) = run_jobs([job(tmp_path, "one")], engine, session)
    assert "no such account" in ended.outcome.problem
    asked = (tmp_path / "asked").read_text()
    wanted = ("partition=short", "time=7", "cpus-per-task=3", "gpus-per-node=1", "account=physics")
    assert all(f"#SBATCH --{word}\n" in asked for word in wanted)
