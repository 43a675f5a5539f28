"""SQuAD from its JSON files, as in TFDS, downloaded or local."""

import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merge_jax.data.tfds import fetch, one_line, prepare_from_files

__all__ = ["SQUAD", "prepare_squad"]

SQUAD = {"squad": "v1.1", "squad/v1.1": "v1.1", "squad/v2.0": "v2.0"}
"""The configs by the names of the set."""

_Examples = list[tuple[str, dict[str, Any]]]


def prepare_squad(name: str, root: Path, check: Callable[[str, Any], None]) -> Any:
    """Returns the builder of one of `SQUAD`, prepared in `root`, if its name and features pass the check.

    Raises:
      ValueError: a file cannot be downloaded, is broken or has another layout, or differs from the one that the set in
        `root` was prepared from.
    """
    builder = _builder_class()(data_dir=str(root), config=SQUAD[name])
    check(name, builder.info.features)
    prepare_from_files(builder)
    return builder


@functools.cache
def _builder_class() -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    official: Any = tfds.builder_cls("squad")

    # Keeps the official name, so that TFDS finds the set; TFDS refuses to register a second builder of that name.
    with registered.skip_registration():

        class FromFiles(official):
            """The official builder, which also accepts local files."""

            name = official.name
            # TFDS looks for checksums beside a class's code, and accepts any file without them.
            url_infos = official.url_infos

            @property
            def sources(self) -> list[str]:
                files = (self.builder_config.train_file, self.builder_config.dev_file)
                return [url for file in files for url in official.url_infos if url.endswith(f"/{file}")]

            def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
                train, dev = (self._read(file) for file in fetch(self, dl_manager))
                return {"train": train, "validation": dev}

            def _read(self, file: Path) -> _Examples:
                try:
                    examples = list(self._generate_examples(file))
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{file} is truncated or no file of SQuAD {self.builder_config.name}"
                        f" ({type(error).__name__}: {one_line(error)}); replace it with a whole one"
                    ) from error
                if not examples:
                    raise ValueError(f"{file} has no questions")
                twice = [id_ for id_, count in collections.Counter(id_ for id_, _ in examples).items() if count > 1]
                if twice:
                    raise ValueError(f"{file} has {len(twice)} ids that appear twice, such as {twice[0]!r}")
                return examples

    return FromFiles
