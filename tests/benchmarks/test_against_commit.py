"""`benchmarks.against_commit`: the arithmetic of its table, its processes, and one real comparison of this tree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from benchmarks import against_commit, measured_program
from benchmarks.against_commit import Config, Side, chosen, main, markdown, measure, rows_of
from benchmarks.measured_tree import MeasurementError, Tree, child_environment, work_tree
from benchmarks.measurements import MEASUREMENTS, Measurement, Target
from tests import ROOT

BEFORE, AFTER = Tree(Path("before"), Path("python")), Tree(Path("after"), Path("python"))


def git(folder, *words):
    name = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *name, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def is_checkout():
    try:
        return Path(git(ROOT, "rev-parse", "--show-toplevel")).resolve() == ROOT.resolve()
    except (OSError, subprocess.CalledProcessError):
        return False


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "file").write_text("1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def scripted(figures, calls=None):
    """A program that gives the next of the figures of the tree's name; an exception among them is raised."""
    left = {name: iter(values) for name, values in figures.items()}

    def program(tree):
        if calls is not None:
            calls.append(tree.root.name)
        value = next(left[tree.root.name])
        if isinstance(value, Exception):
            raise value
        return value

    return program


def seconds(*values):
    return [value if isinstance(value, Exception) else {"CPU s": value, "wall s": 2 * value} for value in values]


def measured(measurement, repetitions=3):
    sides = measure(measurement, BEFORE, AFTER, repetitions, tqdm(disable=True))
    return rows_of("it", measurement, *sides)


def test_sides_are_measured_in_turns_and_the_ratio_is_that_of_neighbours():
    calls = []
    program = scripted({"before": seconds(4.0, 10.0, 20.0), "after": seconds(2.0, 1.0, 6.0)}, calls)
    judged, wall = measured(Measurement(what="", program=program, targets=(Target("CPU s", "ratio", 0.3),)))
    assert calls == ["before", "after"] * 3
    # Ratios 0.5, 0.1 and 0.3; the ratio of the medians would be 0.2.
    assert judged.cells() == ("it", "CPU s", "10.0", "2.00", "0.300", "ratio <= 0.3", "yes")
    assert wall.cells() == ("it", "wall s", "20.0", "4.00", "0.300", "", "")


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        (Target("CPU s", "ratio", 1 / 4), "yes"),
        (Target("CPU s", "ratio", 1 / 5), "no"),
        (Target("CPU s", "value", 2.0), "yes"),
        (Target("CPU s", "value", 1.9), "no"),
    ],
)
def test_targets_are_limits_that_may_be_met_exactly(target, reached):
    program = scripted({"before": seconds(8.0), "after": seconds(2.0)})
    row, _ = measured(Measurement(what="", program=program, targets=(target,)), 1)
    assert row.cells()[-1] == reached


def test_a_base_is_a_program_of_this_tree():
    calls = []
    base, program = (scripted({"after": seconds(*values)}, calls) for values in ((2.0, 2.0), (2.5, 2.7)))
    row, _ = measured(Measurement(what="", program=program, base=base, targets=(Target("CPU s", "ratio", 1.3),)), 2)
    assert calls == ["after"] * 4
    assert row.cells() == ("it", "CPU s", "2.00", "2.60", "1.300", "ratio <= 1.3", "yes")


def test_alone_there_is_nothing_before_and_no_ratio():
    program = scripted({"after": [{"second / first": 0.2}]})
    (row,) = measured(
        Measurement(what="", program=program, alone=True, targets=(Target("second / first", "value", 0.25),)), 1
    )
    assert row.cells() == ("it", "second / first", "", "0.20", "", "value <= 1/4", "yes")


def test_a_failure_before_is_told_and_the_other_side_is_still_measured():
    calls = []
    failing = scripted(
        {"before": [*seconds(1.0), MeasurementError("ImportError: no | name")], "after": seconds(2.0, 4.0, 3.0)}, calls
    )
    targets = (Target("CPU s", "ratio", 0.5), Target("wall s", "value", 6.0))
    ratio, value = measured(Measurement(what="", program=failing, targets=targets))
    assert calls == ["before", "after", "before", "after", "after"]
    assert ratio.cells() == (
        *("it", "CPU s", "failed: ImportError: no / name", "3.00", ""),
        *("ratio <= 1/2", "not known"),
    )
    assert value.cells()[-1] == "yes"


