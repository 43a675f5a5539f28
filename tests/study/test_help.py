"""Every help fits a terminal of 80 columns."""

import functools
import re
from dataclasses import dataclass, field

import pytest
import tyro

from experiments import ablation, anatomy, cross_modal, cross_structure, cross_task, self_transfer
from merge_jax import study
from merge_jax.commands import main
from merge_jax.study.cli import folded, parse
from merge_jax.study.option_groups import GROUPS


def wide(text):
    return [line for line in text.splitlines() if len(line) > 80]


def without_boxes(text):
    return re.sub(r"[│─╭╮╰╯]|-{5,}", " ", text)


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
    # Every preset has a line of its own, and every option a group and a text.
    assert set(re.findall(r"^    (\w+)  +\S", shown, re.MULTILINE)) == set(module.PRESETS)
    found = re.findall(r"^ +(\w+) options +$", without_boxes(shown), re.MULTILINE)
    assert [name for name in found if "_model" not in name] == [name for name in GROUPS if name in found]
    texts = re.split(r"^ {1,3}--", without_boxes(shown), flags=re.MULTILINE)[1:]
    assert [text for text in texts if not re.search(r"\w.*\.\s+\(default", text, re.DOTALL)] == []


def test_the_most_used_options_come_first(capsys):
    with pytest.raises(SystemExit):
        parse(cross_structure.PRESETS, "", "", ["--help"])
    options = re.findall(r"^ {1,3}--([\w-]+)", without_boxes(capsys.readouterr().out), re.MULTILINE)
    fields = [name for _, members in GROUPS.values() for name in members]
    first = list(GROUPS["common"][1])
    assert [name.replace("-", "_") for name in options[: len(first)]] == fields[: len(first)] == first
    assert len(fields) == len(set(fields))


@dataclass(frozen=True, kw_only=True)
class _Own(study.RunConfig):
    depth: int = 3
    """How deep it
    is."""
    hidden: tyro.conf.Suppress[int] = 7
    model: study.Architecture = field(default_factory=study.Architecture)
    """Its network."""


def test_options_of_ones_own_scenario_are_a_group(capsys):
    presets = {"default": _Own(), "deep": _Own(depth=9, hidden=8)}
    chosen = parse(presets, "", "", ["deep", "--seeds", "2", "--model.layers", "4"])
    assert chosen == _Own(depth=9, hidden=8, seeds=2, model=study.Architecture(layers=4))
    with pytest.raises(SystemExit):
        parse(presets, "", "", ["--help"])
    shown = without_boxes(capsys.readouterr().out)
    assert re.search(r" scenario options .*?--depth INT\s+How deep it is\. \(default: 3\)", shown, re.DOTALL)
    assert "--hidden" not in shown


@pytest.mark.parametrize(
    "run", [functools.partial(ablation.main, "experiments.ablation", ablation.__doc__), anatomy.main]
)
def test_of_studies(run, capsys):
    with pytest.raises(SystemExit):
        run(["--help"])
    assert wide(capsys.readouterr().out) == []


@pytest.mark.parametrize("words", [[], ["run"], ["compare"], ["summary"], ["convert"], ["export"], ["doctor"]])
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
