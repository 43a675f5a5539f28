"""A set of labelled images in memory, its checks and its statistics."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from merge_jax.data.arrays import Arrays
from merge_jax.data.labels import check_labels
from merge_jax.paths import near_misses

__all__ = ["ImageSet", "as_pixels", "channel_statistics", "check_images"]


@dataclass(frozen=True)
class ImageSet:
    """Labelled training and test images, each `{"image": uint8 [N, H, W, C], "label": int32 [N]}`."""

    name: str
    train: Arrays
    test: Arrays
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises ValueError as `check_images`: an index out of range would be clipped or NaN in a compiled loss."""
        for split in ("train", "test"):
            check_images(f"{self.name} {split}", getattr(self, split), self.num_classes)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)


def check_images(name: str, arrays: Arrays, num_classes: int) -> None:
    """Checks images `[N, H, W, C]`, of uint8 or a float type, and their labels `[N]`, integers in [0, num_classes).

    Raises:
      ValueError: there are no examples, or an entry is missing, has another shape or type, a label out of range or a
        non-finite pixel; the message names the data set `name` and the first offending value.
    """
    for entry in ("image", "label"):
        if entry not in arrays:
            raise ValueError(f"{name}: entry {entry!r} is missing; {near_misses(entry, arrays)}")
    images, labels = np.asarray(arrays["image"]), np.asarray(arrays["label"])
    if images.ndim != 4:
        raise ValueError(f"{name}: images must be [N, H, W, C], got shape {images.shape}")
    if len(images) == 0:
        raise ValueError(f"{name}: there are no examples, image has shape {images.shape}")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name}: images must be uint8 or of a float type, got {images.dtype}")
    check_labels(name, labels, len(images), num_classes, noun="images")
    if images.dtype != np.uint8:
        finite = np.isfinite(images)
        if not finite.all():
            index = tuple(int(i) for i in np.unravel_index(np.argmin(finite), images.shape))
            count = images.size - np.count_nonzero(finite)
            raise ValueError(f"{name}: pixels must be finite, got {images[index]} at {index} ({count} are not finite)")


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel of uint8 `[N, H, W, C]`, with pixels scaled to [0, 1].

    Raises:
      ValueError: the images are not uint8 of rank 4, or there is no pixel.
    """
    _check_uint8("channel statistics", images)
    if images.size == 0:
        raise ValueError(f"channel statistics need pixels, got shape {images.shape}")
    # Integer sums are exact and need no float copy of the images, which would be eight times as large.
    sums = np.einsum("nhwc->c", images, dtype=np.uint64, casting="safe").tolist()
    squares = np.einsum("nhwc,nhwc->c", images, images, dtype=np.uint64, casting="safe").tolist()
    count = math.prod(images.shape[:3])
    mean = tuple(total / (255 * count) for total in sums)
    std = tuple(
        math.sqrt(count * square - total**2) / (255 * count) for total, square in zip(sums, squares, strict=True)
    )
    return mean, std


def as_pixels(image: Image.Image, mode: str, image_size: int | None) -> np.ndarray:
    """Returns uint8 `[H, W, C]` in a mode of Pillow ("L", "RGB"); with a size, the central square scaled to it."""
    image = image.convert(mode)
    if image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _check_uint8(what: str, images: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"{what}: images must be uint8 [N, H, W, C], got {images.dtype} of shape {images.shape}")
