"""Image classification sets of TensorFlow Datasets (TFDS), prepared and read without TensorFlow."""

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from merge_jax.checks import check_at_least_one
from merge_jax.data.arrays import Arrays
from merge_jax.data.images.cifar import CIFAR, prepare_cifar
from merge_jax.data.images.image_files import read_image
from merge_jax.data.images.image_set import ImageSet
from merge_jax.data.tfds import open_split, prepare, quiet_tfds, root_folder

__all__ = ["load_tfds_images"]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def load_tfds_images(
    name: str, data_dir: Path | str | None = None, *, image_size: int | None = None, label: str = "label"
) -> ImageSet:
    """Returns the TFDS image classification set `name`, prepared in `data_dir` at the first call.

    The training split is "train"; the test split is "test", or "validation" if there is none. `data_dir` defaults to
    TFDS's folder, `~/tensorflow_datasets`. Official TFDS reads the prepared set: `tfds.data_source(name)`.

    CIFAR-10 and CIFAR-100 need no TensorFlow: their archive, `cifar-100-binary.tar.gz`, is read from
    `<data_dir>/downloads/manual/` if it is there, and downloaded otherwise. Your own archive may hold fewer images.
    Other sets may need TensorFlow, depending on their TFDS builder.

    With `image_size`, the central square of every image is scaled to that many pixels a side (bilinear). `label` is the
    label feature, such as `coarse_label` of CIFAR-100.

    Raises:
      ValueError: the set is unknown, does not consist of images and labels, cannot be downloaded or prepared, or was
        prepared from another archive than the current one; the archive is broken; images differ in size without
        `image_size`.
    """
    if image_size is not None:
        check_at_least_one(image_size=image_size)
    root = root_folder(data_dir)
    with quiet_tfds():
        if name in CIFAR:
            builder = prepare_cifar(name, root)
            _check_features(name, builder.info.features, label)
        else:
            check = functools.partial(_check_features, label=label)
            builder = prepare(name, root, check, hint=f" (a folder is ./{name})")
    splits = list(builder.info.splits)
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{name} needs a split 'train' and one of 'test' and 'validation', found {splits}")
    classes = tuple(builder.info.features[label].names)
    arrays = {split: _read(builder, split, image_size, label) for split in ("train", test)}
    return ImageSet(name, arrays["train"], arrays[test], classes)


def _read(builder: Any, split: str, image_size: int | None, label: str) -> Arrays:
    import tensorflow_datasets as tfds

    mode = _MODES[builder.info.features["image"].shape[-1]]
    # Decoded here, since TFDS treats palette indices as colours.
    source = open_split(builder, split, decoders={"image": tfds.decode.SkipDecoding()})
    images: np.ndarray | None = None
    labels = np.empty(len(source), np.int32)
    bar = tqdm(range(len(source)), desc=f"reading {builder.name} {split}", unit="image", delay=1, leave=False)
    for index in bar:
        example = source[index]
        pixels = read_image(io.BytesIO(example["image"]), mode, image_size, f"{index} of {builder.name} {split}")
        if images is None:
            images = np.empty((len(source), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"images of {builder.name} {split} must be of one size, but image 0 is {images.shape[1:]} and image"
                f" {index} is {pixels.shape} (height, width, channels); give image_size to scale them"
            )
        images[index] = pixels
        labels[index] = example[label]
    assert images is not None  # No split is empty.
    return {"image": images, "label": labels}


def _check_features(name: str, features: Any, label: str) -> None:
    import tensorflow_datasets as tfds

    expected = {"image": tfds.features.Image, label: tfds.features.ClassLabel}
    found: dict[str, Any] = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    if not all(isinstance(found.get(key), kind) for key, kind in expected.items()):
        types = {key: type(feature).__name__ for key, feature in found.items()}
        raise ValueError(f"{name} needs features 'image', an Image, and {label!r}, a ClassLabel, found {types}")
    image = found["image"]
    if image.np_dtype != np.uint8 or image.shape[-1] not in _MODES:
        raise ValueError(
            f"{name} needs images of uint8 with {sorted(_MODES)} channels, found {np.dtype(image.np_dtype)} of shape"
            f" {image.shape}"
        )
