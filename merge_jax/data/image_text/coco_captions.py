"""Captions of MSCOCO from its official files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from merge_jax.checks import check_at_least_one, check_choice
from merge_jax.data.image_text.image_text_set import CaptionedImages, CaptionSet
from merge_jax.data.image_text.json_files import check_once, columns, files_in, read_json
from merge_jax.data.images.image_files import check_inside, check_unreadable, image_table

__all__ = ["load_coco_captions"]

_CAPTIONS = "annotations/captions_{}.json"
_YEARS = ("2017", "2014")


class _Captions(NamedTuple):
    images: list[str]
    captions: list[str]
    image: np.ndarray


def load_coco_captions(
    folder: Path | str, *, image_size: int, year: str | None = None, unreadable: str = "error"
) -> CaptionSet:
    """Returns the captions of MSCOCO (Chen et al. 2015) from a folder of official files, at least five per image.

    For the splits "train" (training) and "val" (testing), the files are `annotations/captions_<split><year>.json` and
    the images, `<split><year>/<file name>`. The split "val2017" has 5,000 images. The group of an image and its
    captions is the image's row. Images are read on access.

    Args:
      folder: the folder of the files; no link may lead out of it.
      image_size: S; the central square of every image is scaled to S x S pixels (bilinear).
      year: "2017" or "2014", by default the one that exists. Both have the same images, in different splits.
      unreadable: "error" stops at a missing or unreadable image. "skip" reads every image once, and drops unreadable
        ones with their captions.

    Raises:
      ValueError: a file is missing, broken or has another layout; both years exist and none is chosen; an id or a file
        name appears twice; an image has no caption, or a caption has no image or no text; an image is missing or
        unreadable.
    """
    check_at_least_one(image_size=image_size)
    check_unreadable(unreadable)
    splits = [f"{split}{_year(Path(folder), year)}" for split in ("train", "val")]
    root, files = files_in(folder, [_CAPTIONS.format(split) for split in splits])
    for split in splits:
        check_inside(root, root / split)
    # All annotations before the first image, since they are fast to read and most likely wrong.
    read = [_read(file) for file in files]
    train, test = (
        _with_images(root / split, part, image_size, unreadable) for split, part in zip(splits, read, strict=True)
    )
    return CaptionSet("coco_captions", train, test)


def _year(folder: Path, year: str | None) -> str:
    if year is not None:
        check_choice("year", year, _YEARS)
        return year
    found = [year for year in _YEARS if (folder / _CAPTIONS.format(f"train{year}")).exists()]
    if len(found) > 1:
        raise ValueError(f"{folder} has captions of {' and '.join(found)}; give the year")
    return found[0] if found else _YEARS[0]


def _read(file: Path) -> _Captions:
    content = read_json(file)
    images = columns(content, "images", {"id": int, "file_name": str}, file)
    captions = columns(content, "annotations", {"id": int, "image_id": int, "caption": str}, file)
    check_once(images["id"], "image ids", file)
    check_once(images["file_name"], "file names", file)
    check_once(captions["id"], "caption ids", file)
    row_of = {image: row for row, image in enumerate(images["id"])}
    for position, (caption, image) in enumerate(zip(captions["caption"], captions["image_id"], strict=True)):
        if image not in row_of:
            raise ValueError(f"{file}, annotations {position}: there is no image {image}")
        if not caption.strip():
            raise ValueError(f"{file}, annotations {position}: the caption is empty")
    rows = np.array([row_of[image] for image in captions["image_id"]], np.int32)
    bare = np.flatnonzero(np.bincount(rows, minlength=len(row_of)) == 0)
    if len(bare):
        name = images["file_name"][bare[0]]
        raise ValueError(f"{file}: the image {name!r} has no caption ({len(bare)} of {len(row_of)} have none)")
    return _Captions(images["file_name"], [caption.strip() for caption in captions["caption"]], rows)


def _with_images(folder: Path, read: _Captions, image_size: int, unreadable: str) -> CaptionedImages:
    table, rows = image_table(folder, read.images, image_size, unreadable)
    group = rows[read.image]
    kept = np.flatnonzero(group >= 0)
    numbers = np.arange(len(table.files), dtype=np.int32)
    return CaptionedImages(table, numbers, [read.captions[i] for i in kept], group[kept])
