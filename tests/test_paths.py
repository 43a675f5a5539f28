import re
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import merge_jax as mj
from merge_jax import paths
from merge_jax.paths import near_misses


class Pair(NamedTuple):
    first: object
    second: object


def test_paths_join_keys_attributes_and_positions():
    tree = {"a": {"kernel": 1}, "blocks": [2, {"w": 3}], "pair": Pair(4, (5,))}
    assert mj.flatten(tree) == {
        "a/kernel": 1,
        "blocks/0": 2,
        "blocks/1/w": 3,
        "pair/first": 4,
        "pair/second/0": 5,
    }


def test_paths_that_collide_are_refused():
    with pytest.raises(ValueError, match="two leaves of the tree have the path 'a/b'"):
        mj.flatten({"a": {"b": 1}, "a/b": 2})


def test_replace_keeps_every_other_leaf_and_the_structure():
    tree = {"a": [jnp.ones(2), jnp.zeros(3)], "b": Pair(jnp.ones(1), None)}
    new = mj.replace(tree, {"a/1": jnp.ones(3)})
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    assert new["a"][0] is tree["a"][0]
    assert new["b"].first is tree["b"].first
    assert new["a"][1].sum() == 3
    assert tree["a"][1].sum() == 0


def test_unknown_paths_name_the_role_and_near_misses():
    tree = {"fc": {"kernel": 1, "bias": 2}}
    with pytest.raises(ValueError, match=r"unknown source path 'fc/kernal'; did you mean 'fc/kernel'"):
        mj.select(tree, ["fc/kernal"], role="source")
    with pytest.raises(ValueError, match=r"unknown path 'fc/kernels'; did you mean 'fc/kernel'"):
        mj.replace(tree, {"fc/kernels": 3})


def test_without_a_near_miss_all_names_are_listed():
    assert near_misses("zzz", ["a", "b"]) == "there is 'a', 'b'"
    assert near_misses("zzz", []) == "there is nothing"
    assert near_misses("zzz", map(str, range(30))).endswith("and 10 more")


def test_paths_that_differ_in_dots_are_refused():
    with pytest.raises(ValueError, match=r"the paths 'a/b' and 'a.b' of the tree collide"):
        mj.flatten({"a.b": 1, "a": {"b": 2}})


PATHS = ["a/w", "blocks/0/w", "blocks/1/w", "blocks/10/w", "blocks/2/b", "x/attention/q/kernel", "attention/q/kernel"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/w", ["a/w"]),
        ("blocks/*/w", ["blocks/0/w", "blocks/1/w", "blocks/10/w"]),
        ("blocks/?/w", ["blocks/0/w", "blocks/1/w"]),
        ("blocks/[12]/?", ["blocks/1/w", "blocks/2/b"]),
        ("*/w", ["a/w"]),
        ("**/w", ["a/w", "blocks/0/w", "blocks/1/w", "blocks/10/w"]),
        ("**/attention/*/kernel", ["attention/q/kernel", "x/attention/q/kernel"]),
        ("blocks/**", ["blocks/0/w", "blocks/1/w", "blocks/2/b", "blocks/10/w"]),
        ("**", ["a/w", "attention/q/kernel", "blocks/0/w", "blocks/1/w", "blocks/2/b", "blocks/10/w",
                "x/attention/q/kernel"]),
        (re.compile(r"blocks/\d/w"), ["blocks/0/w", "blocks/1/w"]),
    ],
)  # fmt: skip
def test_patterns_find_their_paths_in_natural_order(pattern, expected):
    assert mj.paths.find_paths(PATHS, pattern) == expected


LETTERS = ["a", "b", "w", "!", "^", "-", "]", "[", "a/b", "ab", "[]", "[!]"]


@pytest.mark.parametrize(
    "glob", ["[!w]", "[^w]", "[!a-v]", "[!-a]", "[!a-]", "[w!]", "[w^]", "[]w]", "[!]w]", "[[w]", "[!!]", "[!^]",
             "a[!c]b", "[]", "[!]", "*[!w]"]
)  # fmt: skip
def test_brackets_mean_what_they_mean_in_a_shell(glob):
    """`fnmatch` is the reference, but for `^`, which it takes for a letter, and for slashes, which end a part."""
    of_shell = re.sub(r"^(\[)\^", r"\1!", glob)
    expected = [name for name in LETTERS if fnmatchcase(name, of_shell) and name.count("/") == glob.count("/")]
    found = [name for name in LETTERS if paths._glob_expression(glob).fullmatch(name)]
    assert found == expected
    if glob not in LETTERS and expected:
        assert mj.paths.find_paths(LETTERS, glob) == sorted(expected, key=paths.natural_order)


def test_a_path_with_signs_of_a_glob_is_found_as_it_stands():
    assert mj.paths.find_paths(["a[0]/w", "a0/w"], "a[0]/w") == ["a[0]/w"]


def test_patterns_that_find_nothing_name_near_misses():
    with pytest.raises(ValueError, match=r"the source pattern 'block/\*/w' matches no leaf; did you mean 'blocks/"):
        mj.paths.find_paths(PATHS, "block/*/w", role="source")
    with pytest.raises(ValueError, match="the tree pattern 'block' matches no leaf"):
        mj.paths.find_paths(PATHS, re.compile("block"))
