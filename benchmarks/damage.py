"""Kinds of damage to the newest of steps 1, 2 and 3 saved by `Checkpoints`; the tests use them too."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["DAMAGE", "Damage", "array_file", "flip"]


class Damage(NamedTuple):
    """One kind of damage.

    Attributes:
      spoil: does it to the folder of step 3.
      reason: what the warning has to say of the step that is damaged, a regular expression; None where there is none,
        since nothing that was saved has suffered.
      restored: the step that is to come back.
    """

    spoil: Callable[[Path], Any]
    reason: str | None
    restored: int = 2


def array_file(step_folder: Path) -> Path:
    """Returns the file with the numbers of most leaves."""
    return max((path for path in step_folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    """Flips one bit, in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _rewrite_manifest(step_folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = step_folder / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    change(metadata["custom_metadata"])
    path.write_text(json.dumps(metadata))


def _drop_a_digest(metadata: dict[str, Any]) -> None:
    leaves = metadata["manifest"]["content"]["leaves"]
    leaves[min(leaves)].clear()


def _replace(old: Path, new: Path) -> None:
    shutil.rmtree(old)
    shutil.copytree(new, old)


def _replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


def _replace_by_loop(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(range(256)))


_CHANGED = "changed since it was saved"
_NO_FOLDER = "what is in its place is no folder"

DAMAGE = {
    "a flipped bit": Damage(lambda newest: flip(array_file(newest)), _CHANGED),
    "numbers cut short": Damage(lambda newest: os.truncate(array_file(newest), 100), "."),
    "numbers cut to nothing": Damage(lambda newest: os.truncate(array_file(newest), 0), "."),
    "numbers gone": Damage(lambda newest: array_file(newest).unlink(), "."),
    "zeros for numbers": Damage(
        lambda newest: array_file(newest).write_bytes(bytes(array_file(newest).stat().st_size)), "."
    ),
    "more after the numbers": Damage(lambda newest: _append(array_file(newest)), None, 3),
    "a link to itself for numbers": Damage(lambda newest: _replace_by_loop(array_file(newest)), "."),
    "an empty step": Damage(lambda newest: [shutil.rmtree(newest), newest.mkdir()], "."),
    "a file for a step": Damage(_replace_by_file, _NO_FOLDER),
    "a link to itself for a step": Damage(_replace_by_loop, _NO_FOLDER),
    "no state": Damage(lambda newest: shutil.rmtree(newest / "state"), "."),
    "a state nobody may read": Damage(lambda newest: (newest / "state").chmod(0), "."),
    "no tree": Damage(lambda newest: (newest / "state" / "_METADATA").unlink(), "."),
    "a tree cut short": Damage(lambda newest: os.truncate(newest / "state" / "_METADATA", 50), "."),
    # Nothing else says which leaves are random keys.
    "no shapes": Damage(
        lambda newest: shutil.rmtree(newest / "state" / "array_metadatas"), "came back as uint32, not as key<fry>", 2
    ),
    "no placements": Damage(lambda newest: (newest / "state" / "_sharding").unlink(), None, 3),
    "no index": Damage(lambda newest: (newest / "state" / "manifest.ocdbt").unlink(), "."),
    "an index cut short": Damage(lambda newest: os.truncate(newest / "state" / "manifest.ocdbt", 20), "."),
    "no metadata": Damage(lambda newest: (newest / "_CHECKPOINT_METADATA").unlink(), "it has no manifest"),
    "metadata cut short": Damage(lambda newest: os.truncate(newest / "_CHECKPOINT_METADATA", 50), "it has no manifest"),
    "no manifest": Damage(lambda newest: _rewrite_manifest(newest, dict.clear), "it has no manifest"),
    "a manifest of other digests": Damage(
        lambda newest: _rewrite_manifest(newest, _drop_a_digest), "its manifest has changed since it was written"
    ),
    "a manifest of another step": Damage(
        lambda newest: _rewrite_manifest(newest, lambda m: m["manifest"]["content"].update(step=7)),
        "its manifest has changed since it was written",
    ),
    "the state of another step": Damage(
        lambda newest: _replace(newest / "state", newest.with_name("2") / "state"), _CHANGED
    ),
    "another step in its place": Damage(lambda newest: _replace(newest, newest.with_name("2")), "it is step 2"),
    "a copy of a large number": Damage(
        lambda newest: shutil.copytree(newest, newest.with_name(str(10**6))), "it is step 3", 3
    ),
    "a save that was killed": Damage(
        lambda newest: shutil.copytree(newest, newest.with_name("4.orbax-checkpoint-tmp")), None, 3
    ),
}
"""Damage by its name."""
