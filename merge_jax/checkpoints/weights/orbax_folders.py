"""Orbax: one checkpoint of a tree, or a folder of steps; those of `Checkpoints` are verified by digest."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from merge_jax.checkpoints.foreign import is_orbax
from merge_jax.checkpoints.names import check_paths, leaves_of
from merge_jax.checkpoints.weights.stored import Format, Stored, reading
from merge_jax.checkpoints.weights.training_state import model_part
from merge_jax.paths import flatten, some_of

__all__ = ["ORBAX", "is_ours"]

_TREE = "_METADATA"  # In the folder of every tree.
_STEP = "_CHECKPOINT_METADATA"  # In the folder of a step, with one or more trees.
_UNFINISHED = ".orbax-checkpoint-tmp"  # In the name of a folder being written; some end with a number.
_LARGEST_RATIO = 2**16  # A zstd block never unpacks to more than half this many times its size.
_SMALL = 2**27  # Bytes that need no such check.
_VARIABLE = "/value"  # Flax NNX's name for a variable's array.


def _detect(path: Path, head: bytes) -> bool:
    del head
    return path.is_dir() and (is_orbax(path) or bool(_trees(path)) or any(map(_is_step, path.iterdir())))


def _is_step(path: Path) -> bool:
    """Returns whether a folder is a step: `100`, or `ckpt_100` if written by Orbax."""
    if _UNFINISHED in path.name:
        return False
    return path.is_dir() and (path.name.isdecimal() or (path.name[-1:].isdecimal() and (path / _STEP).exists()))


def _trees(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if (child / _TREE).exists() and _UNFINISHED not in child.name)


def _open(path: Path) -> Stored:
    step = path
    if _UNFINISHED in path.name:
        raise ValueError(f"{path} was not written to its end by Orbax: name another step")
    if not (path / _TREE).exists() and not _trees(path):
        steps = [child for child in path.iterdir() if _is_step(child)]
        if not steps:
            raise ValueError(f"{path} has no tree of arrays: Orbax did not end writing it, or it holds something else")
        step = max(steps, key=lambda child: int("".join(filter(str.isdecimal, child.name))))
    if step.name.isdecimal() and is_ours(step):
        return _open_ours(step)
    trees = [step] if (step / _TREE).exists() else _trees(step)
    if len(trees) > 1:
        trees = list(filter(_has_arrays, trees))
    if len(trees) != 1:
        found = some_of((tree.name for tree in trees), 5) or "none"
        raise ValueError(f"{step} must hold one tree of arrays, found {found}: name the folder of one")
    return _open_tree(trees[0])


def _has_arrays(tree: Path) -> bool:
    """Returns whether a tree has more than strings; Keras saves a model's configuration as strings."""
    with reading(tree, "checkpoint of Orbax"):
        entries = json.loads((tree / _TREE).read_bytes())["tree_metadata"].values()
        return any(entry["value_metadata"]["value_type"] != "string" for entry in entries)


