"""Commands on runs and weights: what they print, write and refuse."""

import gc
import html.parser
import importlib.metadata
import importlib.util
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

import merge_jax as mj
import merge_jax.commands.compare
from merge_jax.commands import main
from merge_jax.runs import Comparison, Plan, Run, html_report
from merge_jax.runs.table import meaning, notes
from tests.commands.helpers import assert_equal_leaves, refused, said
from tests.smoke import run

LITTLE = ["smoke", "--seeds", "2", "--steps", "4", "--source-steps", "4", "--report-every", "2"]
LITTLE += ["--checkpoint-every", "4", "--methods", "vanilla", "share"]


def copy_of_seed(run, folder, seed, **options):
    """Copies a run with the results of one of its seeds alone, as if of these options."""
    shutil.copytree(run, folder)
    for name, changed in (("config", {"seeds": 1, **options}), ("plan", {"seeds": 1})):
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    for name in ("results", "opponents"):
        file = folder / f"{name}.json"
        file.write_text(json.dumps([row for row in json.loads(file.read_text()) if row["seed"] == seed]))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs; the second is the first one's seed 0, as if of another cycle."""
    folder = tmp_path_factory.mktemp("runs")
    run("cross_structure", folder / "one", *LITTLE)
    copy_of_seed(folder / "one", folder / "two", 0, cycle=2)
    return folder


def results(folder, method):
    rows = [row for name in ("results", "opponents") for row in json.loads((folder / f"{name}.json").read_text())]
    return {row["seed"]: 100 * row["target_test"] for row in rows if method in (row.get("method"), row.get("opponent"))}


def formatted(values, sign=""):
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{error}"


