"""Every experiment, stopped in the middle of an epoch and of a report, ends as the unbroken run does, bit for bit."""

import json
import re

import pytest

from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.study import trial
from merge_jax.training.signals import StopSignals
from tests.data import test_cifar
from tests.smoke import run

# Ten steps a call, so that the first call ends between two reports, and within an epoch.
LENGTHS = ["--steps", "20", "--report-every", "15", "--checkpoint-every", "15", "--cycle", "3"]
LPKA = [
    *("--attention-dropout", "0.1", "--feed-forward-dropout", "0.2", "--num-layers", "1", "--num-heads", "1"),
]
PRETRAINED = ("--source-steps", "20")
# The kinds of sources, by an experiment that compiles in a second; its model has dropout and BatchNorm.
OF_SOURCES = {
    "pretrained": ((1, 3), *PRETRAINED),
    "trajectory": ((4,), *PRETRAINED, "--source", "trajectory", "--snapshots", "2"),
    "live": ((1,), "--source", "live"),
    "itself": ((1,), "--inside"),
}
# A source that is trained first has three calls of its own; the fourth is the method's first.
CASES = {
    "trajectory": ((4,), "cross_task", "mergenet_warm", *PRETRAINED, "--source", "trajectory", "--snapshots", "2"),
    "live": ((1,), "cross_modal", "mergenet_warm", "--source", "live"),
    "itself": ((1,), "self_transfer", "mergenet_warm_tf_kd"),
}


def stopping_at(monkeypatch, call):
    """Makes runs stop after so many calls of their epoch, as a signal would; None for never."""
    calls = []

    def should_stop(signals):
        calls.append(None)
        return len(calls) == call

    monkeypatch.setattr(StopSignals, "should_stop", should_stop)


def digests(folder):
    """The digest of every leaf of the last step of every trial, taken of what is restored."""
    found = {}
    for path in (folder / "checkpoints").iterdir():
        with Checkpoints(path, read_only=True) as checkpoints:
            manifest = checkpoints.manifest(checkpoints.latest_step)
        assert manifest.step == 20
        found[path.name] = {name: leaf.sha256 for name, leaf in manifest.leaves.items()}
    return found


def results_of(folder):
    timed = ("seconds", "compile_seconds")
    results = json.loads((folder / "results.json").read_text())
    return [{name: value for name, value in result.items() if name not in timed} for result in results]


def check(monkeypatch, tmp_path, capsys, experiment, words, calls, least=21):
    run(experiment, tmp_path / "unbroken", *words)
    for number, call in enumerate(calls):
        stopping_at(monkeypatch, call)
        with pytest.raises(SystemExit) as stopped:
            run(experiment, tmp_path / "broken", *words, *(["--resume"] if number else []))
        assert stopped.value.code == 128
        printed = capsys.readouterr().err
        assert "step 10 of 20, which is saved; the same command with --resume" in printed, printed[-1000:]
    stopping_at(monkeypatch, None)
    run(experiment, tmp_path / "broken", *words, "--resume")
    expected = digests(tmp_path / "unbroken")
    assert any(len(leaves) >= least for leaves in expected.values())
    assert digests(tmp_path / "broken") == expected
    assert results_of(tmp_path / "broken") == results_of(tmp_path / "unbroken")


