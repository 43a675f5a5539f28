"""The README's promises: its code runs, its commands are those that are tested, the public names are documented."""

import ast
import inspect
import re

import jax
import pytest

import merge_jax as mj
from tests import ROOT

README = (ROOT / "README.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(*numbers):
    names = {}
    for number in numbers:
        exec(compile(CODE[number], f"README.md, block {number}", "exec"), names)
    return names


BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCS = sorted(path for path in (ROOT / "docs").glob("*.md") if BLOCK.search(path.read_text()))


@pytest.mark.docs
@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_the_code_of_the_documents_runs(path, tmp_path, monkeypatch):
    """Blocks of one document go on from each other."""
    monkeypatch.chdir(tmp_path)
    names = {}
    with jax.numpy_rank_promotion("allow"):  # As users have it: the layers of Keras broadcast.
        for number, code in enumerate(BLOCK.findall(path.read_text())):
            exec(compile(code, f"{path.name}, block {number}", "exec"), names)


def test_the_documents_show_the_three_kinds_of_models():
    text = (ROOT / "docs" / "your_own_models.md").read_text()
    for heading in ("## Two Linen models", "## An NNX pair", "## A safetensors file as the source"):
        assert heading in text
    assert {path.stem for path in DOCS} >= {
        "your_own_models",
        "transfers",
        "devices",
        "data",
        "text",
        "image_text",
        "long_runs",
        "method",
        "scenarios",
        "faq",
    }


@pytest.mark.docs
def test_the_opening_code_runs():
    made = run(0)["made"]
    assert set(made.solved) == {f"params/layers_{i}/kernel" for i in (0, 2, 4)}
    assert made.solved["params/layers_0/kernel"] > 0.99


@pytest.mark.docs
def test_the_code_for_ones_own_models_gives_what_it_says():
    assert len(CODE) == 2
    (said,) = re.findall(r"print\(scores\)  # (.*)", CODE[1])
    assert run(1)["scores"] == pytest.approx(ast.literal_eval(said), abs=0.02)  # Another JAX version rounds otherwise.


def test_the_readme_fits_its_length():
    """Words of prose and tables; code blocks and addresses of links are no words."""
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL))
    assert len(re.findall(r"\S*\w\S*", text)) <= 1200


def test_ci_runs_the_readmes_test_command():
    command = 'pip install -e ".[test]" && pytest'
    assert command in README
    assert (ROOT / ".ci" / "run").read_text().count(command) == 1


def test_links_point_to_files():
    documents = (ROOT / "README.md", ROOT / "experiments" / "README.md", ROOT / "benchmarks" / "RESULTS.md")
    for document in (*documents, *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


@pytest.mark.parametrize("name", mj.__all__)
def test_every_public_name_is_there_and_has_a_docstring(name):
    value = getattr(mj, name)
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
        assert inspect.getdoc(value), name
