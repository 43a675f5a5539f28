"""CIFAR-10 and CIFAR-100 from their binary archives, as in TFDS, without TensorFlow."""

import functools
import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from merge_jax.data.tfds import archive_members, fetch, prepare_from_files

__all__ = ["CIFAR", "prepare_cifar"]

CIFAR = ("cifar10", "cifar100")
"""The names of the sets."""

_PIXELS = 3 * 32 * 32


def prepare_cifar(name: str, root: Path) -> Any:
    """Returns the builder of one of `CIFAR`, prepared in `root`.

    Raises:
      ValueError: the archive cannot be downloaded, is broken or has another layout, or differs from the one that the
        set in `root` was prepared from.
    """
    builder = _builder_class(name)(data_dir=str(root))
    prepare_from_files(builder)
    return builder


@functools.cache
def _builder_class(name: str) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    official: Any = tfds.builder_cls(name)

    # Keeps the official name, so that TFDS finds the set; TFDS refuses to register a second builder of that name.
    with registered.skip_registration():

        class FromArchive(official):
            """The official builder without its uses of TensorFlow: reading files and encoding images."""

            name = official.name
            # TFDS looks for checksums beside a class's code, and accepts any file without them.
            url_infos = official.url_infos

            @property
            def sources(self) -> list[str]:
                return [self._cifar_info.url]

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
                layout = self._cifar_info
                [archive] = fetch(self, dl_manager)
                num_classes = {key: self.info.features[key].num_classes for key in layout.label_keys}
                names, train, test = _read_archive(archive, layout, num_classes)
                for key in layout.label_keys:
                    self.info.features[key].names = names[key]
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


def _read_archive(
    archive: Path, layout: Any, num_classes: dict[str, int]
) -> tuple[dict[str, list[str]], np.ndarray, np.ndarray]:
    """Returns the class names of each kind of label, and the train and test records."""
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
    found = dict(archive_members(archive, lambda name: name in members))
    contents = {name: content for name, content in found.items() if content is not None}
    missing = [member for member in members if member not in contents]
    if missing:
        raise ValueError(f"the archive {archive} lacks {missing}: expected {list(members)}, found {list(found)[:20]}")
    return contents


def _records(archive: Path, file: str, content: bytes, num_classes: dict[str, int]) -> np.ndarray:
    """Returns uint8 `[N, labels + pixels]`, with the labels in the order of `num_classes`, and below it."""
    length = len(num_classes) + _PIXELS
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
