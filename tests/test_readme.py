"""The README's promises: its code runs, its commands are those that are tested, the public names are documented."""

import inspect
import re
from pathlib import Path

import pytest

import merge_jax as mj

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(CODE)))
def test_the_code_of_the_readme_runs(number):
    exec(compile(CODE[number], f"README.md, block {number}", "exec"), {})


def test_there_is_code_to_run():
    assert len(CODE) == 2
    assert 'mj.lpka_transfer({"stage6_2/project/kernel": "fc/kernel"}, num_layers=2, num_heads=8)' in CODE[0]


def test_ci_runs_the_readmes_test_command():
    command = 'pip install -e ".[test]" && pytest'
    assert command in README
    assert command in (ROOT / ".ci" / "run").read_text()


def test_links_point_to_files():
    for document in (ROOT / "README.md", ROOT / "experiments" / "README.md", ROOT / "benchmarks" / "RESULTS.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


@pytest.mark.parametrize("name", mj.__all__)
def test_every_public_name_is_there_and_has_a_docstring(name):
    value = getattr(mj, name)
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
        assert inspect.getdoc(value), name