def test_one_run_compared_is_its_own_table(runs, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    printed = said(capsys, "compare", runs / "one", "--out", out)
    table = (runs / "one" / "table.txt").read_text()
    assert printed == table + f"table and curves: {out}\n"
    assert (out / "table.txt").read_text() == table
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    vanilla, share = (results(runs / "one", method) for method in ("vanilla", "share"))
    assert formatted(list(vanilla.values())) in table
    assert formatted([share[seed] - vanilla[seed] for seed in (0, 1)], "+") in table
    for expected in ("small_resnet -> small_mobilenet_v2", "after the last of 4 steps", "over 2 seeds", "1 x cpu, "):
        assert expected in table


def test_runs_are_compared_by_seed_and_told_apart(runs, tmp_path, capsys):
    printed = said(capsys, "compare", runs / "one", runs / "two", "--out", tmp_path / "out", "--baseline", "share")
    baseline = results(runs / "one", "share")
    rows = {tuple(line.split()[:2]): line for line in printed.splitlines() if line.startswith((" one", " two"))}
    shown = ("vanilla", "share", "inputs_lr", "source_lr", "source")
    assert list(rows) == [(run, name) for run in ("one", "two") for name in shown]
    assert "inputs_lr: logistic regression on the raw inputs" in " ".join(printed.split())
    for (name, method), line in rows.items():
        values = results(runs / name, method)
        assert formatted(list(values.values())) in line
        if (name, method) != ("one", "share"):
            differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
            assert f" {formatted(differences, '+')} " in line
    assert "options of one and two: cycle 1 and 2; seeds 2 and 1" in printed.replace("\n", " ")
    assert "small_resnet (5,018) -> small_mobilenet_v2 (1,906 parameters)" in printed.replace("\n", " ")


def test_runs_of_other_seeds_are_joined(runs, tmp_path, capsys):
    # The first run in two: each has one of its seeds.
    parts = [copy_of_seed(runs / "one", tmp_path / f"seed{seed}", seed, first_seed=seed) for seed in (0, 1)]
    printed = said(capsys, "compare", *parts, runs / "two", "--out", tmp_path / "out")
    rows = {tuple(line.rsplit("%", 1)[-1].split()[:4]): line for line in printed.splitlines() if " + seed1 " in line}
    vanilla, share = (results(runs / "one", method) for method in ("vanilla", "share"))
    row = rows["seed0", "+", "seed1", "share"]
    assert formatted(list(share.values())) in row
    assert formatted([share[seed] - vanilla[seed] for seed in (0, 1)], "+") in row
    said_of = " ".join(printed.split())
    assert "seed0 + seed1: one row, since they have the same options and other seeds" in said_of
    assert "seeds that two has in common with seed0 + seed1, of 2: vanilla 1, share 1" in said_of
    assert "options of seed0 + seed1 and two: cycle 1 and 2; seeds 2 and 1" in said_of


def test_runs_that_are_tested_otherwise_have_no_differences(runs, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs / "two", other)
    plan = json.loads((other / "plan.json").read_text())
    plan["target"]["examples"][2] += 1
    (other / "plan.json").write_text(json.dumps(plan))
    printed = said(capsys, "compare", runs / "one", other, "--out", tmp_path / "out")
    assert "other is tested otherwise than one: no differences between them" in printed.replace("\n", " ")
    (row,) = [line for line in printed.splitlines() if line.split()[:2] == ["other", "share"]]
    assert "+" not in row
    assert "-" not in row


def test_a_comparison_goes_into_the_next_numbered_folder(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002"):
        assert f"table and curves: runs/compare-{number}" in said(capsys, "compare", runs / "one", runs / "two")
        assert (tmp_path / "runs" / f"compare-{number}" / "curves.png").exists()


def test_a_comparison_that_is_written_meanwhile_is_not_overwritten(tmp_path, capsys, monkeypatch):
    def slow(runs, baseline):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "table.txt").write_text("of another")
        return Comparison("mine\n", Figure())

    monkeypatch.setattr(merge_jax.commands.compare, "compare", slow)
    message = refused(capsys, "compare", "one", "two", "--out", tmp_path / "out")
    assert f"{tmp_path}/out/table.txt already exists and is not overwritten: choose another --out" in message
    assert (tmp_path / "out" / "table.txt").read_text() == "of another"
    assert not (tmp_path / "out" / "curves.png").exists()


def test_one_run_alone_has_its_table_already(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(capsys, "compare", runs / "one") == (runs / "one" / "table.txt").read_text()
    assert not list(tmp_path.iterdir())


def test_few_seeds_in_common_and_other_lengths_are_told(runs, tmp_path, capsys):
    longer = tmp_path / "longer"
    shutil.copytree(runs / "two", longer)
    plan = json.loads((longer / "plan.json").read_text())
    wider = {**plan["target"], "parameters": 2000}
    (longer / "plan.json").write_text(json.dumps({**plan, "steps": 8, "target": wider}))
    printed = said(capsys, "compare", runs / "one", longer, "--out", tmp_path / "out").replace("\n", " ")
    assert "seeds that longer has in common with one, of 2: vanilla 1, share 1" in printed
    assert "longer trains 8 steps, one 4: their differences are of that too" in printed
    named = "small_mobilenet_v2 of 2,000 parameters, not small_mobilenet_v2 of 1,906"
    assert f"longer has another target than one: {named}" in printed
    printed = said(capsys, "compare", runs / "two", runs / "one", "--out", tmp_path / "other").replace("\n", " ")
    assert "in common" not in printed
    assert "their differences are of that too" not in printed


def test_what_cannot_be_compared_is_named(runs, tmp_path, capsys):
    assert f"there is no run folder {runs / 'on'}; did you mean" in refused(capsys, "compare", runs / "on")
    assert refused(capsys, "compare", tmp_path) == f"{tmp_path} is not a run folder: it has no config.json"
    assert f"; there are runs in it: {runs / 'one'}, {runs / 'two'}" in refused(capsys, "compare", runs)
    assert "is named twice" in refused(capsys, "compare", runs / "one", runs / "one" / "." / "")
    message = refused(capsys, "compare", runs / "one", "--baseline", "shared")
    assert message == f"{runs / 'one'} has no method 'shared'; did you mean 'share'?"
    message = refused(capsys, "compare", runs / "one", "--out", runs)
    assert message == f"{runs} already exists and is not overwritten: choose another --out"
    broken = tmp_path / "broken"
    for name, content, expected in (
        ("results.json", "[]", "no method of the run {} has ended yet: resume it first"),
        ("results.json", "[", "the run folder {} is damaged: JSONDecodeError: "),
        ("plan.json", "{}", "the run folder {} is damaged: KeyError: 'transfers'"),
        ("plan.json", None, "{} has no plan.json: resume the run with this version, which writes it"),
    ):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(runs / "one", broken)
        (broken / name).unlink()
        if content is not None:
            (broken / name).write_text(content)
        assert refused(capsys, "compare", broken).startswith(expected.format(broken))
    assert not (tmp_path / "runs").exists()


def test_the_plan_is_kept_and_tells_what_moves(runs):
    run = Run.read(runs / "one")
    assert Plan.from_json(run.plan.to_json()) == run.plan
    lines = run.plan.lines()
    assert "source: small_resnet, 5,018 parameters; 1197 examples to train, 200 to validate, 400 to test" in lines
    assert "1 route (target <- source) of share: fc/kernel <- fc/kernel" in lines
    assert "steps that transfer, of 4: share 4 (every 1)" in lines
    caution = "a smoke test: it shows that all works; its figures mean nothing"
    assert caution in lines
    assert caution in (runs / "one" / "table.txt").read_text()


class Page(html.parser.HTMLParser):
    """The text of a page and all that it refers to."""

    def __init__(self, page):
        super().__init__()
        self.text, self.links, self.tags = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_a_run_is_one_page_that_needs_nothing_else(runs):
    source = (runs / "one" / "report.html").read_text()
    page = Page(source)
    assert len(page.links) == 1
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "url(" not in source
    assert "@import" not in source
    assert not {"script", "link", "iframe"} & set(page.tags)
    text = "".join(page.text)
    run = Run.read(runs / "one")
    for expected in (*run.plan.lines(), *run.config, run.sessions[0]["command"], run.sessions[0]["versions"]["jax"]):
        assert expected in text
    assert formatted(list(results(runs / "one", "share").values())) in text
    assert f" --run-dir {run.path} --resume" in text
    assert f"merge-jax export {run.path}/checkpoints/share-seed0 one.safetensors" in text
    assert html_report(run) == source  # The same again, to the byte.


def test_options_of_the_command_come_first_and_others_are_folded(runs):
    run = Run.read(runs / "one")
    command = "python -m experiments.cross_structure smoke --seeds 2 --target_rate=0.5 --source-steps 4 --no-head-first"
    run = replace(run, sessions=[*run.sessions, {**run.sessions[0], "command": f"{command} --resume"}])
    page = html_report(run)  # Of the last session, which may have more seeds and methods than the first.
    assert f"{command} --run-dir {run.path} --resume" in page
    assert notes(run)[-2] == run.command == command
    shown, _, folded = page.partition("<h2>Options</h2>")[2].partition("<h2>")[0].partition("<details>")
    names = re.compile(r"<tr><td>(\w+)</td>")
    given = {"seeds", "target_rate", "source_steps", "head_first"}
    assert names.findall(shown) == [name for name in run.config if name in given]
    assert names.findall(folded) == [name for name in run.config if name not in given]
    assert folded.rstrip().endswith("</details>")


def test_what_a_page_shows_is_text_and_never_markup(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "run")
    for name in ("environment.json", "config.json", "plan.json"):
        path = tmp_path / "run" / name
        evil = json.dumps("<script>alert(1)</script>").strip('"')
        path.write_text(
            path.read_text().replace("small_resnet", evil).replace("pytest", evil).replace("pretrained", evil)
        )
    page = html_report(Run.read(tmp_path / "run"))
    assert "&lt;script&gt;" in page
    assert "script" not in Page(page).tags


@pytest.mark.parametrize(("vanilla", "share", "expected"), [
    ([50, 50, 50], [60, 61, 62],
     "share gains most, +11.0 ± 0.6 points of test accuracy over vanilla in 3 seeds, more than twice its standard "
     "error."),
    ([50, 50, 50], [40, 50, 63],
     "No method surely gains: the best, share, comes to +1.0 ± 6.7 points of test accuracy over vanilla, not more than "
     "twice its standard error."),
    ([50], [60],
     "share comes to +10.0 points of test accuracy over vanilla, but fewer than three seeds make nothing sure."),
    ([50, 50, 50], [], "No method stands beside vanilla, so there is no gain to tell."),
])  # fmt: skip
def test_a_page_says_in_a_sentence_what_the_result_means(runs, tmp_path, vanilla, share, expected):
    shutil.copytree(runs / "one", tmp_path / "run")
    (template,) = json.loads((runs / "one" / "results.json").read_text())[:1]
    rows = [
        {**template, "method": method, "seed": seed, "target_test": value / 100}
        for method, values in (("vanilla", vanilla), ("share", share))
        for seed, value in enumerate(values)
    ]
    (tmp_path / "run" / "results.json").write_text(json.dumps(rows))
    found = Run.read(tmp_path / "run")
    found = replace(found, plan=replace(found.plan, caution=""))
    assert meaning(found) == expected
    assert expected in "".join(Page(html_report(found)).text)


def test_wide_tables_scroll_by_themselves(runs):
    """At the width of a phone the page does not scroll sideways."""
    source = (runs / "one" / "report.html").read_text()
    assert source.count("<table") == source.count('<div class="wide">\n<table') > 0
    assert ".wide { overflow-x: auto;" in source


def test_gates_and_samples_are_on_the_page(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"run": "share-seed0", "step": 2, "adapter/gate": 0.5}) + "\n")
    shutil.copy(runs / "one" / "curves.png", tmp_path / "run" / "samples.png")
    page = Page(html_report(Run.read(tmp_path / "run")))
    kinds = [link.partition(";")[0] for link in page.links]
    assert kinds == ["data:image/svg+xml", "data:image/svg+xml", "data:image/png"]