def _open_tree(folder: Path) -> Stored:
    import orbax.checkpoint as ocp  # Not at the top: it takes seconds, and other formats do not need it.

    place = epath.Path(folder.absolute())
    with reading(folder, "checkpoint of Orbax"):
        handler = ocp.PyTreeCheckpointHandler()
        tree: Any = handler.metadata(place).tree
        leaves = jax.tree_util.tree_leaves_with_path(tree)
    # Texts and empty nodes have no dtype.
    found = {
        jax.tree_util.keystr(key_path, simple=True, separator="/"): leaf
        for key_path, leaf in leaves
        if getattr(leaf, "dtype", None) is not None
    }
    paths = _unwrapped(found)
    check_paths(paths, folder)
    lost = _under_one_key(leaves)
    shapes = {
        path: jax.ShapeDtypeStruct(tuple(found[stored].shape or ()), jnp.dtype(found[stored].dtype))
        for path, stored in paths.items()
    }

    _check_sizes(folder, shapes)

    def read(chosen: Sequence[str]) -> Mapping[str, np.ndarray]:
        stored = {paths[path] for path in chosen}
        if same := next((lost[name] for name in stored if name in lost), None):
            raise ValueError(
                f"{folder} has {' and '.join(map(repr, same))}, which Orbax joins at dots to one name: the numbers of"
                " one are lost. Rename a key, and save the tree again"
            )

        def wanted(key_path: Any, leaf: Any) -> Any:
            return leaf if jax.tree_util.keystr(key_path, simple=True, separator="/") in stored else ocp.PLACEHOLDER

        # As NumPy: the devices that saved the arrays need not exist here.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        request = ocp.args.PyTreeRestore(item=jax.tree_util.tree_map_with_path(wanted, tree), restore_args=as_numpy)
        with reading(folder, "checkpoint of Orbax"):
            restored = leaves_of(handler.restore(place, args=request), folder)
            arrays = {path: np.asarray(restored[paths[path]]) for path in chosen}
        for path, array in arrays.items():
            if (array.shape, array.dtype) != (shapes[path].shape, shapes[path].dtype):
                raise ValueError(
                    f"{folder} has {array.dtype}{list(array.shape)} at {path!r}, and says it is {shapes[path]}"
                )
        return arrays

    return Stored(tuple(paths), lambda chosen: {path: shapes[path] for path in chosen}, read, model=model_part(paths))


def _under_one_key(leaves: Sequence[tuple[Any, Any]]) -> dict[str, list[str]]:
    """Returns the paths of leaves that Orbax stores under one key, by each of them; it joins paths by dots."""
    found: dict[str, list[str]] = {}
    for key_path, _ in leaves:
        key, path = (jax.tree_util.keystr(key_path, simple=True, separator=between) for between in "./")
        found.setdefault(key, []).append(path)
    return {path: same for same in found.values() if len(same) > 1 for path in same}


def _check_sizes(folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises ValueError for an array larger than a folder's files can hold, before allocating it."""
    path = max(shapes, key=lambda path: shapes[path].size, default=None)
    if path is None or (size := shapes[path].size * shapes[path].dtype.itemsize) <= _SMALL:
        return
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > _LARGEST_RATIO * held:
        raise ValueError(f"{folder} claims {size} bytes for {path!r}, which files of {held} bytes do not hold")


def _unwrapped(stored: Mapping[str, Any]) -> dict[str, str]:
    """Returns the path of each leaf; if most are NNX variables (`kernel/value`), these without that ending.

    A state of NNX may also hold arrays that are in no variable.
    """
    inside = Counter(place for path in stored for place in itertools.accumulate(path.split("/")[:-1], _joined))
    alone = {path for path in stored if path.endswith(_VARIABLE) and inside[path.removesuffix(_VARIABLE)] == 1}
    model = model_part(stored).values()
    if 2 * len(alone.intersection(model)) <= len(model):
        return {path: path for path in stored}
    return {path.removesuffix(_VARIABLE) if path in alone else path: path for path in stored}


def _joined(place: str, name: str) -> str:
    return f"{place}/{name}"


def is_ours(step: Path) -> bool:
    """Returns whether a folder is a step saved by `Checkpoints`, with a manifest."""
    try:
        return bool(json.loads((step / _STEP).read_bytes())["custom_metadata"]["manifest"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open_ours(step: Path) -> Stored:
    from merge_jax.checkpoints.orbax import Checkpoints  # As Orbax does.

    def open_steps() -> Checkpoints:
        return Checkpoints(step.parent, read_only=True)

    with open_steps() as checkpoints:
        leaves = checkpoints.manifest(int(step.name)).leaves
    # Random keys are not numeric.
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype)) for path, leaf in leaves.items() if not leaf.key
    }

    def read(chosen: Sequence[str]) -> Mapping[str, np.ndarray]:
        with open_steps() as checkpoints:
            arrays = flatten(checkpoints.restore_arrays(int(step.name)))
        return {path: np.asarray(arrays[path]) for path in chosen}

    return Stored(tuple(shapes), lambda chosen: {path: shapes[path] for path in chosen}, read, model=model_part(shapes))


ORBAX = Format("Orbax", _detect, _open)
