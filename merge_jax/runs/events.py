"""Scalars for TensorBoard, in its files of events."""

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from merge_jax.checkpoints.files import naming_file

__all__ = ["ScalarEvents"]

_FLUSH = 10.0  # Seconds that what is written may wait in memory.


class ScalarEvents:
    """One file of events, written by whoever calls.

    Not by tensorboardX's own `SummaryWriter` (2.6.5): its thread dies where the disk is full, and the eleventh event
    after that waits for it for ever.
    """

    def __init__(self, folder: Path, after: int):
        """Begins a file in a folder; TensorBoard forgets what earlier ones hold of steps above `after`, if any."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, now = folder, time.time()
        with naming_file(folder):
            self._writer = RecordWriter(str(folder / f"events.out.tfevents.{now:.6f}.{platform.node()}"))
            self._write(Event(wall_time=now, file_version="brain.Event:2"))
            if after:
                self._write(Event(wall_time=now, step=after + 1, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of a step by name; raises OSError, with the folder's name, where that fails."""
        with naming_file(self._folder):
            for name, value in values.items():
                self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            if time.monotonic() - self._flushed > _FLUSH:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes out what is left; raises OSError as `write`."""
        with naming_file(self._folder):
            self._writer.close()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
