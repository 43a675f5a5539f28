"""Leaves of a pytree by readable path: `{"block": {"conv": {"kernel": x}}}` <-> `{"block/conv/kernel": x}`."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

__all__ = ["flatten", "near_misses", "replace", "select"]


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of any pytree by path, in the tree's own order.

    A path joins dictionary keys and attribute names with `/`, and counts positions: `blocks/0/kernel`.

    >>> flatten({"dense": {"kernel": 1, "bias": 2}, "blocks": [3]})
    {'blocks/0': 3, 'dense/bias': 2, 'dense/kernel': 1}

    Raises:
      ValueError: two leaves have the same path, as in `{"a": {"b": x}, "a/b": y}`.
    """
    leaves: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if path in leaves:
            raise ValueError(f"two leaves of the tree have the path {path!r}; rename one of the keys")
        leaves[path] = leaf
    return leaves


def select(tree: Any, paths: Iterable[str], *, role: str = "tree") -> dict[str, Any]:
    """Returns the leaves at `paths`; `role` names the tree in an error.

    Raises:
      ValueError: a path names no leaf; the message lists the nearest paths that exist.
    """
    leaves = flatten(tree)
    selected = {}
    for path in paths:
        if path not in leaves:
            raise ValueError(f"unknown {role} path {path!r}; {near_misses(path, leaves)}")
        selected[path] = leaves[path]
    return selected


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns `tree` with the leaves at the given paths replaced; every other leaf is the same object.

    Raises:
      ValueError: a path names no leaf.
    """
    paths = flatten(tree)
    for path in leaves:
        if path not in paths:
            raise ValueError(f"unknown path {path!r}; {near_misses(path, paths)}")
    new_leaves = [leaves.get(path, leaf) for path, leaf in paths.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), new_leaves)


def near_misses(name: str, names: Iterable[str]) -> str:
    """Returns the end of an error message: the nearest of `names`, or all of them where none is near.

    >>> near_misses("kernal", ["kernel", "bias"])
    "did you mean 'kernel'?"
    """
    names = list(names)
    # The cutoff is low since a long path with one wrong part still shares most of its letters.
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    shown = ", ".join(map(repr, names[:20])) or "nothing"
    return f"there is {shown}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
