"""Scalars for TensorBoard, in its files of events."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar

from merge_jax.checkpoints.errors import naming_file

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
        self._folder = folder
        with naming_file(folder):
            self._writer = EventsWriter(str(folder / "events"))
            if after:
                start = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(step=after + 1, wall_time=time.time(), session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of a step by name; raises OSError, with the folder's name, where that fails."""
        with naming_file(self._folder):
            for name, value in values.items():
                event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
                self._writer.write_event(event)
            if time.monotonic() - self._flushed > _FLUSH:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes out what is left; raises OSError as `write`."""
        with naming_file(self._folder):
            self._writer.close()
