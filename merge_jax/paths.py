"""Leaves of a pytree by readable path: `{"block": {"conv": {"kernel": x}}}` <-> `{"block/conv/kernel": x}`."""

import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = [
    "Pattern",
    "find_paths",
    "flatten",
    "is_pattern",
    "natural_order",
    "near_misses",
    "replace",
    "select",
    "some_of",
    "tied_paths",
]

Pattern = str | re.Pattern[str]
"""A path, a glob over paths (`**/attention/*/kernel`), or a compiled regular expression for whole paths."""


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of any pytree by path, in the order of the tree.

    A path joins dictionary keys, attribute names and positions with `/`: `blocks/0/kernel`. A Flax NNX variable or a
    haliax named array is one leaf, its array.

    >>> flatten({"dense": {"kernel": 1, "bias": 2}, "blocks": [3]})
    {'blocks/0': 3, 'dense/bias': 2, 'dense/kernel': 1}

    Raises:
      ValueError: two leaves have the same path, as in `{"a": {"b": x}, "a/b": y}`, or paths that differ only in
        `/` and `.`, which would collide in a weight file.
    """
    leaves: dict[str, Any] = {}
    dotted: dict[str, str] = {}
    for path, leaf in _leaves_with_path(tree):
        other = dotted.setdefault(path.replace("/", "."), path)
        if path in leaves:
            raise ValueError(f"two leaves of the tree have the path {path!r}; rename one of the keys")
        if other != path:
            raise ValueError(f"the paths {other!r} and {path!r} of the tree collide; rename one of the keys")
        leaves[path] = leaf
    return leaves


def _leaves_with_path(tree: Any) -> Iterator[tuple[str, Any]]:
    import jax  # Most of this module handles only paths, and checks options with them before JAX is imported.

    for key_path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_wrapper):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        leaves = jax.tree.leaves(node) if _is_wrapper(node) else [node]
        # Each wraps one array, whose name would only lengthen the path.
        yield from ((path, leaf) if len(leaves) == 1 else (f"{path}/{i}", leaf) for i, leaf in enumerate(leaves))


def _is_wrapper(node: Any) -> bool:
    return _is_variable(node) or isinstance(node, getattr(sys.modules.get("haliax"), "NamedArray", ()))


def _is_variable(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # Importing takes 0.5 s; if nobody did, no tree has its variables.
    return nnx is not None and isinstance(node, nnx.Variable)


def natural_order(path: str) -> list[Any]:
    """Returns a sort key that compares numbers inside paths as numbers.

    >>> sorted(["layer_10/w", "layer_2/w"], key=natural_order)
    ['layer_2/w', 'layer_10/w']
    """
    return [int(part) if part.isascii() and part.isdecimal() else part for part in re.split(r"([0-9]+)", path)]


def find_paths(paths: Iterable[str], pattern: Pattern, *, role: str = "tree") -> list[str]:
    """Returns the paths that match a pattern, in natural order; `role` names the tree in an error.

    A string that equals one of the paths matches only that path. Globs work as in a shell: `*` and `?` match letters
    within one part of a path, `[...]` matches one of some letters, `[!...]` (or `[^...]`) one of all others, and the
    part `**` any number of parts. A compiled regular expression must match the whole path.

    >>> find_paths(["a/w", "blocks/0/w", "blocks/1/w"], "blocks/*/w")
    ['blocks/0/w', 'blocks/1/w']

    Raises:
      ValueError: nothing matches, and the message lists near misses; or an invalid glob, such as `[z-a]`.
    """
    paths = list(paths)
    if pattern in paths:
        return [str(pattern)]
    if isinstance(pattern, str) and not is_pattern(pattern):
        raise ValueError(f"unknown {role} path {pattern!r}; {near_misses(pattern, paths)}")
    expression = _glob_expression(pattern) if isinstance(pattern, str) else pattern
    found = sorted(filter(expression.fullmatch, paths), key=natural_order)
    if not found:
        text = pattern if isinstance(pattern, str) else pattern.pattern
        hint = near_misses(text, paths)
        if not isinstance(pattern, str):
            hint = f"a regular expression has to match whole paths; {hint}"
        elif any(_glob_expression(f"**/{pattern}").fullmatch(path) for path in paths):
            hint = f"'*' stays inside one part of a path, so try {f'**/{pattern}'!r}"
        elif (rest := pattern.removeprefix("params/")) != pattern and any(map(_glob_expression(rest).fullmatch, paths)):
            hint = f"paths here have no 'params/', so try {rest!r}"
        raise ValueError(f"the {role} pattern {text!r} matches no leaf; {hint}")
    return found


def is_pattern(named: Any) -> bool:
    """Returns whether leaves are given by a glob or a regular expression, which may match unintended leaves."""
    return isinstance(named, re.Pattern) or (isinstance(named, str) and re.search(r"[*?\[]", named) is not None)


def _glob_expression(glob: str) -> re.Pattern[str]:
    letters = {"*": "[^/]*", "?": "[^/]"}
    parts = []
    for part in glob.split("/"):
        if part == "**":
            parts.append("(?:[^/]+/)*")
            continue
        # As in a shell, a leading `]` is one of the letters, and an unclosed bracket is a letter.
        tokens = re.findall(r"\[(?:[!^].|[^!^])[^]]*\]|.", part)
        escaped = (_one_of(t[1:-1]) if len(t) > 1 else letters.get(t) or re.escape(t) for t in tokens)
        parts.append("".join(escaped) + "/")
    # Every part ends with a slash, so that `**` can match no part; the last part has one too many.
    expression = "".join(parts)
    expression = expression[:-1] if expression.endswith("/") else expression[: -len("(?:[^/]+/)*")] + ".*"
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"the pattern {glob!r} cannot be read: {error.msg}") from None


def _one_of(letters: str) -> str:
    others = letters[0] in "!^"
    # These have a special meaning in a regular expression.
    escaped = re.sub(r"[]\\[&~|^]", r"\\\g<0>", letters[1:] if others else letters)
    return f"(?!/)[{'^' * others}{escaped}]"  # No letter of one part is a slash.


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
      ValueError: a path names no leaf; or a module of Flax NNX with tied layers, which a new tree would untie.

    Warns:
      UserWarning: a replaced matrix also appears at another path, where it is not replaced.
    """
    import jax

    _check_untied(tree)
    paths = flatten(tree)
    for path in leaves:
        if path not in paths:
            raise ValueError(f"unknown path {path!r}; {near_misses(path, paths)}")
    for tied in tied_paths(tree):
        new, old = ([path for path in tied if (path in leaves) == written] for written in (True, False))
        if new and old:
            warnings.warn(
                f"the leaves {new[0]!r} and {old[0]!r} are one array, but only {new[0]!r} is written, so they will "
                "diverge: keep it at one path of the tree and read it twice in the model, or write both",
                stacklevel=2,
            )
    new_leaves = [leaves.get(path, leaf) for path, leaf in paths.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), new_leaves)


