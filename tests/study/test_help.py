"""Every help fits a terminal of 80 columns."""

import functools

import pytest

from experiments import ablation, anatomy, cross_modal, cross_structure, cross_task, self_transfer
from merge_jax.commands import main
from merge_jax.study.cli import folded, parse


def wide(text):
    return [line for line in text.splitlines() if len(line) > 80]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("module", [cross_structure, cross_task, cross_modal, self_transfer])
def test_of_experiments(module, capsys):
    with pytest.raises(SystemExit):
        parse(module.PRESETS, module.__name__, module.__doc__, ["--help"])
    shown = capsys.readouterr().out
    assert wide(shown) == []
    assert "PRESET is one of default," in shown


@pytest.mark.parametrize(
    "run", [functools.partial(ablation.main, "experiments.ablation", ablation.__doc__), anatomy.main]
)
def test_of_studies(run, capsys):
    with pytest.raises(SystemExit):
        run(["--help"])
    assert wide(capsys.readouterr().out) == []


@pytest.mark.parametrize("words", [[], ["run"], ["compare"], ["summary"], ["export"], ["doctor"]])
def test_of_commands(words, capsys):
    if words == ["run"]:
        main([*words, "--help"])
    else:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
    assert wide(capsys.readouterr().out) == []


def test_paragraphs_are_folded_and_commands_keep_their_lines():
    text = "One.\n\n    do this  # it takes long\n    then that\n\nTwo words\nof one paragraph.\n- an item"
    assert folded(text) == "\n".join(
        [" One.", "", "    do this  # it takes long", "    then that", "", " Two words of one paragraph.", " - an item"]
    )
    told = folded("x\n\n    command" + " word" * 10 + "  # " + "comment " * 8).splitlines()
    assert told[2] == "    command" + " word" * 10
    assert told[3].startswith("        # comment")
