"""The site: builds without a warning, has every public name once, loads nothing from another host; project files."""

import inspect
import os
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import merge_jax as mj
from merge_jax import study
from tests import ROOT

pytestmark = pytest.mark.docs

SPHINX = ("sphinx", "myst_parser", "furo")

# What a browser fetches by itself, by element; a link is followed only by a reader.
LOADED = {
    "script": "src",
    "img": "src",
    "source": "src",
    "iframe": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}


class Page(NamedTuple):
    links: list[str]
    loaded: list[str]
    anchors: set[str]


class Reader(HTMLParser):
    """Collects the links of a page, what it loads, and its anchors."""

    def __init__(self):
        super().__init__()
        self.page = Page([], [], set())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if attributes.get("id"):
            self.page.anchors.add(attributes["id"])
        if tag == "a" and attributes.get("href"):
            self.page.links.append(attributes["href"])
        if tag == "link" and attributes.get("rel") != "canonical" and attributes.get("href"):
            self.page.loaded.append(attributes["href"])
        if attributes.get(LOADED.get(tag, "")):
            self.page.loaded.append(attributes[LOADED[tag]])


def read(path):
    reader = Reader()
    reader.feed(path.read_text())
    return reader.page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; the build fails on any warning, as of a link or an anchor that leads nowhere."""
    missing = [name for name in SPHINX if find_spec(name) is None]
    if missing:
        pytest.skip(f'the site needs {", ".join(missing)}: pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(folder)]
    # Its own cache: the build leaves nothing in the repository.
    command += ["-d", str(tmp_path_factory.mktemp("doctrees"))]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site): read(path) for path in site.rglob("*.html")}


PACKAGES = [mj, mj.checkpoints, mj.data, mj.models, mj.objectives, mj.runs, mj.training, mj.transfers, study]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_is_on_one_page_of_the_reference(package, pages):
    for name in package.__all__:
        if not inspect.ismodule(getattr(package, name)):
            # What the root has too stands there.
            full = f"{'merge_jax' if name in mj.__all__ else package.__name__}.{name}"
            found = [path for path, page in pages.items() if full in page.anchors and path.parts[0] == "reference"]
            assert len(found) == 1, f"{full}: {[str(path) for path in found]}"


def test_links_to_files_of_the_repository_lead_to_their_pages(pages):
    for page, links in {
        "efficacy.html": {"transfers.html", "weights.html", "efficacy_adapters.html"},
        "efficacy_adapters.html": {"efficacy_why.html", "efficacy_tables.html", "efficacy_aligned.html"},
        "efficacy_why.html": {"efficacy_adapters.html", "efficacy_options.html", "long_runs.html"},
        "experiments.html": {"efficacy.html", "transfers.html"},
        "index.html": {"quickstart.html", "changelog.html"},
        "quickstart.html": {"experiments.html", "benchmarks.html", "your_own_models.html", "efficacy.html"},
        "results.html": {"experiments.html", "benchmarks.html", "efficacy.html"},
    }.items():
        assert links <= {link.partition("#")[0] for link in pages[Path(page)].links}, page
    # A file without a page can be downloaded, as a notebook; a document has a page.
    downloads = [link for page in pages.values() for link in page.links if "_downloads" in link]
    assert not [link for link in downloads if link.endswith(".md")]


def test_pages_load_nothing_from_another_host(site, pages):
    loaded = [(path, one) for path, page in pages.items() for one in page.loaded]
    assert loaded
    for path, one in loaded:
        parts = urlsplit(one)
        assert parts.scheme in ("", "data"), f"{path}: {one}"
        assert not parts.netloc, f"{path}: {one}"
        if not parts.scheme:
            assert (site / os.path.normpath(path.parent / unquote(parts.path))).exists(), f"{path}: {one}"
    for style in site.rglob("*.css"):
        text = style.read_text()
        for mark in ("url(http", "url(//", 'url("http', "url('http", '@import "http', "@import url"):
            assert mark not in text, f"{style.name}: {mark}"


def test_the_citation_file_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"] == "merge_jax"
    assert citation["cff-version"] == "1.2.0"
    (paper,) = citation["references"]
    assert paper["title"] in (ROOT / "README.md").read_text()
    assert paper["authors"][0] == {"family-names": "Li", "given-names": "Kunxi"}
    assert "2404.13322" in paper["url"]


def test_ci_runs_what_a_change_must_pass():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert all(step["uses"].startswith("actions/") for step in steps if "uses" in step)
    (versions,) = [step["with"]["python-version"].split() for step in steps if "setup-python" in step.get("uses", "")]
    for version in versions:
        assert version in (ROOT / ".ci" / "run").read_text()
    assert versions == ["3.11", "3.13"]


def test_the_first_version_of_the_changelog_is_the_one_of_the_package():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    version = config["metadata"]["version"]
    assert version in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