def _check_untied(tree: Any) -> None:
    """Raises ValueError if one NNX variable appears at two paths, since only its module knows that they are tied."""
    if "flax.nnx" not in sys.modules:
        return
    import jax

    paths: dict[int, str] = {}
    for key_path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if _is_variable(node) and paths.setdefault(id(node), path) != path:
            raise ValueError(
                "give the parameters that nnx.split(model, nnx.Param, ...) or nnx.state(model, nnx.Param) returns, not "
                f"the module: {paths[id(node)]!r} and {path!r} are one variable, and in a new module they would be two"
            )


def tied_paths(tree: Any) -> list[tuple[str, ...]]:
    """Returns the paths of each matrix that appears at several paths.

    JAX treats them as separate parameters with equal initial values. Vectors are left out: a new model may use one
    vector of zeros for all biases.
    """
    import jax
    from jax.core import Tracer

    paths: dict[int, list[str]] = {}
    for path, leaf in flatten(tree).items():
        if getattr(leaf, "ndim", 0) > 1 and not isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
            paths.setdefault(id(leaf), []).append(path)
    return [tuple(tied) for tied in paths.values() if len(tied) > 1]


def near_misses(name: str, names: Iterable[str]) -> str:
    """Returns the end of an error message: the nearest of `names`, or all of them if none is near.

    >>> near_misses("kernal", ["kernel", "bias"])
    "did you mean 'kernel'?"
    """
    names = list(names)
    # The cutoff is low since a long path with one wrong part still shares most of its letters.
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"there is {some_of(map(repr, names), 20) or 'nothing'}"


def some_of(texts: Iterable[str], most: int, separator: str = ", ") -> str:
    """Returns the first texts in one line, and the number of the others.

    >>> some_of(["a", "b", "c", "d"], 3)
    'a, b, c and 1 more'
    """
    texts = list(texts)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more