def test_a_summary_tells_what_a_run_has(runs, capsys):
    printed = said(capsys, "summary", runs / "one")
    for cell in ("share-seed0", "share-seed1", "source-seed0", "source-seed1", "vanilla-seed0", "vanilla-seed1"):
        assert f"checkpoints/{cell} " in printed


@pytest.mark.parametrize("step", ["", "4"])
def test_a_summary_counts_a_states_parts(runs, capsys, step):
    cell = runs / "one" / "checkpoints" / "share-seed0"
    printed = said(capsys, "summary", cell / step, "--verify", "--leaves", "target/params/fc/*")
    rows = {line.split()[0]: line.split()[1:4] for line in printed.splitlines() if "/params  " in line}
    assert rows["target/params"] == ["22", "1,906", "7,624"]
    assert rows["source/params"] == ["11", "5,018", "20,072"]
    assert "target/params/fc/kernel  float32[64, 10]" in printed
    assert "target/params/fc/bias  float32[10]" in printed
    assert "stem" not in printed
    assert "leaves are as they were saved" in printed


def test_what_cannot_be_summed_up_is_named(runs, tmp_path, capsys):
    cell = runs / "one" / "checkpoints" / "share-seed0"
    assert "did you mean" in refused(capsys, "summary", cell.with_name("share-seed9"))
    assert (
        refused(capsys, "summary", cell / "7") == f"there is no folder {cell / '7'}; did you mean {str(cell / '4')!r}?"
    )
    assert "is a whole run: name one of its folders, such as" in refused(capsys, "summary", runs / "one", "--verify")
    assert refused(capsys, "summary", tmp_path) == f"{tmp_path} has no checkpoints"
    assert "'target/params/fd/*'" in refused(capsys, "summary", cell, "--leaves", "target/params/fd/*")


