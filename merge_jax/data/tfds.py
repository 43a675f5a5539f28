"""Sets of TensorFlow Datasets (TFDS), prepared and read without TensorFlow.

TFDS is imported inside functions: it imports more slowly than merge_jax, and few programs need it.
"""

import contextlib
import gzip
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from merge_jax.paths import near_misses

__all__ = [
    "archive_members",
    "check_unpacked",
    "fetch",
    "one_line",
    "open_split",
    "prepare",
    "prepare_from_files",
    "quiet_tfds",
    "root_folder",
]

_FINGERPRINT = "archive.sha256"
# Maximum unpacked bytes of an archive: IMDb needs half, and a small archive may claim more than memory holds.
_LARGEST = 2**30
_RETRIES = 4  # Retries per download; TFDS's ten take over three minutes.


def root_folder(data_dir: Path | str | None) -> Path:
    """Returns `data_dir`, or TFDS's folder if it is None; raises ValueError for an invalid path."""
    from tensorflow_datasets.core import constants

    root = Path(constants.DATA_DIR if data_dir is None else data_dir)
    if "\0" in str(root):
        raise ValueError(f"the folder {str(root)!r} is invalid: a path has no NUL in it")
    return root.expanduser()


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from printing, and from retrying for minutes without a network."""
    from tensorflow_datasets.core.download import downloader

    # TFDS reads this constant whenever it opens a URL, and has no option for it.
    retries, downloader.MAX_RETRIES = downloader.MAX_RETRIES, _RETRIES
    try:
        # It prints advice about TensorFlow, which is not needed, and its output folder; its progress bars stay on
        # stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        downloader.MAX_RETRIES = retries


def prepare(name: str, root: Path, check: Callable[[str, Any], None], *, hint: str = "") -> Any:
    """Returns the builder of any set, prepared in `root` by its official builder.

    Args:
      name: the set's name, with its config if it has several.
      root: the folder of all sets.
      check: raises ValueError for a name and features that do not fit, before anything is downloaded.
      hint: the end of the message for an unknown name.

    Raises:
      ValueError: the set is unknown, does not pass the check, or cannot be downloaded or prepared.
    """
    import tensorflow_datasets as tfds

    builder = _builder(name, root, hint)
    check(name, builder.info.features)
    try:
        # Returns at once if the set exists.
        builder.download_and_prepare(file_format="array_record")
    except ImportError as error:
        raise ValueError(
            f"{name} needs TensorFlow, or another package, to be prepared ({one_line(error)}); prepare it once where"
            f" that is installed, with tfds.builder({name!r}, data_dir=...)"
            f".download_and_prepare(file_format='array_record'), and move the result into {root}"
        ) from error
    except (OSError, tfds.download.DownloadError, AssertionError) as error:
        # TFDS asserts that manually downloaded files exist.
        raise ValueError(f"{name} cannot be downloaded or prepared in {root}: {one_line(error)}") from error
    return builder


def _builder(name: str, root: Path, hint: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=str(root))
    except ImportError as error:
        raise ValueError(f"{name} needs another package ({one_line(error)})") from error
    except (ValueError, AssertionError) as error:
        # Without community sets, whose list may come from the network.
        names = tfds.list_builders(with_community_datasets=False)
        family = re.split("[/:]", name)[0]
        if family in names:
            names = [f"{family}/{config}" for config in tfds.builder_cls(family).builder_configs] or [family]
        raise ValueError(f"unknown data set {name!r}; {near_misses(name, names)}{hint}") from error


def prepare_from_files(builder: Any) -> None:
    """Prepares the set of a builder that gets its `sources` by `fetch`; an existing set is used as is.

    Raises:
      ValueError: a manual file is not the one that the set was prepared from, or an error of the builder.
    """
    prepared = Path(builder.data_dir)
    if prepared.exists():
        # Without a record the set was made by TFDS, which accepts only official files.
        record = prepared / _FINGERPRINT
        official = [builder.url_infos[url].checksum for url in builder.sources]
        known = record.read_text().split() if record.exists() else official
        for url, digest in zip(builder.sources, known, strict=True):
            manual = _manual_file(builder, url)
            if manual.exists() and _fingerprint(manual) != digest:
                raise ValueError(
                    f"{builder.name} in {prepared} was prepared from another archive than {manual}; remove the folder"
                    f" {prepared} to prepare it again, or the archive to use it as it is"
                )
    builder.download_and_prepare(file_format="array_record")


def fetch(builder: Any, dl_manager: Any) -> list[Path]:
    """Returns the file of each address in `builder.sources`.

    It is read from `<data_dir>/downloads/manual/` if it is there, and downloaded otherwise. A record of the files is
    stored beside the set.

    Raises:
      ValueError: a file neither exists there nor can be downloaded.
    """
    files = []
    for url in builder.sources:
        manual = _manual_file(builder, url)
        files.append(manual if manual.exists() else _download(dl_manager, url, manual))
    # Here `data_dir` is a temporary folder, which TFDS renames once all is written: no set lacks its record.
    (Path(builder.data_dir) / _FINGERPRINT).write_text("\n".join(map(_fingerprint, files)))
    return files


def _manual_file(builder: Any, url: str) -> Path:
    return Path(builder.data_dir_root) / "downloads" / "manual" / url.rsplit("/", 1)[1]


def _download(dl_manager: Any, url: str, manual: Path) -> Path:
    try:
        return Path(dl_manager.download(url))
    except Exception as error:  # Of requests, of TFDS, or of the disk.
        raise ValueError(
            f"{url} cannot be downloaded ({one_line(error)}); download it elsewhere and put it at {manual}"
        ) from error


def _fingerprint(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def archive_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None]]:
    """Yields the name of every member of a tar.gz, with the bytes of wanted files and None for others.

    Nothing is written to disk, so members cannot do harm.

    Raises:
      ValueError: the archive is truncated or broken (also detected at the end, by the checksum), or unpacks to more
        than 1 GiB.
    """
    try:
        with gzip.open(archive) as file, tarfile.open(fileobj=cast(Any, _Bounded(file, archive)), mode="r|") as tar:
            for member in tar:
                check_unpacked(archive, member.name, member.size, _LARGEST)
                content = tar.extractfile(member) if member.isreg() and wanted(member.name) else None
                yield member.name, None if content is None else content.read()
            # The checksum follows the last member.
            while file.read(1 << 20):
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ValueError(
            f"the archive {archive} is truncated or broken ({one_line(error)}); replace it with a whole one"
        ) from error


class _Bounded:
    """The unpacked content of a file, up to `_LARGEST` bytes: headers may also claim any size."""

    def __init__(self, file: gzip.GzipFile, archive: Path) -> None:
        self._file, self._archive, self._size = file, archive, 0

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._size += len(content)
        check_unpacked(self._archive, "all of it", self._size, _LARGEST)
        return content


def check_unpacked(archive: Path, what: str, size: int, limit: int) -> None:
    """Raises ValueError if a part of an archive unpacks to more bytes than allowed."""
    if size > limit:
        raise ValueError(f"the archive {archive} unpacks to {size} bytes ({what}), over the limit of {limit}")


def open_split(builder: Any, split: str, **options: Any) -> Any:
    """Returns the examples of a split, by index; options are those of TFDS's `as_data_source`.

    Raises:
      ValueError: the split is empty, or stored in a format that needs TensorFlow.
    """
    try:
        source = builder.as_data_source(split, **options)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.name} lies in {builder.data_dir} as {builder.info.file_format.value}, which cannot be read"
            " without TensorFlow; remove that folder, or prepare the set with file_format='array_record' in another"
            " data_dir"
        ) from error
    if not len(source):
        raise ValueError(f"{builder.name} in {builder.data_dir} has no examples in the split {split!r}")
    return source


def one_line(error: Exception) -> str:
    """Returns the message of an error without its line breaks."""
    return " ".join(str(error).split())