def test_what_fails_after_has_missed_its_target():
    program = scripted({"before": seconds(1.0), "after": [KeyError("rows")]})
    judged, wall = measured(Measurement(what="", program=program, targets=(Target("CPU s", "ratio", 0.5),)), 1)
    assert judged.cells() == ("it", "CPU s", "1.00", "failed: KeyError: 'rows'", "", "ratio <= 1/2", "no")
    assert wall.cells()[-1] == ""


def test_where_both_fail_and_nothing_is_aimed_for_there_is_a_row():
    program = scripted({"before": [MeasurementError("a")], "after": [MeasurementError("b")]})
    (row,) = measured(Measurement(what="", program=program), 1)
    assert row.cells() == ("it", "", "failed: a", "failed: b", "", "", "")


def test_a_figure_of_one_side_alone_has_no_ratio():
    program = scripted({"before": [{"old": 1.0}], "after": [{"new": 2.0}]})
    rows = measured(Measurement(what="", program=program, targets=(Target("new", "ratio", 1.0),)), 1)
    assert [row.cells()[1:] for row in rows] == [
        ("new", "", "2.00", "", "ratio <= 1", "not known"),
        ("old", "1.00", "", "", "", ""),
    ]


def test_the_table_is_markdown():
    assert markdown(("a", "b"), [("1", "2"), ("3", "")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"


@pytest.mark.parametrize(
    ("limit", "text"), [(1 / 40, "1/40"), (1 / 12, "1/12"), (0.6, "0.6"), (1.0, "1"), (1.03, "1.03"), (2.0, "2")]
)
def test_limits_are_told_as_they_were_set(limit, text):
    assert str(Target("CPU s", "ratio", limit)) == f"ratio <= {text}"


def test_heavy_ones_are_taken_when_asked_for():
    heavy = {name for name, one in MEASUREMENTS.items() if one.heavy}
    assert heavy
    assert set(chosen(Config(commit="HEAD"))) == MEASUREMENTS.keys() - heavy
    assert chosen(Config(commit="HEAD", heavy=True)).keys() == MEASUREMENTS.keys()
    assert list(chosen(Config(commit="HEAD", only=("tests", "help", "tests")))) == ["tests", "help"]


def test_all_targets_are_listed(capsys):
    main(["--list"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == list(MEASUREMENTS)
    assert rows[0][2] == "CPU s: ratio <= 1/40"


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_unknown_measurement_is_one_line_with_near_misses(capsys):
    line = refused(capsys, "HEAD", "--only", "help", "grad_5x3")
    assert line.startswith("error: unknown measurement 'grad_5x3'; did you mean")
    assert "grad_5x2" in line


def test_without_a_commit_is_one_line(capsys):
    assert refused(capsys) == ("error: name the commit to compare with, e.g. HEAD~1; --list lists what is measured")


def test_no_repetitions_are_one_line(capsys):
    assert "repetitions must be a whole number of at least 1" in refused(capsys, "HEAD", "--repetitions", "0")


def test_a_folder_without_git_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(against_commit, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert refused(capsys, "HEAD").startswith(f"error: {tmp_path} is no git repository: ")


def test_a_folder_inside_another_repository_is_one_line(capsys, monkeypatch, repository):
    (repository / "inner").mkdir()
    monkeypatch.setattr(against_commit, "ROOT", repository / "inner")
    assert "is no git repository of its own" in refused(capsys, "HEAD")


@pytest.mark.parametrize("name", ["nowhere", "--all", "HEAD:file"])
def test_an_unknown_commit_is_one_line(capsys, monkeypatch, repository, name):
    monkeypatch.setattr(against_commit, "ROOT", repository)
    with pytest.raises(ValueError, match="there is no commit"):
        against_commit._resolve(Config(commit=name))
    assert refused(capsys, "nowhere") == f"error: there is no commit 'nowhere' in {repository}"


def test_changes_without_a_commit_are_refused_unless_allowed(capsys, monkeypatch, repository):
    monkeypatch.setattr(against_commit, "ROOT", repository)
    head = git(repository, "rev-parse", "HEAD")
    assert against_commit._resolve(Config(commit="HEAD")) == (head, head)
    (repository / "file").write_text("2\n")
    assert "1 changes in" in refused(capsys, "HEAD")
    assert against_commit._resolve(Config(commit="HEAD", dirty=True)) == (head, f"{head}-dirty")


def test_a_work_tree_has_the_commit_and_is_removed_even_after_an_error(repository, tmp_path):
    first = git(repository, "rev-parse", "HEAD")
    (repository / "file").write_text("2\n")
    git(repository, "commit", "-q", "-a", "-m", "second")
    folder = tmp_path / "tree"

    def stopped():
        with work_tree(repository, first, folder):
            assert (folder / "file").read_text() == "1\n"
            (folder / "written").touch()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert not folder.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_measured_processes_find_no_other_code_and_nothing_compiled():
    python = Path("/e/bin/python")
    given = {
        "PATH": "/usr/bin",
        "HOME": "/h",
        "PYTHONPATH": "/other",
        "JAX_COMPILATION_CACHE_DIR": "/c",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    assert child_environment(given, python) == {
        "PATH": f"/e/bin{os.pathsep}/usr/bin",
        "HOME": "/h",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "VIRTUAL_ENV": "/e",
    }


HERE = Tree(ROOT, Path(sys.executable))
_WORK = "import time\nwhile time.process_time() < 0.3: pass"


def test_a_process_is_counted_with_its_children(tmp_path):
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {_WORK!r}])\nprint('done')"
    done = HERE.run(("-c", code), tmp_path)
    assert done.output == "done\n"
    assert done.cpu >= 0.3
    assert done.wall > 0


def test_a_mark_is_seen_before_the_end(tmp_path):
    code = f"open('mark', 'w').close()\n{_WORK}"
    done = HERE.run(("-c", code), tmp_path, mark=(tmp_path / "mark").exists)
    assert done.marked is not None
    assert done.marked[1] < done.wall


def test_a_failed_process_is_told_by_its_last_line(tmp_path):
    with pytest.raises(MeasurementError, match=r"^ValueError: of words$"):
        HERE.run(("-c", "import sys; print('out'); raise ValueError('of words')"), tmp_path)
    with pytest.raises(MeasurementError, match=r"^exit code 3$"):
        HERE.run(("-c", "raise SystemExit(3)"), tmp_path)


def printed(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["measured_program", *map(str, words)])
    measured_program.main()
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["init"], ["gradient", "--size", 4, "--routes", 2]])
def test_programs_print_their_seconds(capsys, monkeypatch, words):
    figures = printed(capsys, monkeypatch, ROOT, *words)
    assert figures.keys() == {"CPU s", "wall s"}
    assert min(figures.values()) > 0


def test_the_routes_are_unlike():
    routes, source, target = measured_program._small_routes(5)
    assert len(routes) == 5
    shapes = [
        tuple(tree[f"{role}_{i}"]["kernel"].shape for i in (0, 4))
        for role, tree in (("source", source), ("target", target))
    ]
    assert shapes == [((3, 3, 16, 16), (3, 3, 32, 32)), ((1, 1, 8, 24), (1, 1, 12, 28))]


def test_code_of_another_tree_is_refused(capsys, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="error: merge_jax is that of"):
        printed(capsys, monkeypatch, tmp_path, "where")


@pytest.mark.slow
@pytest.mark.skipif(not is_checkout(), reason="this is no git checkout")
def test_this_tree_against_its_own_commit(capsys, monkeypatch, tmp_path):
    """Real environments and processes; the tree of the commit is really that which is imported, or `where` fails."""
    monkeypatch.chdir(tmp_path)
    trees = git(ROOT, "worktree", "list")
    main(["HEAD", "--only", "help", "--repetitions", "1", "--dirty"])
    assert git(ROOT, "worktree", "list") == trees
    (file,) = tmp_path.glob("runs/benchmarks/against_*.json")
    content = json.loads(file.read_text())
    cpu, wall = content["rows"]
    assert (cpu["measurement"], cpu["figure"], cpu["failures"]) == ("help", "CPU s", ["", ""])
    assert cpu["ratio"] == pytest.approx(cpu["after"] / cpu["before"])
    assert wall["figure"] == "wall s"
    places = content["environment"]
    assert Path(places["after"]["merge_jax"]) == ROOT / "merge_jax" / "__init__.py"
    assert not Path(places["before"]["merge_jax"]).is_relative_to(ROOT)
    assert places["before"]["versions"] == places["after"]["versions"]
    assert capsys.readouterr().out.startswith("| measurement | figure | before | after | ratio | target | reached |\n")


def test_a_side_takes_no_more_after_a_failure():
    side = Side()
    program = scripted({"after": [OSError("gone"), *seconds(1.0)]})
    side.take(program, AFTER)
    side.take(program, AFTER)
    assert (side.failure, side.taken) == ("OSError: gone", [])
