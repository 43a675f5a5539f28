"""What is imported when: help and checks of options need no JAX, and `import merge_jax` imports no module of it."""

import importlib
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
        *(("merge_jax", name, "--help") for name in ("run", "compare", "summary", "export", "convert", "doctor")),
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
    ("words", "message"),
    [
        (["--cycle", "0"], "cycle must be a whole number of at least 1"),
        (["smokee"], "unknown preset 'smokee'"),
        (["--no-such-option", "1"], "no-such-option"),
    ],
)
def test_wrong_options_are_told_without_jax(words, message):
    code, text, packages = imported_by("experiments.cross_structure", *words)
    assert code == 2
    assert message in text
    assert not packages & set(_HEAVY)


def test_the_package_is_imported_without_jax():
    code, text, packages = imported_by("merge_jax.checks")
    assert code == 0, text
    assert "merge_jax" in packages
    assert not packages & set(_HEAVY)


def test_the_import_takes_less_than_a_second_beside_that_of_jax():
    code = "import time, jax; start = time.process_time(); import merge_jax; print(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1


@pytest.mark.parametrize("name", ["arrays.batches_of", "read_ahead.ReadAhead", "text.tokens.WordPiece"])
def test_data_import_what_they_need_alone(name):
    """Of what reads files of one kind, nothing for who has arrays."""
    code = f"import sys; from merge_jax.data import {name.rpartition('.')[2]}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    heavy = {"tokenizers", "PIL", "sklearn", "tensorflow_datasets", "tensorflow", "jax"}
    assert not heavy & set(done.stdout.split())


def test_every_public_name_is_there():
    assert set(mj.__all__) <= set(dir(mj))
    with pytest.raises(AttributeError, match="no attribute 'lpka_transfr'"):
        mj.lpka_transfr  # noqa: B018


_PACKAGES = ("", ".checkpoints", ".data", ".models", ".objectives", ".runs", ".training", ".transfers")


@pytest.mark.parametrize("package", [importlib.import_module(f"merge_jax{name}") for name in _PACKAGES], ids=_PACKAGES)
def test_no_module_hides_a_public_name(package):
    # An imported module becomes an attribute of its package, in the place of a name that is imported when it is used.
    modules, names = {module.name for module in pkgutil.iter_modules(package.__path__)}, set(package.__all__)
    offered = {name for name in modules & names if package is mj and inspect.ismodule(getattr(mj, name))}
    assert modules & names == offered
    assert {name for name in names if not hasattr(package, name)} == set()


def test_options_choose_from_what_the_library_has():
    assert get_args(choices.UpdateRule) == get_args(joint.UpdateRule)
