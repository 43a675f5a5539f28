"""A tree of the project with a separate environment, in which `benchmarks.against_commit` starts processes."""

import contextlib
import json
import os
import shutil
import signal
import site
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Finished", "MeasurementError", "Tree", "child_environment", "make_tree", "work_tree"]

_PROGRAM = Path(__file__).with_name("measured_program.py")
_PAUSE = 0.01  # Seconds between looks at a child.


class MeasurementError(Exception):
    """A measured process failed; the message is the last line of what it wrote."""


class Finished(NamedTuple):
    """What a process took.

    Attributes:
      cpu: its CPU seconds, user and system, with those of the processes that it started and waited for.
      wall: seconds from its start to its end.
      output: what it wrote to its standard output.
      marked: CPU seconds (of its own) and wall seconds until the mark was there, if one was given and came.
    """

    cpu: float
    wall: float
    output: str
    marked: tuple[float, float] | None


@dataclass(frozen=True)
class Tree:
    """A folder with the project, and a Python that imports it from there.

    Attributes:
      root: the folder.
      python: the interpreter of its environment.
    """

    root: Path
    python: Path

    def program(self, *words: str) -> dict[str, Any]:
        """Returns what `benchmarks.measured_program` prints; it makes sure that this tree is what is imported."""
        with tempfile.TemporaryDirectory() as folder:
            done = self.run(("-P", str(_PROGRAM), str(self.root), *words), Path(folder))
        return json.loads(done.output.splitlines()[-1])

    def run(
        self,
        words: Sequence[str],
        folder: Path,
        variables: Mapping[str, str] | None = None,
        mark: Callable[[], bool] | None = None,
    ) -> Finished:
        """Runs this tree's Python in a folder and waits for its end.

        Args:
          words: what follows the interpreter.
          folder: the current folder of the process.
          variables: of its environment, beside those of `child_environment`.
          mark: polled; the time until it first returns True is recorded.

        Raises:
          MeasurementError: the process failed.
        """
        environment = {**child_environment(os.environ, self.python), **(variables or {})}
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            start = time.perf_counter()
            process = subprocess.Popen(
                [str(self.python), *words],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
            marked = None
            try:
                while True:
                    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                    wall = time.perf_counter() - start
                    if pid:
                        break
                    if mark is not None and marked is None and mark():
                        marked = _own_cpu_seconds(process.pid), wall
                    time.sleep(_PAUSE)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read())
        if process.returncode:
            raise MeasurementError(_last_line(*texts) or f"exit code {process.returncode}")
        return Finished(usage.ru_utime + usage.ru_stime, wall, texts[0], marked)


def _own_cpu_seconds(pid: int) -> float:
    """Returns the CPU seconds of a process so far; not a number where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _last_line(output: str, errors: str) -> str:
    """Returns the last line of the errors, or else of the output, with more than marks in it."""
    for text in (errors, output):
        lines = [line.strip() for line in text.splitlines() if any(map(str.isalnum, line))]
        if lines:
            return lines[-1]
    return ""


def child_environment(environment: Mapping[str, str], python: Path) -> dict[str, str]:
    """Returns the variables of measured processes: no other code in the path, and nothing compiled before."""
    foreign = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_ENABLE_COMPILATION_CACHE")
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith(foreign) and name not in ("PYTHONPATH", "PYTHONHOME")
    }
    path = os.pathsep.join([str(python.parent), environment.get("PATH", os.defpath)])
    return {**kept, "JAX_ENABLE_COMPILATION_CACHE": "false", "VIRTUAL_ENV": str(python.parent.parent), "PATH": path}


def make_tree(root: Path, environment: Path) -> Tree:
    """Makes an environment in a new folder, whose packages are those that run now, and whose project is `root`.

    All Python files of the tree are compiled to bytecode first, so that no measurement has that to do.
    """
    venv.EnvBuilder(symlinks=True).create(environment)
    python = environment / "bin" / "python"
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    sites = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    # The tree stands before all others; where a package folder names another copy of the project, that one comes later.
    lines = [str(root), *(f"import site; site.addsitedir({folder!r})" for folder in sites)]
    (packages / "tree.pth").write_text("\n".join(lines) + "\n")
    names = [name for name in ("merge_jax", "experiments", "benchmarks", "tests") if (root / name).is_dir()]
    subprocess.run([python, "-m", "compileall", "-q", *names], cwd=root, stdout=subprocess.DEVNULL, check=False)
    return Tree(root, python)


@contextlib.contextmanager
def work_tree(repository: Path, commit: str, folder: Path) -> Iterator[Path]:
    """Yields the folder of a git work tree of a commit, which is removed in the end.

    Raises:
      ValueError: git cannot make it.
    """
    words = ["git", "-c", f"core.hooksPath={os.devnull}", "worktree"]
    made = subprocess.run(
        [*words, "add", "--detach", str(folder), commit], cwd=repository, capture_output=True, text=True
    )
    if made.returncode:
        raise ValueError(f"git makes no work tree of {commit}: {_last_line('', made.stderr)}")
    try:
        yield folder
    finally:
        removed = subprocess.run([*words, "remove", "--force", str(folder)], cwd=repository, capture_output=True)
        if removed.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([*words, "prune"], cwd=repository, capture_output=True)
