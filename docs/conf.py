"""Sphinx's settings: the Markdown files of this folder, and the reference from the docstrings.

`python -m sphinx -W --keep-going -b html docs build/site`, after `pip install -e ".[docs]"`. The build reads nothing
from a network, and the pages load nothing from another host.
"""

import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import textwrap
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

project = "merge_jax"
author = "the authors of merge_jax"
release = importlib.metadata.version("merge_jax")
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"merge_jax {release}"
html_copy_source = False
html_show_sourcelink = False

# Headings may be named in links, as on the hosts that show the files.
myst_heading_anchors = 3

# A generated document has a title and then headings of the third level.
suppress_warnings = ["myst.header"]

autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # Fields of Flax modules and dataclasses are a list, not members a second time.

DOCS = Path(__file__).parent
ROOT = DOCS.parent

# Files outside this folder that have a page here, which includes them.
PAGES = {
    ROOT / "README.md": "quickstart.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "benchmarks" / "RESULTS.md": "benchmarks.md",
    ROOT / "experiments" / "README.md": "experiments.md",
}

_LINK = re.compile(r"\[([^][]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")


def point_links_to_pages(text: str, folder: Path) -> str:
    """Returns the text of a file of `folder` with its links as they are from `docs/`, to pages where there are any.

    A link to a folder, which no page can show, is left as its words.
    """

    def place(match: re.Match[str]) -> str:
        words, link, anchor = match[1], match[2], match[3] or ""
        path = (folder / link).resolve()
        if path.is_dir():
            return words
        if not path.exists():
            return match[0]
        return f"[{words}]({os.path.relpath(DOCS / PAGES.get(path, path), DOCS)}{anchor})"

    return _LINK.sub(place, text)


def on_source_read(app: Sphinx, docname: str, content: list[str]) -> None:
    """Links of the pages that stand directly in this folder."""
    del app
    if "/" not in docname:
        content[0] = point_links_to_pages(content[0], DOCS)


def on_include_read(app: Sphinx, path: Path, docname: str, content: list[str]) -> None:
    """Links of a file that a page includes."""
    del app, docname
    content[0] = point_links_to_pages(content[0], (DOCS / path).resolve().parent)


def _public_names() -> dict[str, str]:
    """Returns the full name of each public name that no plain word can be meant by."""
    names = {}
    packages = ("study", "training", "transfers", "objectives", "checkpoints", "data", "models", "runs")
    for module in (*(f"merge_jax.{package}" for package in packages), "merge_jax"):
        for name in importlib.import_module(module).__all__:
            if "_" in name or name[0].isupper():
                names[name] = f"{module}.{name}"
    return names


PUBLIC = _public_names()


def as_rst(text: str) -> str:
    """Returns a docstring with its code, in single backticks, as links to what is public and as literals otherwise."""

    def mark(match: re.Match[str]) -> str:
        code = match[1].removeprefix("mj.")
        # A literal neither begins nor ends with a space, as ` + ` does.
        marked = f":py:obj:`{match[1]} <{PUBLIC[code]}>`" if code in PUBLIC else f"``{match[1].strip()}``"
        return marked + ("\\ " if match[2] else "")  # Reads `Route`s, which is no end of a literal.

    return re.sub(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))", mark, text)


def on_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Code as it is written in docstrings."""
    del app, what, name, obj, options
    lines[:] = as_rst("\n".join(lines)).split("\n")


def on_docstring_of_data(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The text below an alias of a type, which Python does not keep and napoleon would take for a type and its text."""
    del app, obj, options
    if what == "data":
        lines[:] = as_rst("\n".join(_text_of_assignment(*name.rsplit(".", 1)))).split("\n")


def _text_of_assignment(package: str, name: str) -> list[str]:
    """Returns the text below the assignment of a name, in the module of the package that makes it."""
    for path in sorted(ROOT.joinpath(*package.split(".")).rglob("[!_]*.py")):
        if f"\n{name} = " in path.read_text():
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            return ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name), [])
    return []


def on_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Signatures as they are written: `Params` and not what it stands for; and without the fields that Flax adds."""
    del app, name, options
    if inspect.isclass(obj):
        return _fields_as_written(obj) or arguments, returns
    function = inspect.unwrap(obj)
    if what not in ("function", "method") or not inspect.isfunction(function):
        return arguments, returns
    written = _written(function)
    if what == "method" and "staticmethod" not in [ast.unparse(one) for one in written.decorator_list]:
        positional = written.args.posonlyargs or written.args.args
        del positional[:1]
    return f"({ast.unparse(written.args)})", ast.unparse(written.returns).strip("'") if written.returns else None


def _fields_as_written(of: type) -> str | None:
    """Returns the signature of a class whose fields are its arguments, or None for another."""
    fields = [one for one in _written(of).body if isinstance(one, ast.AnnAssign)]
    names = {ast.unparse(one.target) for one in fields}
    if not names or names != set(inspect.signature(of).parameters) - {"parent", "name"}:
        return None
    return f"({', '.join(ast.unparse(one) for one in fields)})"


def _written(obj: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]


def on_skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Members that a class has from elsewhere; fields of named tuples are in its list of attributes already."""
    del app, what, name, skip, options
    elsewhere = not getattr(obj, "__module__", project).startswith(project)
    return True if elsewhere or type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """Connects what is above to Sphinx."""
    app.connect("source-read", on_source_read)
    app.connect("include-read", on_include_read)
    # Napoleon is between the two, at 500.
    app.connect("autodoc-process-docstring", on_docstring, priority=400)
    app.connect("autodoc-process-docstring", on_docstring_of_data, priority=600)
    app.connect("autodoc-process-signature", on_signature)
    app.connect("autodoc-skip-member", on_skip)
