"""IMDb film reviews from their archive, as in TFDS, without TensorFlow."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merge_jax.data.tfds import archive_members, fetch, one_line, prepare_from_files

__all__ = ["IMDB", "prepare_imdb"]

IMDB = "imdb_reviews"
"""The name of the set."""

_FILE = re.compile("aclImdb/(?:(?P<split>train|test)/(?P<label>neg|pos)|train/unsup)/")
_NO_LABEL = -1

_Examples = list[tuple[str, dict[str, Any]]]


def prepare_imdb(name: str, root: Path, check: Callable[[str, Any], None]) -> Any:
    """Returns the builder of IMDb, prepared in `root`, if its name and features pass the check.

    Raises:
      ValueError: the archive cannot be downloaded, is broken or has another layout, or differs from the one that the
        set in `root` was prepared from.
    """
    builder = _builder_class()(data_dir=str(root))
    check(name, builder.info.features)
    prepare_from_files(builder)
    return builder


@functools.cache
def _builder_class() -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    official: Any = tfds.builder_cls(IMDB)

    # Keeps the official name, so that TFDS finds the set; TFDS refuses to register a second builder of that name.
    with registered.skip_registration():

        class FromArchive(official):
            """The official builder without its use of TensorFlow: reading its archive."""

            name = official.name
            # TFDS looks for checksums beside a class's code, and accepts any file without them.
            url_infos = official.url_infos
            sources = tuple(official.url_infos)

            def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
                [archive] = fetch(self, dl_manager)
                return _read_archive(archive)

    return FromArchive


def _read_archive(archive: Path) -> dict[str, _Examples]:
    """Returns the examples of each split; omits an empty split of unlabelled texts."""
    # By name, since the later of two members with one name counts in a tar file.
    splits: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "test": {}, "unsupervised": {}}
    missing = [f"aclImdb/{split}/{label}/" for split in ("train", "test") for label in ("neg", "pos")]
    names = []
    for name, content in archive_members(archive, lambda name: _FILE.match(name) is not None):
        names.append(name)
        match = _FILE.match(name)
        if match is None or content is None:
            continue
        try:
            text = content.strip().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{archive}: {name} is not UTF-8 ({one_line(error)})") from error
        split, label = match["split"] or "unsupervised", match["label"] or _NO_LABEL
        splits[split][name] = {"text": text, "label": label}
        missing = [folder for folder in missing if folder != match[0]]
    if missing:
        raise ValueError(f"the archive {archive} has no texts in {missing}, found {names[:20]}")
    return {split: list(examples.items()) for split, examples in splits.items() if examples}