@pytest.mark.parametrize(
    "case",
    ["live", *(pytest.param(case, marks=pytest.mark.slow) for case in ("itself", "pretrained", "trajectory"))],
)
def test_stopped_in_the_middle_a_run_ends_as_the_unbroken_one(case, monkeypatch, tmp_path, capsys):
    calls, *options = OF_SOURCES[case]
    words = [*LENGTHS, "--methods", "operators", "--dropout", "0.2", "--seeds", "1", "--batch-size", "40", *options]
    check(monkeypatch, tmp_path, capsys, "tiny", words, calls, least=5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_so_does_one_of_each_experiment(case, monkeypatch, tmp_path, capsys):
    calls, experiment, method, *options = CASES[case]
    words = ["smoke", *LENGTHS, *LPKA, "--methods", method, *options]
    check(monkeypatch, tmp_path, capsys, experiment, words, calls)


@pytest.mark.slow
def test_so_does_one_whose_images_are_changed_at_random(monkeypatch, tmp_path, capsys):
    """An archive of CIFAR-100 through TFDS, with crops, flips and turns, both models live."""
    files, *_ = test_cifar.cifar_members("cifar100")
    data_dir = tmp_path / "data"
    test_cifar.put_archive(data_dir, "cifar100", files)
    words = [
        "mobilenet",
        *("--data", "cifar100", "--data-dir", str(data_dir), "--augment", "--source", "live", "--validation", "0"),
        *("--source-model", "small_resnet", "--target-model", "small_mobilenet_v2", "--stages", "1", "--seeds", "1"),
        *("--routes", "fc/kernel=fc/kernel", "--batch-size", "4", "--labels", "None"),
        *("--methods", "mergenet_warm", *LENGTHS, *LPKA),
    ]
    check(monkeypatch, tmp_path, capsys, "cross_structure", words, (1,))


TINY = [*LENGTHS, *PRETRAINED, "--methods", "vanilla", "share"]


@pytest.mark.slow
def test_what_is_done_is_neither_restored_nor_hashed(monkeypatch, tmp_path, capsys):
    """Of two seeds the second lacks a method: its own source is needed, and no other."""
    folder, hashed, opened = tmp_path / "run", [], []
    fingerprint, init = trial.fingerprint, Checkpoints.__init__
    monkeypatch.setattr(trial, "fingerprint", lambda arrays: hashed.append(None) or fingerprint(arrays))

    def open_(self, path, **options):
        opened.append(path.name)
        init(self, path, **options)

    monkeypatch.setattr(Checkpoints, "__init__", open_)
    run("tiny", folder, *TINY, "--seeds", "2")
    assert len(hashed) == 4  # Of each seed, what the source and what the target learns from, once.
    expected = results_of(folder)
    rows = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(rows[:3]))
    hashed.clear()
    opened.clear()
    run("tiny", folder, *TINY, "--seeds", "2", "--resume")
    assert opened == ["source-seed1", "share-seed1"]
    assert len(hashed) == 2
    assert results_of(folder) == expected


@pytest.mark.slow
def test_the_later_seeds_may_be_a_run_of_their_own(tmp_path, capsys):
    both, second = tmp_path / "both", tmp_path / "second"
    run("tiny", both, *TINY, "--seeds", "2")
    run("tiny", second, *TINY, "--seeds", "1", "--first-seed", "1")
    assert "; seeds: 1, from 1 on\n" in capsys.readouterr().out
    assert [result["seed"] for result in results_of(second)] == [1, 1]
    assert results_of(second) == [result for result in results_of(both) if result["seed"] == 1]
    from_both = ["--source", "frozen", "--source-from", str(both), "--seeds", "1", "--first-seed", "1"]
    run("tiny", tmp_path / "frozen", *TINY, *from_both)
    assert results_of(tmp_path / "frozen") == results_of(second)


@pytest.mark.slow
def test_the_seconds_of_all_parts_count(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "run"
    stopping_at(monkeypatch, 4)
    with pytest.raises(SystemExit):
        run("tiny", folder, *TINY, "--seeds", "1")
    timed = folder / "checkpoints" / "vanilla-seed0" / "seconds.json"
    (before,) = json.loads(timed.read_text()).items()
    assert before[0] == "10"
    assert before[1] > 0
    timed.write_text(json.dumps({"10": 1000.0, "15": 9999.0}))  # The step of 15 was lost with a kill.
    stopping_at(monkeypatch, None)
    run("tiny", folder, *TINY, "--seeds", "1", "--resume")
    rows = json.loads((folder / "results.json").read_text())
    assert 1000 < rows[0]["seconds"] < 2000
    assert 0 < rows[1]["seconds"] < 1000
    assert list(json.loads(timed.read_text())) == ["10", "15", "20"]
    # Trained to its end, and killed before its result was written.
    (folder / "results.json").unlink()
    run("tiny", folder, *TINY, "--seeds", "1", "--resume")
    assert json.loads((folder / "results.json").read_text())[0]["seconds"] == pytest.approx(rows[0]["seconds"], abs=9)


def test_what_changes_the_batches_is_refused_by_name(monkeypatch, tmp_path, capsys):
    words = [*LENGTHS, *PRETRAINED, "--methods", "vanilla"]
    stopping_at(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run("tiny", tmp_path / "run", *words)

    def refusal(*change):
        capsys.readouterr()
        with pytest.raises(SystemExit) as refused:
            run("tiny", tmp_path / "run", *words, *change, "--resume")
        assert refused.value.code == 2
        return capsys.readouterr().err

    changed = refusal("--batch-size", "40", "--labels", "50")
    assert "batch_size was 50, is 40\n  labels was 100, is 50\n" in changed
    # The options are the same, but the pixels are not: a file may have changed.
    monkeypatch.setattr(trial, "fingerprint", lambda arrays: "changed")
    pattern = r"error: .* saved by another run: \w+_data was '[0-9a-f]{16}', is 'changed'\. Restore"
    assert re.search(pattern, refusal())
