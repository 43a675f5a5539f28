"""A run of a study as plain data, and the function that does it wherever an executor calls it.

It may be called any number of times: what is done stays done, and what was begun goes on from its last checkpoint.
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

_LOOK = 1.0  # Seconds between looks at whether the study goes on.
_FILE = "session.json"
# What figures depend on: rows of one table are of one version.
_PACKAGES = ("merge_jax", "jax", "jaxlib", "flax", "optax")
_STOPPED = frozenset(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      seconds: that it took.
      problem: what went wrong, in a line; None if nothing.
      stopped: whether something other than the study asked it to stop, so that it may go on elsewhere.
      unfit: whether it was never begun, because the worker can do none of the study's runs.
    """

    seconds: float
    problem: str | None = None
    stopped: bool = False
    unfit: bool = False


@dataclass(frozen=True)
class Session:
    """What all runs share, of one call of the study.

    Attributes:
      study: its folder, absolute.
      token: stands in the folder's file for as long as the study goes on.
      cwd: the folder in which runs start, for relative paths and the user's own modules.
      versions: of packages, where the study was called.
    """

    study: str
    token: str
    cwd: str
    versions: Mapping[str, str]

    def goes_on(self) -> bool:
        """Returns whether the study has not ended, or been called again."""
        try:
            # By opening it: other hosts' looks at a folder of NFS may be a minute old, but not what is opened.
            return json.loads(Path(self.study, _FILE).read_text())["token"] == self.token
        except FileNotFoundError:
            return False
        except (OSError, ValueError):  # Of a disk with a moment's trouble; the next look tells.
            return True

    def end(self) -> None:
        """Lets runs save and stop, wherever they are; those of a later session go on."""
        if self.goes_on():
            Path(self.study, _FILE).unlink(missing_ok=True)

    def unfit(self) -> str | None:
        """Returns why this process can do none of the study's runs, if so."""
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
      module: of the experiment.
      words: of its command line, but for --resume.
      run_dir: its folder.
      log: the file that it prints into.
      session: that it is of.
    """

    module: str
    words: tuple[str, ...]
    run_dir: str
    log: str
    session: Session


@contextlib.contextmanager
def open_session(study: Path) -> Iterator[Session]:
    """Begins a session of the study in a folder; runs of an earlier one save and stop, as all do at its end."""
    session = Session(str(study.absolute()), uuid.uuid4().hex, os.getcwd(), package_versions())
    write_whole(study / _FILE, json.dumps({"token": session.token, "pid": os.getpid(), "host": platform.node()}))
    try:
        yield session
    finally:
        session.end()


def package_versions() -> dict[str, str]:
    """Returns the versions of what figures depend on, as installed here."""
    return installed_versions(_PACKAGES)


def run_command(command: Command) -> Outcome:
    """Does a run in a process of its own, or goes on with it; returns when it has ended or the study has.

    In a process of its own JAX's state, the cores of a worker and signals are the run's own; the worker stays free to
    answer its scheduler while JAX compiles. It waits as long as another process writes into the run's folder: one whose
    worker was given up for lost saves, and ends.
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
    paths = [path or command.session.cwd for path in sys.path]  # What can be imported here can be there.
    with log.open("ab") as output:
        output.write(f"# {datetime.datetime.now():%Y-%m-%d %H:%M:%S} on {platform.node()}\n".encode())
        output.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "merge_jax.study.attended", command.module, *words],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=command.session.cwd,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # An interruption comes from here, once.
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Lets a process save and end, and kills it if it does not."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_line(log: Path) -> str:
    """Returns the last line that a run has printed."""
    text = log.read_text(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("# ")]
    return lines[-1] if lines else "it printed nothing"
