"""The interface of weight formats and of opened weight files."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from merge_jax.layouts import MatrixSpec

__all__ = ["HEAD", "Format", "Stored", "needing", "reading"]

HEAD = 4096
"""First bytes of a file, which say its format."""


@dataclass(frozen=True)
class Stored:
    """The leaves of an opened file.

    Attributes:
      paths: the leaves' paths, in file order.
      shapes: `paths -> shape and dtype by path`; reads no numbers.
      read: `paths -> arrays by path`.
      specs: the leaves' matrix specs, if the file states them by a graph's operations or layer classes.
      model: the model's leaves, if the file may hold a whole training state: names, each with its path in the file.
      names_tell: whether the other leaves' names determine their specs; the names of a graph's tensors do not.
      tensors: names of the leaves' tensors in the file, if tied leaves may share one.
    """

    paths: Sequence[str]
    shapes: Callable[[Sequence[str]], Mapping[str, jax.ShapeDtypeStruct]]
    read: Callable[[Sequence[str]], Mapping[str, np.ndarray]]
    specs: Mapping[str, MatrixSpec] = field(default_factory=dict)
    model: Mapping[str, str] | None = None
    names_tell: bool = True
    tensors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A weight format.

    Attributes:
      name: its common name.
      detect: `(path, first bytes) -> whether it has this format`; a folder's bytes are empty.
      open: `path -> its leaves`; raises ValueError for a broken file.
    """

    name: str
    detect: Callable[[Path, bytes], bool]
    open: Callable[[Path], Stored]


def needing(file: Path, library: str, extra: str) -> ImportError:
    """Returns the error for a file whose library is not installed."""
    return ImportError(f"{file} is read by {library}, which is not installed: pip install 'merge_jax[{extra}]'")


@contextlib.contextmanager
def reading(file: Path, what: str) -> Iterator[None]:
    """Turns a library's errors on a broken file into ValueError; our own ValueErrors name the file."""
    try:
        yield
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # Many types.
        if str(file) in str(error) and isinstance(error, ValueError):
            raise
        line = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise ValueError(f"{file} is truncated or no {what}: {line}") from None
