"""Image classification sets of TensorFlow Datasets (TFDS), prepared and read without TensorFlow.

TFDS is imported inside functions: it takes longer to import than merge_jax does, and few programs need it.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from merge_jax.checks import check_at_least_one
from merge_jax.data.arrays import Arrays
from merge_jax.data.image_set import ImageSet, as_pixels, check_images
from merge_jax.paths import near_misses

__all__ = ["load_tfds_images"]

_CIFAR = ("cifar10", "cifar100")
_CIFAR_PIXELS = 3 * 32 * 32
_FINGERPRINT = "archive.sha256"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def load_tfds_images(name: str, data_dir: Path | str | None = None, *, image_size: int | None = None) -> ImageSet:
    """Returns the image classification set that TFDS calls `name`, prepared in `data_dir` at the first call.

    The split "train" is learnt from; "test", or "validation" where there is none, is tested on. `data_dir` is TFDS's
    own by default, `~/tensorflow_datasets`. Official TFDS reads what is prepared here: `tfds.data_source(name)`.

    CIFAR-10 and CIFAR-100 need no TensorFlow: their archive, `cifar-100-binary.tar.gz`, is read from
    `<data_dir>/downloads/manual/` if it is there, and downloaded otherwise. One's own may hold fewer images. For other
    sets that depends on their TFDS builder.

    With `image_size`, the central square of every image is scaled to that many pixels a side (bilinear).

    Raises:
      ValueError: the set is unknown, is not one of images and labels, cannot be downloaded or prepared, or was prepared
        from another archive than the one that is there now; the archive is broken; images differ in size and there is
        no `image_size`.
    """
    if image_size is not None:
        check_at_least_one(image_size=image_size)
    from tensorflow_datasets.core import constants

    root = Path(constants.DATA_DIR if data_dir is None else data_dir).expanduser()
    with _tamed_tfds():
        builder = _prepared_cifar(name, root) if name in _CIFAR else _prepared(name, root)
    splits = list(builder.info.splits)
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{name} needs a split 'train' and one of 'test' and 'validation', found {splits}")
    classes = tuple(builder.info.features["label"].names)
    arrays = {split: _read(builder, split, image_size) for split in ("train", test)}
    for split, part in arrays.items():
        check_images(f"{name} {split}", part, len(classes))
    return ImageSet(name, arrays["train"], arrays[test], classes)


@contextlib.contextmanager
def _tamed_tfds() -> Iterator[None]:
    from tensorflow_datasets.core.download import downloader

    # It prints advice about TensorFlow, which is not needed, and where it writes; its bars go to stderr and stay. Where
    # there is no network it would try ten times, for over three minutes.
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(downloader, "MAX_RETRIES", 4, create=True),
    ):
        yield


def _read(builder: Any, split: str, image_size: int | None) -> Arrays:
    import tensorflow_datasets as tfds

    mode = _MODES[builder.info.features["image"].shape[-1]]
    try:
        # Decoded here, since TFDS takes the indices of a palette for colours.
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.name} lies in {builder.data_dir} as {builder.info.file_format.value}, which cannot be read"
            " without TensorFlow; remove that folder, or prepare the set with file_format='array_record' in another"
            " data_dir"
        ) from error
    images: np.ndarray | None = None
    labels = np.empty(len(source), np.int32)
    bar = tqdm(range(len(source)), desc=f"reading {builder.name} {split}", unit="image", delay=1, leave=False)
    for index in bar:
        example = source[index]
        with Image.open(io.BytesIO(example["image"])) as image:
            pixels = as_pixels(image, mode, image_size)
        if images is None:
            images = np.empty((len(source), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"images of {builder.name} {split} must be of one size, but image 0 is {images.shape[1:]} and image"
                f" {index} is {pixels.shape} (height, width, channels); give image_size to scale them"
            )
        images[index] = pixels
        labels[index] = example["label"]
    if images is None:
        raise ValueError(f"{builder.name} in {builder.data_dir} has no examples in the split {split!r}")
    return {"image": images, "label": labels}


def _prepared(name: str, root: Path) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=str(root))
        _check_features(name, builder.info.features)
        # Returns at once where the set is there already.
        builder.download_and_prepare(file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        # Without the community's sets, whose list may come from the network.
        names = tfds.list_builders(with_community_datasets=False)
        raise ValueError(f"unknown data set {name!r}; {near_misses(name, names)} (a folder is ./{name})") from error
    except ImportError as error:
        raise ValueError(
            f"{name} needs TensorFlow, or another package, to be prepared ({_one_line(error)}); prepare it once where"
            f" that is installed, with tfds.builder({name!r}, data_dir=...)"
            f".download_and_prepare(file_format='array_record'), and move the result into {root}"
        ) from error
    except (OSError, tfds.download.DownloadError, AssertionError) as error:
        # TFDS asserts that the files are there which one has to download by hand.
        raise ValueError(f"{name} cannot be downloaded or prepared in {root}: {_one_line(error)}") from error
    return builder


def _check_features(name: str, features: Any) -> None:
    import tensorflow_datasets as tfds

    expected = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    found: dict[str, Any] = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    if not all(isinstance(found.get(key), kind) for key, kind in expected.items()):
        types = {key: type(feature).__name__ for key, feature in found.items()}
        raise ValueError(f"{name} needs features 'image', an Image, and 'label', a ClassLabel, found {types}")
    image = found["image"]
    if image.np_dtype != np.uint8 or image.shape[-1] not in _MODES:
        raise ValueError(
            f"{name} needs images of uint8 with {sorted(_MODES)} channels, found {np.dtype(image.np_dtype)} of shape"
            f" {image.shape}"
        )


def _prepared_cifar(name: str, root: Path) -> Any:
    builder = _cifar_builder_class(name)(data_dir=str(root))
    manual = _manual_archive(builder)
    prepared = Path(builder.data_dir)
    if prepared.exists() and manual.exists():
        # Without a record the set is TFDS's own, which takes the official archive alone.
        record = prepared / _FINGERPRINT
        source = record.read_text() if record.exists() else _official_fingerprint(builder)
        if source != _fingerprint(manual):
            raise ValueError(
                f"{name} in {prepared} was prepared from another archive than {manual}; remove the folder {prepared} to"
                " prepare it anew, or the archive to use it as it is"
            )
    builder.download_and_prepare(file_format="array_record")
    return builder


@functools.cache
def _cifar_builder_class(name: str) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    official: Any = tfds.builder_cls(name)

    # Of the same name, so that official TFDS finds the set; it would not let a second builder of that name register.
    with registered.skip_registration():

        class FromArchive(official):
            """The official builder without what it has TensorFlow for: to read files, and to encode images."""

            name = official.name

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
                layout, manual = self._cifar_info, _manual_archive(self)
                archive = manual if manual.exists() else _download(dl_manager, layout.url, manual)
                num_classes = {key: self.info.features[key].num_classes for key in layout.label_keys}
                names, train, test = _read_archive(archive, layout, num_classes)
                for key in layout.label_keys:
                    self.info.features[key].names = names[key]
                # `data_dir` is a temporary one here, which TFDS renames once all is written: no set lacks its record.
                (Path(self.data_dir) / _FINGERPRINT).write_text(_fingerprint(archive))
                return {
                    "train": self._generate_examples("train_", train),
                    "test": self._generate_examples("test_", test),
                }

            def _generate_examples(self, prefix: str, records: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
                keys = self._cifar_info.label_keys
                for index, record in enumerate(records):
                    labels = {key: int(label) for key, label in zip(keys, record[: len(keys)], strict=True)}
                    yield index, {"id": f"{prefix}{index:05d}", "image": _as_png(record[len(keys) :]), **labels}

    return FromArchive


def _manual_archive(builder: Any) -> Path:
    archive = builder._cifar_info.url.rsplit("/", 1)[1]
    return Path(builder.data_dir_root) / "downloads" / "manual" / archive


def _download(dl_manager: Any, url: str, manual: Path) -> Path:
    try:
        return Path(dl_manager.download(url))
    except Exception as error:  # Of requests, of TFDS, or of the disk.
        raise ValueError(
            f"{url} cannot be downloaded ({_one_line(error)}); download it elsewhere and put it at {manual}"
        ) from error


def _read_archive(
    archive: Path, layout: Any, num_classes: dict[str, int]
) -> tuple[dict[str, list[str]], np.ndarray, np.ndarray]:
    """Returns the class names of each kind of label, and the records of train and of test."""
    files = (*layout.label_files, *layout.train_files, *layout.test_files)
    contents = _read_members(archive, [layout.prefix + file for file in files])
    names: dict[str, list[str]] = {}
    for key, file in zip(layout.label_keys, layout.label_files, strict=True):
        text = contents[layout.prefix + file].decode(errors="replace")
        names[key] = [line for line in text.splitlines() if line]
        found = len(set(names[key]))
        if not found == len(names[key]) == num_classes[key]:
            raise ValueError(f"{archive}: {file} must name {num_classes[key]} different classes, found {found}")
    train, test = (
        np.concatenate([_records(archive, file, contents[layout.prefix + file], num_classes) for file in files])
        for files in (layout.train_files, layout.test_files)
    )
    return names, train, test


def _read_members(archive: Path, members: Collection[str]) -> dict[str, bytes]:
    """Returns the bytes of members by name; nothing is written to the disk, so other members can do nothing."""
    contents: dict[str, bytes] = {}
    names: list[str] = []
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                names.append(member.name)
                file = tar.extractfile(member) if member.name in members and member.isreg() else None
                if file is not None:
                    contents[member.name] = file.read()
            # The checksum is at the end of the file, behind the last member.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ValueError(
            f"the archive {archive} is truncated or broken ({_one_line(error)}); replace it with a whole one"
        ) from error
    missing = [member for member in members if member not in contents]
    if missing:
        raise ValueError(f"the archive {archive} lacks {missing}: expected {list(members)}, found {names[:20]}")
    return contents


def _records(archive: Path, file: str, content: bytes, num_classes: dict[str, int]) -> np.ndarray:
    """Returns uint8 `[N, labels + pixels]`, with the labels in the order of `num_classes`, and below it."""
    length = len(num_classes) + _CIFAR_PIXELS
    if not content or len(content) % length:
        raise ValueError(
            f"{archive}: {file} must hold records of {length} bytes, found {len(content)} bytes, which are"
            f" {len(content) // length} records and {len(content) % length} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    for column, (key, limit) in enumerate(num_classes.items()):
        wrong = np.flatnonzero(records[:, column] >= limit)
        if len(wrong):
            value = records[wrong[0], column]
            raise ValueError(f"{archive}: {key} in {file} must lie in [0, {limit}), found {value} in record {wrong[0]}")
    return records


def _as_png(pixels: np.ndarray) -> io.BytesIO:
    png = io.BytesIO()
    Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(png, "PNG")
    png.seek(0)
    return png


def _fingerprint(archive: Path) -> str:
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _official_fingerprint(builder: Any) -> str:
    from tensorflow_datasets.core.download import checksums

    return checksums.get_all_url_infos()[builder._cifar_info.url].checksum


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
