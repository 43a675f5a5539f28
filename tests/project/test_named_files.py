"""Files that documents name are there."""

import re

import pytest

from tests import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "experiments" / "README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_that_a_document_names_is_there(document):
    named = set(re.findall(r"`([\w/]+/\w+\.py)`", document.read_text()))
    places = [ROOT, ROOT / "merge_jax"]
    assert {name for name in named if not any((place / name).exists() for place in places)} == set()
