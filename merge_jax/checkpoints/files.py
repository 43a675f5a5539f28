"""Small files, written whole, and errors that name them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["naming_file", "write_whole"]


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Gives an OSError that names no file the name of one: a write says that no space is left, and not where."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, content: str) -> None:
    """Writes a file that no reader sees in parts, whenever this process is killed; raises OSError that names a file."""
    part = path.with_name(f"{path.name}.part")
    with naming_file(part):
        part.write_text(content)
    os.replace(part, path)
