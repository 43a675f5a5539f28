"""The names of tensors in files of weights as paths of one tree, and what of a name leads out of a folder."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from merge_jax.paths import some_of

__all__ = ["check_inside", "check_paths", "leaves_of", "paths_of", "put", "without_prefix"]

_Leaf = TypeVar("_Leaf")
_DEEPEST = 100  # Parts of a name; a tree of thousands of levels would end the program.


def put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts a leaf into a tree of dicts, and makes what is around it."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf


def paths_of(names: Iterable[str], file: Path) -> dict[str, str]:
    """Returns the path of each name, split at its dots and slashes, checked to be leaves of one tree."""
    paths: dict[str, str] = {}
    for name in names:
        path = name.replace(".", "/")
        if path in paths:
            raise ValueError(f"{file} has the tensors {paths[path]!r} and {name!r}, which are one path")
        paths[path] = name
    check_paths(paths, file)
    return {name: path for path, name in paths.items()}


def check_paths(names: dict[str, str], file: Path) -> None:
    """Raises ValueError unless paths are leaves of one tree; `names` are those of the file, by path."""
    for path, name in names.items():
        parts = path.split("/")
        if not all(parts):
            raise ValueError(f"{file} has the tensor {name!r}, whose name has an empty part")
        if any(letter < " " or letter == "\x7f" for letter in name):  # They would change what a terminal shows.
            raise ValueError(f"{file} has the tensor {name!r}, whose name has control characters")
        if ".." in parts or "." in parts:
            raise ValueError(f"{file} has the tensor {name!r}, whose name leads out of its tree")
        if len(parts) > _DEEPEST:
            raise ValueError(f"{file} has a tensor whose name has {len(parts)} parts, over the limit of {_DEEPEST}")
        for i in range(1, len(parts)):
            if (parent := "/".join(parts[:i])) in names:
                raise ValueError(f"{file} has the tensors {names[parent]!r} and {name!r}, one inside the other")


def leaves_of(tree: Any, file: Path, path: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts and lists by path; what is empty or None has none.

    Raises:
      ValueError: two leaves have one path, or too many levels.
    """
    if path.count("/") >= _DEEPEST:
        raise ValueError(f"{file} has a tensor whose name has more than {_DEEPEST} parts, which is the limit")
    if isinstance(tree, dict):
        children = [(str(name), child) for name, child in tree.items()]
    elif isinstance(tree, list | tuple):
        children = [(str(i), child) for i, child in enumerate(tree)]
    else:
        return {} if tree is None else {path: tree}
    leaves: dict[str, Any] = {}
    for name, child in children:
        for leaf_path, leaf in leaves_of(child, file, f"{path}/{name}" if path else name).items():
            if leaf_path in leaves:
                raise ValueError(f"{file} has two tensors with the path {leaf_path!r}")
            leaves[leaf_path] = leaf
    return leaves


def without_prefix(
    file: Any, leaves: Mapping[str, _Leaf], wanted: Collection[str], bare: Callable[[str], str] = lambda path: path
) -> dict[str, _Leaf]:
    """Returns leaves by their paths without what all of them begin with and a model's do not, such as `module`.

    So wrap a model `DistributedDataParallel` (`module`), `torch.compile` (`_orig_mod`) and what has it as an attribute
    (`model`). Nothing is left out where a leaf is wanted by its whole path, or fewer than half of the wanted are found.

    Args:
      file: for errors.
      leaves: by path.
      wanted: the model's paths.
      bare: gives a path of the file as one of the model.

    Raises:
      ValueError: some leaves begin so, and others do not.
    """
    if any(bare(path) in wanted for path in leaves):
        return dict(leaves)
    cuts = [(path[: i + 1], path[i + 1 :]) for path in leaves for i, letter in enumerate(path) if letter == "/"]
    counts = Counter(start for start, rest in cuts if bare(rest) in wanted)
    prefix, count = max(counts.items(), key=lambda one: one[1], default=("", 0))
    if 2 * count < len(wanted):
        return dict(leaves)
    others = [path for path in leaves if not path.startswith(prefix)]
    if others:
        *nodes, _ = prefix.split("/")
        part = "".join(f"[{node!r}]" for node in nodes)
        raise ValueError(
            f"{file} has tensors of the model under {prefix!r}, and beside them {some_of(map(repr, others), 3)}: make a"
            f" file of the former, mj.save_safetensors('new.safetensors', mj.load_weights({str(file)!r},"
            f" {prefix + '**'!r}){part})"
        )
    return {path.removeprefix(prefix): leaf for path, leaf in leaves.items()}


def check_inside(name: str, file: Path, what: str) -> None:
    """Raises ValueError for a file's name that leads out of the folder of the file that names it."""
    # By its name alone: the files of a downloaded model are often links to a common store.
    paths = (PurePosixPath(name), PureWindowsPath(name))
    if not paths[0].parts or any(p.is_absolute() or p.drive or ".." in p.parts for p in paths):
        raise ValueError(f"{file} names the {what} {name!r}, which is not inside its folder")
