"""Images from your own folder."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from merge_jax.checks import check_at_least_one
from merge_jax.data.arrays import Arrays
from merge_jax.data.images.image_files import BAR, check_inside, open_image, read_image
from merge_jax.data.images.image_set import ImageSet
from merge_jax.paths import natural_order

__all__ = ["load_image_folder"]

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})


class _Header(NamedTuple):
    path: Path
    label: int
    size: tuple[int, int]
    mode: str


def load_image_folder(path: Path | str, *, image_size: int | None = None) -> ImageSet:
    """Returns the images of `<path>/train/<class>/*` and `<path>/test/<class>/*`; classes are in natural order.

    Files that end in png, jpg, jpeg, bmp or webp, in either case, are images; other files and hidden files are ignored.
    Images are RGB, with C = 3, unless all are 8-bit grey, with C = 1. With `image_size`, the central square of every
    image is scaled to that many pixels a side (bilinear).

    Raises:
      ValueError: a folder is missing or a class has no image; train and test have different classes; a file cannot be
        read, has more than 8 bits per channel, or lies outside `path` behind a link; images differ in size without
        `image_size`.
    """
    if image_size is not None:
        check_at_least_one(image_size=image_size)
    try:
        root = Path(path).resolve()
    except (ValueError, OSError) as error:  # A path with a NUL, or a name that is too long.
        raise ValueError(f"the folder {str(path)!r} cannot be opened: {error}") from None
    train_folders, test_folders = (_class_folders(root, split) for split in ("train", "test"))
    classes = tuple(train_folders)
    if set(classes) != set(test_folders):
        missing = sorted(set(classes) - set(test_folders), key=natural_order)
        added = sorted(set(test_folders) - set(classes), key=natural_order)
        raise ValueError(
            f"{root} must have the same classes in train and test: only in train {missing}, only in test {added}"
        )
    train, test = (
        _headers([(file, label) for label, name in enumerate(classes) for file in _image_files(root, folders[name])])
        for folders in (train_folders, test_folders)
    )
    headers = [*train, *test]
    if image_size is None:
        first = headers[0]
        other = next((header for header in headers if header.size != first.size), first)
        if other.size != first.size:
            raise ValueError(
                f"images must be of one size, but {first.path} is {_text(first.size)} and {other.path} is"
                f" {_text(other.size)} (width x height); give image_size to scale them"
            )
    mode = "L" if all(header.mode == "L" for header in headers) else "RGB"
    arrays = {split: _read(part, mode, image_size) for split, part in (("train", train), ("test", test))}
    return ImageSet(root.name, arrays["train"], arrays["test"], classes)


def _class_folders(root: Path, split: str) -> dict[str, Path]:
    folder = root / split
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} is missing; images are looked for in {folder}/<class>/")
    check_inside(root, folder)
    folders = {child.name: child for child in _children(folder) if child.is_dir()}
    if not folders:
        raise ValueError(f"{folder} has no class folders; images are looked for in {folder}/<class>/")
    return folders


def _image_files(root: Path, folder: Path) -> list[Path]:
    check_inside(root, folder)
    files = [child for child in _children(folder) if child.suffix.lower() in _SUFFIXES]
    if not files:
        raise ValueError(f"the class folder {folder} has no image; names must end in {', '.join(sorted(_SUFFIXES))}")
    for file in files:
        # Only a link can leave an inner folder; resolving every file would take longer than reading it.
        if file.is_symlink():
            check_inside(root, file)
        if not file.is_file():
            raise ValueError(f"{file} is not a file")
    return files


def _children(folder: Path) -> list[Path]:
    children = (child for child in folder.iterdir() if not child.name.startswith("."))
    return sorted(children, key=lambda child: natural_order(child.name))


def _headers(files: list[tuple[Path, int]]) -> list[_Header]:
    headers = []
    for file, label in tqdm(files, desc="looking at images", **BAR):
        with open_image(file) as image:
            headers.append(_Header(file, label, image.size, image.mode))
    return headers


def _read(headers: list[_Header], mode: str, image_size: int | None) -> Arrays:
    images: np.ndarray | None = None
    for index, header in enumerate(tqdm(headers, desc="reading images", **BAR)):
        pixels = read_image(header.path, mode, image_size)
        if images is None:
            images = np.empty((len(headers), *pixels.shape), np.uint8)
        images[index] = pixels
    assert images is not None  # No class is empty.
    return {"image": images, "label": np.array([header.label for header in headers], np.int32)}


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
