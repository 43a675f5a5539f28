"""Tensor names in weight files as paths of one tree, and checks of names that leave a folder."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from merge_jax.paths import some_of

__all__ = ["check_inside", "check_paths", "leaves_of", "paths_of", "put", "without_prefix"]

_Leaf = TypeVar("_Leaf")
_NF4 = ("absmax", "quant_map")  # Beside the weights that bitsandbytes quantised.
_DEEPEST = 100  # Parts of a name; a tree of thousands of levels would crash the program.


def put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Inserts a leaf into a tree of dicts, creating parents as needed."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf


def paths_of(names: Iterable[str], file: Path) -> dict[str, str]:
    """Returns the path of each name, split at dots and slashes; checks that they form one tree."""
    paths: dict[str, str] = {}
    for name in names:
        path = name.replace(".", "/")
        if path in paths:
            raise ValueError(f"{file} has the tensors {paths[path]!r} and {name!r}, which are one path")
        paths[path] = name
    check_paths(paths, file)
    return {name: path for path, name in paths.items()}


def check_paths(names: dict[str, str], file: Path) -> None:
    """Raises ValueError unless paths are leaves of one tree; `names` are the file's names, by path."""
    for path, name in names.items():
        parts = path.split("/")
        if not all(parts):
            raise ValueError(f"{file} has the tensor {name!r}, whose name has an empty part")
        if any(letter < " " or letter == "\x7f" for letter in name):  # They would change the terminal's display.
            raise ValueError(f"{file} has the tensor {name!r}, whose name has control characters")
        if ".." in parts or "." in parts:
            raise ValueError(f"{file} has the tensor {name!r}, whose name leads out of its tree")
        if len(parts) > _DEEPEST:
            raise ValueError(f"{file} has a tensor whose name has {len(parts)} parts, over the limit of {_DEEPEST}")
        for i in range(1, len(parts)):
            if (parent := "/".join(parts[:i])) in names:
                known = (
                    ": bitsandbytes packed it into 4 bits; save the model dequantised" if name.endswith(_NF4) else ""
                )
                raise ValueError(f"{file} has the tensors {names[parent]!r} and {name!r}, one inside the other{known}")


def leaves_of(tree: Any, file: Path, path: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts and lists by path; skips empty containers and None.

    Raises:
      ValueError: two leaves share a path, or there are too many levels.
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
    """Returns leaves by their paths without a common wrapper prefix that the model lacks, such as `module`.

    Such prefixes come from `DistributedDataParallel` (`module`), `torch.compile` (`_orig_mod`) and objects with the
    model as an attribute (`model`). No prefix is removed if a leaf is wanted by its full path, or fewer than half of
    the wanted leaves are found.

    Args:
      file: the file's name, for errors.
      leaves: the leaves, by path.
      wanted: the model's paths.
      bare: maps a path of the file to one of the model.

    Raises:
      ValueError: only some leaves have the prefix.
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
    """Raises ValueError for a file name that leads out of the folder of the file that contains it."""
    # Checks only the name: the files of a downloaded model are often links to a shared store.
    paths = (PurePosixPath(name), PureWindowsPath(name))
    if not paths[0].parts or any(p.is_absolute() or p.drive or ".." in p.parts for p in paths):
        raise ValueError(f"{file} names the {what} {name!r}, which is not inside its folder")
