"""Small files, written atomically, and errors that name them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["naming_file", "write_whole"]


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Adds a file name to an OSError without one: a failed write reports no space left, but not where."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, content: str) -> None:
    """Writes a file atomically, even if this process is killed; raises OSError that names the file."""
    part = path.with_name(f"{path.name}.part")
    with naming_file(part):
        part.write_text(content)
    os.replace(part, path)
