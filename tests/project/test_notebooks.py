"""The notebooks run from top to bottom, and what is stored in them is the output of such a run.

`python -m tests.project.test_notebooks [NAME ...]`, from the repository's root, runs them and stores their outputs.
"""

import base64
import os
import re
import resource
import sys
import tempfile
import time
from contextlib import contextmanager

import nbformat
import pytest

from tests import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What StopSignals says when it hears one: a notebook that shows it has it in its output.
HEARD = "\nstopping after this step, which is saved; Ctrl-C again leaves at once\n"
MACHINE = re.compile(r"/(work|tmp|home|root|Users|opt|usr|var)\b|\x1b\[|Traceback|Warning")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@contextmanager
def environment():
    """What the kernel's process is started with: the CPU, and merge_jax from the repository."""
    before = dict(os.environ)
    paths = [str(ROOT), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute(path, folder):
    """Runs a notebook in a folder, a new kernel each; raises where a cell does."""
    from nbclient import NotebookClient  # Of the extra `dev`, which the default tests do without.

    notebook = nbformat.read(path, as_version=4)
    with environment():
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
        )
        client.execute()
    for output in outputs(notebook):
        data = output.get("data", {})
        if "text/html" in data:  # Rich colours what it gives beside the page, which no reader sees.
            data["text/plain"] = re.sub(r"\x1b\[[\d;]*m", "", data["text/plain"])
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def problems(notebook):
    """What should not be in the outputs."""
    found = []
    for output in outputs(notebook):
        if output.output_type == "error":
            found.append(f"error: {output.ename}: {output.evalue}")
        if output.output_type == "stream":
            if output.name == "stderr" and output.text != HEARD:
                found.append(f"stderr: {output.text}")
            texts = [output.text]
        else:
            texts = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
        found += [f"{match.group()!r} in {text!r}" for text in texts if (match := MACHINE.search(text))]
    return found


def texts(notebook):
    """What the cells print."""
    return "".join(o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stdout")


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "resume_and_inspect", "your_own_models"}


@each
def test_stored_outputs_are_those_of_a_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert problems(notebook) == []
    assert sum(bool(cell.outputs) for cell in cells) >= 4
    pictures = [o.data["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert all(len(base64.b64decode(picture)) < 60_000 for picture in pictures)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not MACHINE.search("".join(cell.source for cell in notebook.cells))
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@each
def test_the_first_cell_says_how_to_install(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "code"
    assert all(line.startswith("#") for line in first.source.splitlines())
    assert "pip install -e ." in first.source


@pytest.mark.docs
@pytest.mark.filterwarnings("default")  # Of the kernel's client; those of the notebook are in its output.
@each
def test_a_notebook_runs(path, tmp_path):
    notebook = execute(path, tmp_path)
    assert problems(notebook) == []
    assert {entry.name for entry in tmp_path.iterdir()} <= {"runs"}
    # The same cells print, and the same words: numbers differ with versions and compilers.
    stored, new = (
        re.sub(r"\s+|[\d.,+-]+", " ", texts(n)).split() for n in (nbformat.read(path, as_version=4), notebook)
    )
    assert new == stored


def main(names):
    """Runs the notebooks and stores their outputs, without what tells of the machine or the day."""
    for path in NOTEBOOKS:
        if names and path.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            notebook = execute(path, folder)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec", "language_info")}
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)  # Of all kernels so far.
        print(
            f"{path.stem}: {time.time() - began:.0f} s; all so far: {used.ru_utime + used.ru_stime:.0f} s of CPU, "
            f"at most {used.ru_maxrss / 2**20:.2f} GiB; {problems(notebook) or 'no problem'}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