# What Orbax had begun when it fails is not awaited; it is collected here, where that is no error.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)
def test_changed_numbers_are_seen_by_verify_and_never_exported(runs, tmp_path, capsys):
    cell = tmp_path / "share-seed0"
    shutil.copytree(runs / "one" / "checkpoints" / "share-seed0", cell)
    arrays = max((path for path in (cell / "4").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    assert "damaged checkpoint" in refused(capsys, "summary", cell, "--verify")
    assert "damaged checkpoint" in refused(capsys, "export", cell, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    gc.collect()


@pytest.mark.parametrize("options", [[], ["--best"]])
def test_an_exported_model_is_the_trained_one(runs, tmp_path, capsys, options):
    cell, file = runs / "one" / "checkpoints" / "share-seed0", tmp_path / "m.safetensors"
    printed = said(capsys, "export", cell, file, *options)
    assert printed.startswith("target of step 4, 2,130 numbers: ")
    with mj.Checkpoints(cell, read_only=True) as checkpoints:
        saved = checkpoints.restore_arrays(4)["target"]
    variables = {"params": saved["params"], **saved["model_state"]}
    assert_equal_leaves(mj.load_safetensors(file), variables)
    # What is printed reads it, and computes with it what the model of the run does.
    images = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
    names = {"inputs": images}
    assert "apply = model.apply  # Of images [N, 8, 8, 1], float32 in [0, 1]." in printed
    exec(printed.partition("\n")[2], names)
    expected = mj.models.small_mobilenet_v2(10, num_stages=1).apply(variables, images)
    np.testing.assert_array_equal(names["outputs"], expected)


def test_an_exported_part_is_as_it_is_saved(runs, tmp_path, capsys):
    cell, file = runs / "one" / "checkpoints" / "share-seed0", tmp_path / "m.safetensors"
    printed = said(capsys, "export", cell, file, "--part", "target/params")
    assert printed == f"target/params of step 4, 1,906 numbers: {file}\n"
    with mj.Checkpoints(cell, read_only=True) as checkpoints:
        assert_equal_leaves(mj.load_safetensors(file), checkpoints.restore_arrays(4)["target"]["params"])


def test_an_exported_source_is_told_as_one(runs, tmp_path, capsys):
    cells = runs / "one" / "checkpoints"
    alone = said(capsys, "export", cells / "source-seed0", tmp_path / "s.safetensors")
    in_pair = said(capsys, "export", cells / "share-seed0", tmp_path / "t.safetensors", "--part", "source")
    assert alone.startswith("source of step 4, 5,114 numbers: ")
    assert "# small_resnet, in Python:\n" in alone
    assert "# small_resnet, in Python:\n" in in_pair
    assert_equal_leaves(
        mj.load_safetensors(tmp_path / "s.safetensors"), mj.load_safetensors(tmp_path / "t.safetensors")
    )


def test_what_cannot_be_exported_is_named(runs, tmp_path, capsys):
    cell, file = runs / "one" / "checkpoints" / "share-seed0", tmp_path / "m.safetensors"
    assert refused(capsys, "export", cell, tmp_path / "m.npz").endswith(
        "must end in .safetensors, the format that is written"
    )
    message = refused(capsys, "export", cell, file, "--part", "target/param")
    assert message.startswith("the checkpoint has no part 'target/param'; did you mean 'target/params'")
    assert "it is a run, name one of" in refused(capsys, "export", runs / "one", file)
    assert "leave out --best" in refused(capsys, "export", cell / "4", file, "--best")
    file.write_text("mine")
    assert refused(capsys, "export", cell, file).endswith("is not overwritten: choose another name")
    assert file.read_text() == "mine"


def test_without_a_command_there_is_help_and_an_exit_code(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("run", "compare", "summary", "export", "convert", "doctor", "exit codes"))
    assert said(capsys, "--version").strip() == importlib.metadata.version("merge_jax")
