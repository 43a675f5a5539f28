"""What a format of weights is, and what an opened file of one gives."""

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
      paths: of the leaves, in the order of the file.
      shapes: `paths -> shape and dtype by path`; reads no numbers.
      read: `paths -> arrays by path`.
      specs: how leaves are matrices, where the file itself tells: by a graph's operations or by the classes of layers.
      model: the model's leaves, where the file may hold a whole training state: names, each with its path in the file.
      names_tell: whether the other leaves' names say how they are matrices; those of a graph's tensors do not.
    """

    paths: Sequence[str]
    shapes: Callable[[Sequence[str]], Mapping[str, jax.ShapeDtypeStruct]]
    read: Callable[[Sequence[str]], Mapping[str, np.ndarray]]
    specs: Mapping[str, MatrixSpec] = field(default_factory=dict)
    model: Mapping[str, str] | None = None
    names_tell: bool = True


@dataclass(frozen=True)
class Format:
    """A format of weights.

    Attributes:
      name: as users know it.
      detect: `(path, first bytes) -> whether it is of this format`; the bytes of a folder are empty.
      open: `path -> what is in it`; raises ValueError for what is broken.
    """

    name: str
    detect: Callable[[Path, bytes], bool]
    open: Callable[[Path], Stored]


def needing(file: Path, library: str, extra: str) -> ImportError:
    """Returns the error for a file whose library is not installed."""
    return ImportError(f"{file} is read by {library}, which is not installed: pip install 'merge_jax[{extra}]'")


@contextlib.contextmanager
def reading(file: Path, what: str) -> Iterator[None]:
    """Raises ValueError for whatever a library raises that reads a broken file; our own ValueErrors name the file."""
    try:
        yield
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # Of many kinds.
        if str(file) in str(error) and isinstance(error, ValueError):
            raise
        line = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise ValueError(f"{file} is truncated or no {what}: {line}") from None
