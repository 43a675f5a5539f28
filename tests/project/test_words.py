"""Words of a dialect that this project once had: none of them stands in what users read."""

import re

import pytest

from tests import ROOT

# Each with what to write instead.
BANNED = {
    r"anew": "again, or redrawn, recomputed",
    r"one's own": "your own",
    r"in the place of": "instead of",
    r"labels? in common": "shared labels",
    r"mended": "fixed",
    r"spoilt": "lost, undone",
    r"[Hh]ears": "receives, catches",
    r"told": "reported, known, stated",
    r"lives? (its|their) training|lived again": "replays",
    r"[Ww]hole or not at all": "atomically",
    r"(says?|said|tells?) nothing of": "does not apply to",
    r"[Ww]hat it withstands|are borne|is borne": "fault tolerance; tolerates",
    r"as [\w`.' -]{1,40} (has|have) (it|them)": "as in ...",
    r"for want of": "for lack of",
    r"come back to the digit": "repeat exactly",
    r"was never trained|were never trained": "untrained",
}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "experiments" / "README.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if not path.stem.startswith(("efficacy", "weights"))),
]
FOLDERS = ("merge_jax", "experiments", "benchmarks")


def banned_in(text):
    words = re.compile(rf"(?<![\w'])({'|'.join(BANNED)})(?!\w)")
    return [match[0] for match in words.finditer(" ".join(text.split()))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_of_pages(page):
    assert banned_in(page.read_text()) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_of_docstrings_comments_and_messages(folder):
    found = {str(path.relative_to(ROOT)): banned_in(path.read_text()) for path in (ROOT / folder).rglob("*.py")}
    assert {name: words for name, words in found.items() if words} == {}


def test_what_is_banned_is_found():
    assert banned_in("It is told\nanew, as Flax has them, in the\n    place of one's own.") == [
        "told",
        "anew",
        "as Flax has them",
        "in the place of",
        "one's own",
    ]
    assert banned_in("Apply them once; it told-tale renewed whatever") == ["told"]
