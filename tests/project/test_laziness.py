"""What is imported when: help and checks of options need no JAX, and `import merge_jax` imports no module of it."""

import inspect
import pkgutil
import subprocess
import sys
from typing import get_args

import pytest

import merge_jax as mj
from merge_jax.study import choices
from merge_jax.training import joint

_HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "sklearn", "tensorflow_datasets", "matplotlib")
_AS_MAIN = """
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print("imported:", *{name.partition(".")[0] for name in sys.modules})
"""
_EXPERIMENTS = ("cross_structure", "cross_task", "cross_modal", "self_transfer", "ablation", "anatomy")


def imported_by(*words):
    """The exit code, what was printed, and the packages that `python -m` of the words has imported."""
    done = subprocess.run([sys.executable, "-c", _AS_MAIN, *words], capture_output=True, text=True)
    text, _, packages = done.stdout.rpartition("imported:")
    return done.returncode, text + done.stderr, set(packages.split())


@pytest.mark.parametrize(
    "words",
    [
        *((f"experiments.{name}", "--help") for name in _EXPERIMENTS),
        ("merge_jax", "--help"),
        ("merge_jax", "--version"),
        *(("merge_jax", name, "--help") for name in ("run", "compare", "summary", "export", "doctor")),
        ("merge_jax", "run", "cross_structure", "--help"),
    ],
    ids=" ".join,
)
def test_help_needs_no_jax(words):
    code, text, packages = imported_by(*words)
    assert code == 0, text
    assert text.strip()
    assert not packages & set(_HEAVY)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cycle", "0"], "cycle must be a whole number of at least 1"),
        (["smokee"], "unknown preset 'smokee'"),
        (["--no-such-option", "1"], "no-such-option"),
    ],
)
def test_wrong_options_are_told_without_jax(words, told):
    code, text, packages = imported_by("experiments.cross_structure", *words)
    assert code == 2
    assert told in text
    assert not packages & set(_HEAVY)


def test_the_package_is_imported_without_jax():
    code, text, packages = imported_by("merge_jax.checks")
    assert code == 0, text
    assert "merge_jax" in packages
    assert not packages & set(_HEAVY)


def test_every_public_name_is_there():
    assert {name for name in mj.__all__ if not hasattr(mj, name)} == set()
    assert set(mj.__all__) <= set(dir(mj))
    with pytest.raises(AttributeError, match="no attribute 'lpka_transfr'"):
        mj.lpka_transfr  # noqa: B018


def test_no_module_hides_a_public_name():
    # An imported module becomes an attribute of its package, in the place of a name that is imported when it is used.
    modules = {module.name for module in pkgutil.iter_modules(mj.__path__)}
    assert {name for name in modules & set(mj.__all__) if not inspect.ismodule(getattr(mj, name))} == set()


def test_options_choose_from_what_the_library_has():
    assert get_args(choices.UpdateRule) == get_args(joint.UpdateRule)
