"""A folder lock: one process at a time writes into the folder.

We do not use the library filelock: its lock does not name its holder and cannot be queried. Here a second writer is
refused with the process and host of the first, and a reader queries without blocking a writer or creating a file.
"""

import fcntl
import json
import os
import platform
import time
import weakref
from pathlib import Path

from merge_jax.checkpoints.files import naming_file

__all__ = ["LOCK", "FolderLock", "is_locked"]

LOCK = "run.lock"
"""Name of the file."""

_WRITTEN = 1.0  # Seconds within which a lock's holder writes down its identity.


class FolderLock:
    """Keeps a second writer out of a folder until it is released or its process ends in any way.

    The operating system holds the lock, not the file, so a file left by a killed process is taken over.
    """

    def __init__(self, folder: Path, name: str = LOCK):
        """Acquires the lock of an existing folder.

        Raises:
          ValueError: another process holds it; the message names its process and host.
          OSError: the folder is not writable.
        """
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        # Closing it releases the lock, at the latest with the object.
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(descriptor)
            self._close()
            raise ValueError(
                f"another run is writing into {folder} ({holder}): wait for it, or give another folder"
            ) from None
        try:
            with naming_file(folder / name):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
        except OSError:
            self._close()
            raise

    def release(self) -> None:
        """Releases the lock; a second call does nothing."""
        self._close()


def is_locked(folder: Path) -> bool:
    """Returns whether a process holds the lock of a folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _read_holder(descriptor: int) -> str:
    """Returns the holder of a lock; waits a moment for a new holder to write down its identity."""
    until = time.monotonic() + _WRITTEN
    while True:
        try:
            holder = json.loads(os.pread(descriptor, 1024, 0))
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            if time.monotonic() > until:
                return "an unknown process"
        time.sleep(0.01)
