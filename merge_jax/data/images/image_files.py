"""Image files, read on access, and checks of the files that annotations name."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from merge_jax.checks import check_at_least_one, check_choice
from merge_jax.data.images.image_set import as_pixels
from merge_jax.paths import near_misses

__all__ = [
    "BAR",
    "ImageFiles",
    "check_image_files",
    "check_inside",
    "check_unreadable",
    "image_table",
    "open_image",
    "read_image",
    "read_rows",
]

BAR: dict[str, Any] = {"unit": "image", "delay": 1, "leave": False}
"""Options of a bar, shown only where the work takes more than a second."""

# Pillow goes by a file's content, and reads many more formats, some with external programs.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
# Pillow would clip these deeper pixels to 255.
_DEEP_MODES = ("I", "F")
# Pillow decodes without the GIL. More threads would wait for the disk, or hold too many large images.
_THREADS = 8
_FILES_A_TASK = 64
# Comparing a name with those of a whole set would take seconds.
_NEIGHBOURS = 1000


@dataclass(frozen=True)
class ImageFiles:
    """A `Table` of images in files, none in memory: the central square of each, scaled (bilinear).

    Attributes:
      files: M files, in PNG, JPEG, BMP or WEBP.
      image_size: S, pixels per side.
    """

    files: Sequence[Path]
    image_size: int

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid size."""
        check_at_least_one(image_size=self.image_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(M, S, S, 3)`."""
        return (len(self.files), self.image_size, self.image_size, 3)

    @property
    def dtype(self) -> Any:
        """Of every image: uint8."""
        return np.dtype(np.uint8)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Reads the images of rows `[n]` in threads, and returns them as RGB `[n, S, S, 3]`.

        Raises:
          ValueError: a file can no longer be read, or not completely.
        """
        return read_rows(self.shape, rows, lambda row: read_image(self.files[row], "RGB", self.image_size))


def read_rows(shape: tuple[int, ...], rows: Any, read: Callable[[int], np.ndarray]) -> np.ndarray:
    """Returns uint8 `[n, ...]`, rows `[n]` of `shape` `[M, ...]`; reads repeated rows once, in threads."""
    rows = np.arange(shape[0])[rows]
    once, places = np.unique(rows, return_inverse=True)
    images = np.empty((len(once), *shape[1:]), np.uint8)
    with ThreadPoolExecutor(_THREADS) as pool:
        for place, image in enumerate(pool.map(read, once.tolist())):
            images[place] = image
    return images[places.reshape(rows.shape)]


def read_image(file: Path | IO[bytes], mode: str, image_size: int | None, name: object = None) -> np.ndarray:
    """Returns uint8 `[H, W, C]` in a mode of Pillow ("L", "RGB"); with a size, the central square scaled to it.

    Raises:
      ValueError: as `open_image`, or the file is truncated or broken.
    """
    with open_image(file, name) as image:
        try:
            return as_pixels(image, mode, image_size)
        except Exception as error:  # Pillow raises various types for unreadable files.
            raise _unreadable(name or file, error) from error


def open_image(file: Path | IO[bytes], name: object = None) -> Image.Image:
    """Opens an image, reading only its header; `name` identifies it in errors, by default its path.

    Raises:
      ValueError: the file is missing or not an image, has more than 8 bits per channel, or claims more pixels than
        Pillow's limit, `PIL.Image.MAX_IMAGE_PIXELS`: a small file may decode to more than memory holds.
    """
    name = name or file
    try:
        image = Image.open(file, formats=_FORMATS)
    except Exception as error:  # As above.
        raise _unreadable(name, error) from error
    # Up to twice the limit, Pillow only warns.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        image.close()
        raise _unreadable(name, f"it claims {image.width}x{image.height} pixels, over the limit of {limit}")
    if image.mode.startswith(_DEEP_MODES):
        image.close()
        raise ValueError(f"the image {name} has pixels of mode {image.mode!r}, expected 8 bits a channel")
    return image


def check_inside(root: Path, path: Path) -> None:
    """Raises ValueError if links lead from `path` out of the resolved folder `root`."""
    # Unlike Path.resolve, this does not raise for circular links, which lead nowhere.
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(root):
        raise ValueError(f"{path} leads to {target}, outside of {root}; move what it links to into the folder")


def check_unreadable(unreadable: str) -> None:
    """Raises ValueError for an invalid `unreadable` option; call it before reading annotations."""
    check_choice("way with unreadable images", unreadable, ("error", "skip"))


def check_image_files(
    root: Path | str, names: Sequence[str], unreadable: str = "error"
) -> tuple[list[Path], np.ndarray]:
    """Returns the N files with these names in the folder `root`, and whether each is usable, bool `[N]`.

    Args:
      root: the folder.
      names: relative paths, as in an annotation file.
      unreadable: "error" opens every file's header, and raises an error for missing or unreadable images. "skip"
        decodes every file once, since only that detects damage, and drops bad files; it counts and names them on
        standard error.

    Raises:
      ValueError: the folder is missing; a name is not a relative path, or leads out of the folder; with "error", a file
        is missing or not an image; with "skip", all are.
    """
    check_unreadable(unreadable)
    if not Path(root).is_dir():
        raise ValueError(f"the folder {root} is missing; images are looked for there")
    root = Path(root).resolve()
    files = _files(root, names)
    in_full = unreadable == "skip"
    problems = _problems(files, in_full)
    usable = np.array([problem is None for problem in problems], bool)
    bad = [(file, problem) for file, problem in zip(files, problems, strict=True) if problem is not None]
    if bad and not in_full:
        file, problem = bad[0]
        raise ValueError(
            f"{problem}{_hint(file)} ({len(bad)} of {len(files)} images cannot be used; unreadable='skip' leaves such"
            " images out)"
        )
    if bad:
        shown = "; ".join(problem for _, problem in bad[:3]) + ("; ..." if len(bad) > 3 else "")
        if len(bad) == len(files):
            raise ValueError(f"{root}: none of {len(files)} images can be used: {shown}")
        print(f"{root}: left out {len(bad)} of {len(files)} images: {shown}", file=sys.stderr)
    return files, usable


def image_table(
    root: Path | str, names: Sequence[str], image_size: int, unreadable: str = "error"
) -> tuple[ImageFiles, np.ndarray]:
    """Returns the images of names `[N]`, each once, and the row of each name, `[N]`, int32, -1 if dropped.

    Raises:
      ValueError: as `check_image_files`.
    """
    distinct = list(dict.fromkeys(names))
    files, usable = check_image_files(root, distinct, unreadable)
    row = np.where(usable, np.cumsum(usable) - 1, -1).tolist()
    row_of = dict(zip(distinct, row, strict=True))
    kept = [file for file, use in zip(files, usable, strict=True) if use]
    return ImageFiles(kept, image_size), np.array([row_of[name] for name in names], np.int32)


def _files(root: Path, names: Iterable[str]) -> list[Path]:
    files, folders = [], set()
    for name in names:
        path = PurePath(name)
        if not name.isprintable() or not path.parts or path.anchor or ".." in path.parts:
            raise ValueError(f"the image {name!r} must be named by a path relative to {root}, which stays inside")
        file = root / path
        # Only a link can leave a folder that is inside; to resolve every file would take longer than to read it.
        if file.parent not in folders:
            check_inside(root, file.parent)
            folders.add(file.parent)
        if os.path.islink(file):
            check_inside(root, file)
        files.append(file)
    return files


def _problems(files: list[Path], in_full: bool) -> list[str | None]:
    """Returns the problem of each file, or None."""
    tasks = [files[start : start + _FILES_A_TASK] for start in range(0, len(files), _FILES_A_TASK)]
    problems: list[str | None] = []
    desc = "reading every image" if in_full else "looking at images"
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(files), desc=desc, **BAR) as bar:
        for found in pool.map(lambda task: [_problem(file, in_full) for file in task], tasks):
            problems += found
            bar.update(len(found))
    return problems


def _problem(file: Path, in_full: bool) -> str | None:
    # Not Path.is_file, which raises for names that the file system rejects.
    if not os.path.isfile(file):
        return f"the image {file} is {'not a file' if os.path.lexists(file) else 'missing'}"
    try:
        if in_full:
            read_image(file, "RGB", None)
        else:
            open_image(file).close()
    except ValueError as error:
        return str(error)
    return None


def _hint(file: Path) -> str:
    """Returns what a missing file's name may have meant."""
    if os.path.lexists(file):
        return ""
    if not file.parent.is_dir():
        return f": there is no folder {file.parent}"
    with os.scandir(file.parent) as entries:
        names = sorted(entry.name for entry, _ in zip(entries, range(_NEIGHBOURS), strict=False))
    return f"; {near_misses(file.name, names)}"


def _unreadable(name: object, error: object) -> ValueError:
    return ValueError(f"the image {name} cannot be read: {error}")
