"""Zip archives of weights: checks of the directory before any member is read."""

import contextlib
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

__all__ = ["member_names", "open_archive"]

_LARGEST_RATIO = 1032  # A deflate stream never unpacks to more than this many times its size.
_ENCRYPTED = 1
_BROKEN = (zipfile.BadZipFile, NotImplementedError, ValueError)  # The last is raised for names that are not text.


def member_names(path: Path, head: bytes) -> list[str]:
    """Returns the names in a zip archive; none if it is not a zip or is broken."""
    if head.startswith(b"PK\3\4"):
        with contextlib.suppress(*_BROKEN, OSError), zipfile.ZipFile(path) as archive:
            return archive.namelist()
    return []


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive of weights.

    Raises:
      ValueError: it is truncated, a member is encrypted, two share a name, or one claims more than it can unpack to.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _BROKEN as error:
        raise ValueError(f"{path} is truncated or no zip: {error}") from None
    with archive:
        counts = Counter(archive.namelist())
        for member in archive.infolist():
            if member.flag_bits & _ENCRYPTED:
                raise ValueError(
                    f"{path} is encrypted ({member.filename!r}): decrypt it, and zip it without a password"
                )
            if counts[member.filename] > 1:
                raise ValueError(f"{path} has the name {member.filename!r} twice")
            if member.file_size > _LARGEST_RATIO * member.compress_size + 100:
                raise ValueError(
                    f"{path} claims {member.file_size} bytes for {member.filename!r}, which it cannot hold"
                )
        yield archive
