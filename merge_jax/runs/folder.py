"""A run folder: the config, environment, metrics and results of a run, in readable files."""

import contextlib
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from merge_jax.checkpoints.files import naming_file, write_whole
from merge_jax.checkpoints.lock import LOCK, FolderLock
from merge_jax.checkpoints.manifest import changes
from merge_jax.runs.versions import installed_versions

__all__ = ["MetricsLog", "RunFolder", "check_space", "describe_environment", "numbered_folder"]

_RUNS = Path("runs")
_CONFIG = "config.json"
_CONTENTS = "contents"
_FLUSH = 10.0  # Seconds that events may stay in memory.
# Left by a process killed while creating the folder.
_BEFORE_CONFIG = (LOCK, f"{_CONFIG}.part")

Translate = Callable[[Mapping[str, Any]], Mapping[str, Any]]

_PACKAGES = ("merge_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

_README = """\
# A run of `{command}`

- `config.json`: every option of the run.
- `environment.json`: command, date, versions, devices and commit of the run, and of each resumption.
- `metrics.jsonl`: one record a report: the run (method and seed), the step, and the metrics by role. In the runs
  `source-seed<n>` the source is trained on its own, in the role of the target.
- `tensorboard/`: the same for TensorBoard, once `pip install tensorboard` is done (`tensorboard --logdir` this folder).
- `plan.json`: the models, routes and lengths, as they were printed before the run began.
- `results.json`, `table.txt`, `curves.png`: what came out; they appear as runs end, and `report.html`, which has all of
  it on one page and needs no other file. `opponents.json`, of classifiers, what stands beside the methods; `gates.png`,
  where a transfer has gates, `samples.png`, test images with what models made of them, and `vocabulary.json`, of text
  models.
- `checkpoints/<method>-seed<n>/<step>/`: Orbax checkpoints of everything (both models, adapter, optimizers, step, key).
  In `seconds.json`, how long it was trained up to a step; in `start.json`, what the target was worth before the first.

Go on after an interruption with the command above and `--resume --run-dir` this folder.
"""


class RunFolder:
    """The folder of one run; opening it checks for problems before training.

    Only one process at a time may open it for writing.
    """

    def __init__(self, path: Path):
        """Takes a folder to read; use `RunFolder.open` to write."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: FolderLock | None = None

    @classmethod
    def open(cls, path: Path | str, config: Mapping[str, Any], *, resume: bool, translate: Translate = dict) -> Self:
        """Creates and returns the folder, or opens the existing one if `resume` is set.

        Args:
          path: the folder; a new one, or an empty one, unless `resume` is set.
          config: all options that define the run, as JSON types. `contents` may hold digests of path options, by name;
            if the saved run has them too, the paths themselves may differ.
          resume: whether to continue the run in the folder.
          translate: returns what a saved config is today: that of an earlier version in terms of this one, and what
            `config` may change. `config.json` then has it too.

        If several processes share a run, only process 0 writes and reports errors.

        Raises:
          ValueError: the folder holds a run and `resume` is not set; `resume` is set and there is no run, or one with
            another config (the message names the fields); another process is writing into it; the folder is not
            writable.
        """
        path = Path(path)
        if jax.process_index() > 0:
            return cls(path)
        cls.check(path, config, resume=resume, translate=translate)
        config = json.loads(json.dumps(config))  # As it will be read back: tuples become lists.
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path)
            folder._lock = FolderLock(path)
            saved = folder.read_json(_CONFIG, None)
            written = config if saved is None else translate(saved)
            if written != saved:
                folder.write_json(_CONFIG, written)
                folder.write_text("README.md", _README.format(command=_command()))
            sessions = folder.read_json("environment.json", [])
            folder.write_json("environment.json", [*sessions, describe_environment()])
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path / 'environment.json'} is damaged: {error}") from None
        except OSError as error:
            raise ValueError(f"the run folder {path} cannot be written: {error}") from None
        return folder

    @staticmethod
    def check(path: Path | str, config: Mapping[str, Any], *, resume: bool, translate: Translate = dict) -> None:
        """Raises ValueError if `open` would because of the folder's content; writes nothing."""
        path = Path(path)
        config_path = path / _CONFIG
        try:
            if config_path.exists():
                saved, given = translate(json.loads(config_path.read_text())), json.loads(json.dumps(config))
                changed = changes(_by_contents(saved, given), _by_contents(given, saved))
                if changed:
                    raise ValueError(
                        f"the run folder {path} exists with another config:\n  "
                        + "\n  ".join(changed)
                        + "\nGive the same preset and options, or another --run-dir"
                    )
                if not resume:
                    raise ValueError(
                        f"the run folder {path} already holds this run: add --resume to go on with it, "
                        "or give another --run-dir"
                    )
            elif resume:
                raise ValueError(f"there is no run to resume in {path}: it has no config.json")
            elif path.is_dir() and any(child.name not in _BEFORE_CONFIG for child in path.iterdir()):
                raise ValueError(
                    f"the run folder {path} is not empty, and no run: it has no config.json. Give another --run-dir"
                )
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{config_path} is damaged: {error}") from None
        except OSError as error:
            raise ValueError(f"the run folder {path} cannot be read: {error}") from None

    def close(self) -> None:
        """Releases the folder to other writers."""
        if self._lock is not None:
            self._lock.release()

    def write_json(self, name: str, content: Any) -> None:
        """Writes a file of the folder atomically."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Writes a file of the folder atomically; only process 0 writes."""
        if jax.process_index() > 0:
            return
        write_whole(self.path / name, content)

    def read_json(self, name: str, default: Any) -> Any:
        """Returns the content of a file of the folder, or `default` if it is missing."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else default


def _by_contents(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config's options, with digests instead of paths if the other config has them too."""
    known = config.get(_CONTENTS, {}).keys() & other.get(_CONTENTS, {}).keys()
    options = {name: value for name, value in config.items() if name != _CONTENTS}
    return options | {name: config[_CONTENTS][name] for name in known}


class MetricsLog:
    """The metrics of all runs of a folder, as `metrics.jsonl` and as TensorBoard events."""

    def __init__(self, folder: RunFolder):
        """Opens or continues the metrics of the folder."""
        self._folder = folder
        self._path = folder.path / "metrics.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """Returns all records, each with `run`, `step` and metrics by name."""
        if not self._path.exists():
            return []
        # A process killed while writing leaves an incomplete line; its checkpoint is older.
        lines = self._path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, run: str, step: int) -> None:
        """Drops a run's reports after `step`: the run continues from there and reports again."""
        if not self._path.exists():
            return
        kept = [r for r in self.records() if r["run"] != run or r["step"] <= step]
        self._folder.write_text(self._path.name, "".join(json.dumps(r) + "\n" for r in kept))

    def writer(self, run: str, step: int) -> "RunWriter":
        """Returns the writer of one run, which continues after `step` (0 for a new run)."""
        self.rewind(run, step)
        return RunWriter(self._path, run, self._folder.path / "tensorboard" / run, step)


class RunWriter:
    """Writes the metrics of one run, as lines of JSON and as events; a context manager.

    We do not use tensorboardX's `SummaryWriter` (2.6.5): its thread dies if the disk is full, and the eleventh event
    after that waits for it forever.
    """

    def __init__(self, path: Path, run: str, events: Path, after: int):
        """Starts an event file; TensorBoard drops earlier events of steps above `after`, if any."""
        self._path, self._run, self._events = path, run, events
        self._writer: RecordWriter | None = None
        if jax.process_index() > 0:  # Only process 0 writes.
            return
        events.mkdir(parents=True, exist_ok=True)
        now = time.time()
        begins = [Event(wall_time=now, file_version="brain.Event:2")]
        if after:
            begins.append(Event(wall_time=now, step=after + 1, session_log=SessionLog(status=SessionLog.START)))
        with naming_file(events):
            self._writer = RecordWriter(str(events / f"events.out.tfevents.{now:.6f}.{platform.node()}"))
            for event in begins:
                self._writer.write(event.SerializeToString())
        self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *unused: object) -> None:
        """Writes remaining events; raises OSError as `write`."""
        if self._writer is not None:
            with naming_file(self._events):
                self._writer.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one record; on failure, raises OSError with the name of a file or folder.

        JSON cannot represent non-finite numbers, so they are stored as strings.
        """
        if self._writer is None:
            return
        values = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        with naming_file(self._path), self._path.open("a") as file:
            file.write(json.dumps({"run": self._run, "step": step, **values}) + "\n")
        with naming_file(self._events):
            for name, value in metrics.items():
                event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._writer.write(event.SerializeToString())
            if time.monotonic() - self._flushed > _FLUSH:
                self._writer.flush()
                self._flushed = time.monotonic()


@contextlib.contextmanager
def numbered_folder(name: str, resume: bool = False, *, given: Path | None = None) -> Iterator[Path]:
    """Creates the next folder `runs/<name>-<number>` for this process; a context manager.

    >>> with numbered_folder("mine") as folder:  # doctest: +SKIP
    ...     (folder / "table.txt").write_text("...")  # What is still empty at the end is removed.

    Args:
      name: the name of the run.
      resume: whether to return the last folder with a run instead of a new one.
      given: a folder named by the user, used as is.

    Raises:
      ValueError: the folder cannot be created.
    """
    if given is not None:
        yield given
        return
    folders = {path.name.removeprefix(f"{name}-"): path for path in _RUNS.glob(f"{name}-*")}
    numbers = {int(suffix): path for suffix, path in folders.items() if suffix.isdigit()}
    if resume:
        last = max((number for number, path in numbers.items() if (path / _CONFIG).exists()), default=1)
        yield numbers.get(last, _folder(name, last))
        return
    number = max(numbers, default=0) + 1
    while True:
        folder = _folder(name, number)
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # Of a run that has started meanwhile.
            number += 1
        except OSError as error:
            raise ValueError(f"the run folder {folder} cannot be written: {error}") from None
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _folder(name: str, number: int) -> Path:
    return _RUNS / f"{name}-{number:03d}"


def check_space(folder: Path, needed: int) -> None:
    """Raises ValueError if the disk lacks space for a run in a folder, which may not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(existing).free
    if needed - there > free:
        raise ValueError(
            f"the disk of {folder} has {free / 2**30:.3g} GiB left, and the checkpoints of this run may need "
            f"{(needed - there) / 2**30:.3g} GiB: free some space, or choose another --run-dir"
        )


def describe_environment() -> dict[str, Any]:
    """Returns the environment of a run: command, date, versions, devices, commit."""
    return {
        "command": _command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "versions": installed_versions(_PACKAGES),
        "commit": _commit(),
    }


def _command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else shlex.quote(sys.argv[0])
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def _commit() -> str | None:
    """Returns the commit of the code, marked if it has changes, or None outside a git checkout."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()
