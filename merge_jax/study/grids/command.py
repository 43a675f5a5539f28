"""A run of a study as plain data, and the function that executes it under any executor.

It may be called repeatedly: finished work is kept, and started runs resume from their last checkpoint.
"""

import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from merge_jax.checkpoints.files import write_whole
from merge_jax.checkpoints.lock import is_locked
from merge_jax.runs.versions import installed_versions

__all__ = ["PATIENCE", "Command", "Outcome", "Session", "last_line", "open_session", "package_versions", "run_command"]

PATIENCE = 30.0
"""Seconds that a run has to save and end."""

_LOOK = 1.0  # Seconds between checks whether the study continues.
_FILE = "session.json"
# Figures depend on these: rows of one table must share versions.
_PACKAGES = ("merge_jax", "jax", "jaxlib", "flax", "optax")
_STOPPED = frozenset(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      seconds: its duration.
      problem: the error in one line, or None.
      stopped: whether something other than the study stopped it, so that it may continue elsewhere.
      unfit: whether it never started, because the worker cannot execute the study's runs.
    """

    seconds: float
    problem: str | None = None
    stopped: bool = False
    unfit: bool = False


@dataclass(frozen=True)
class Session:
    """The data that all runs of one call of the study share.

    Attributes:
      study: the study's absolute folder.
      token: stored in a file of the folder while the study continues.
      cwd: the working folder of runs, for relative paths and the user's modules.
      versions: the package versions where the study was called.
    """

    study: str
    token: str
    cwd: str
    versions: Mapping[str, str]

    def goes_on(self) -> bool:
        """Returns whether the study has neither ended nor been called again."""
        try:
            # By opening the file: on NFS, another host's folder listing may be a minute old, but not an opened file.
            return json.loads(Path(self.study, _FILE).read_text())["token"] == self.token
        except FileNotFoundError:
            return False
        except (OSError, ValueError):  # A temporary disk error; the next check decides.
            return True

    def end(self) -> None:
        """Makes runs save and stop, wherever they are; runs of a later session continue."""
        if self.goes_on():
            Path(self.study, _FILE).unlink(missing_ok=True)

    def unfit(self) -> str | None:
        """Returns why this process cannot execute the study's runs, if so."""
        found, here = package_versions(), f"{platform.node()} ({sys.executable})"
        for name, version in self.versions.items():
            if found[name] != version:
                return f"{name} is {found[name]} on {here}, and {version} where the study was called: install the same"
        for folder in (self.study, self.cwd):
            if not Path(folder).is_dir():
                return f"there is no folder {folder} on {here}: it must be on a disk that all machines share"
        return None


@dataclass(frozen=True)
class Command:
    """One run of a study.

    Attributes:
      module: the experiment's module.
      words: its command line arguments, except --resume.
      run_dir: its folder.
      log: the file for its output.
      session: its session.
    """

    module: str
    words: tuple[str, ...]
    run_dir: str
    log: str
    session: Session


@contextlib.contextmanager
def open_session(study: Path) -> Iterator[Session]:
    """Starts a session of the study in a folder; runs of an earlier session save and stop, as all do at its end."""
    session = Session(str(study.absolute()), uuid.uuid4().hex, os.getcwd(), package_versions())
    write_whole(study / _FILE, json.dumps({"token": session.token, "pid": os.getpid(), "host": platform.node()}))
    try:
        yield session
    finally:
        session.end()


def package_versions() -> dict[str, str]:
    """Returns the installed versions of the packages that figures depend on."""
    return installed_versions(_PACKAGES)


def run_command(command: Command) -> Outcome:
    """Executes or resumes a run in a separate process; returns when the run or the study has ended.

    A separate process isolates JAX's state, the worker's cores and signals, and the worker can answer its scheduler
    while JAX compiles. It waits while another process writes into the run's folder: if that process's worker was
    considered lost, it saves and ends.
    """
    start = time.perf_counter()
    session = command.session
    problem = session.unfit()
    if problem is not None:
        return Outcome(0.0, problem, unfit=True)
    folder, log = Path(session.cwd, command.run_dir), Path(session.cwd, command.log)
    log.parent.mkdir(parents=True, exist_ok=True)
    while is_locked(folder) and session.goes_on():
        time.sleep(_LOOK)
    if not session.goes_on():
        return Outcome(0.0, "the study has ended before it")
    process = _start(command, folder, log)
    try:
        while process.poll() is None and session.goes_on():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK)
    finally:
        _stop(process)
    seconds, code = time.perf_counter() - start, process.returncode
    if code == 0:
        return Outcome(seconds)
    problem = f"killed by {signal.Signals(-code).name}: {last_line(log)}" if code < 0 else last_line(log)
    return Outcome(seconds, problem, stopped=code in _STOPPED and session.goes_on())


def _start(command: Command, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    words = [*command.words, *(["--resume"] if (folder / "config.json").exists() else [])]
    paths = [path or command.session.cwd for path in sys.path]  # Imports that work here also work there.
    with log.open("ab") as output:
        output.write(f"# {datetime.datetime.now():%Y-%m-%d %H:%M:%S} on {platform.node()}\n".encode())
        output.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "merge_jax.study.grids.attended", command.module, *words],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=command.session.cwd,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Interruptions are sent from here, once.
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks a process to save and end, and kills it if it does not."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_line(log: Path) -> str:
    """Returns the last line of a run's output."""
    text = log.read_text(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("# ")]
    return lines[-1] if lines else "it printed nothing"
