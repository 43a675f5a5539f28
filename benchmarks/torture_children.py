"""Starts the processes of `benchmarks.torture`, and reads their output."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["ADVICE", "PATIENCE", "Children", "start_program"]

ADVICE = "start both again"
"""What the process that is left says when the other is gone."""
PATIENCE = 120
"""Seconds that a child may take."""

_ROOT = Path(__file__).parent.parent
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "OPENBLAS_NUM_THREADS": "1",  # Its threads would be there before the fork.
}


class Children:
    """A process that forks children, one at a time, and what they say; a context manager."""

    def __init__(
        self,
        step_file: Path,
        program: str = "benchmarks.torture_child",
        python: str = sys.executable,
        patience: float = PATIENCE,
    ):
        """Starts it; `step_file` is what `compile_step` wrote, `patience` the seconds that a child may take."""
        self._process = start_program(
            "serve", str(step_file), program=program, python=python, stdin=subprocess.PIPE, start_new_session=True
        )
        self._patience = patience
        self._noise: list[str] = []
        self._watch: threading.Timer | None = None

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends it and the child, if any."""
        self._kill_all()
        self._process.communicate()

    def start(self, work: str, folder: Path, **options: Any) -> int:
        """Starts a child, one of the works of its program, and returns its process id."""
        self._watch = threading.Timer(self._patience, self._kill_all)
        self._watch.start()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([work, str(folder), options]) + "\n")
        self._process.stdin.flush()
        return self.until("pid")[-1][1]

    def until(self, word: str) -> list[list[Any]]:
        """Returns what the child says, up to a word; the last is that word, or `ended`, with the exit code."""
        said = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("["):
                self._noise.append(line)
                continue
            said.append(json.loads(line))
            if said[-1][0] in (word, "ended"):
                if said[-1][0] == "ended" and self._watch is not None:
                    self._watch.cancel()
                return said
        raise RuntimeError(f"the process that starts the others has ended: {''.join(self._noise[-20:])}")

    def _kill_all(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def noise(self) -> str:
        """The last lines that were no messages, such as a traceback."""
        return "".join(self._noise[-20:])


def start_program(
    *arguments: str, program: str = "benchmarks.torture_child", python: str = sys.executable, **options: Any
) -> subprocess.Popen[str]:
    """Starts a program of this package."""
    return subprocess.Popen(
        [python, "-m", program, *arguments],
        cwd=_ROOT,
        env={**os.environ, **_ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
