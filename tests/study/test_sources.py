"""Sources that a run reads: from a file, from another run, or step by step along a source's training."""

import shutil
from dataclasses import replace

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import merge_jax as mj
from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.commands.export import export_part
from merge_jax.study import runner, sources
from merge_jax.study.cli import parse
from merge_jax.study.sources import plan_source
from tests import tiny
from tests.smoke import run

LITTLE = [
    *("--steps", "6", "--source-steps", "30", "--report-every", "2", "--checkpoint-every", "2"),
    *("--methods", "share", "kd"),
]
SNAPSHOTS = [*LITTLE, "--source", "trajectory", "--snapshots", "3"]


def scores(results):
    return {result["method"]: (result["target_test"], result["source_test"]) for result in results}


def of_methods(records):
    return [record for record in records if not record["run"].startswith("source")]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    return folder, *run("tiny", folder, *LITTLE)


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectory") / "run"
    return folder, *run("tiny", folder, *SNAPSHOTS)


def source_of(folder):
    """Returns the source that a run trained: its parameters at its last step."""
    config = parse(tiny.PRESETS, "", "", LITTLE)
    params, _ = tiny.build(config).source.init(jax.random.key(0))
    with Checkpoints(folder / "checkpoints" / "source-seed0") as checkpoints:
        return checkpoints.restore_parts(checkpoints.latest_step, {"target/params": params})["target/params"]


@pytest.mark.slow
def test_a_frozen_source_of_another_run_is_that_runs_source(pretrained, tmp_path):
    folder, results, records = pretrained
    frozen = run("tiny", tmp_path / "run", *LITTLE, "--source", "frozen", "--source-from", folder)
    assert scores(frozen[0]) == scores(results)
    assert frozen[1] == of_methods(records)


def test_a_frozen_source_may_be_a_safetensors_file(pretrained, tmp_path):
    """Sharing reads parameters alone, and so gives what it gave in the run that the file is of."""
    folder, results, _ = pretrained
    mj.save_safetensors(tmp_path / "source.safetensors", source_of(folder))
    options = [*LITTLE[:-2], "share", "--source", "frozen", "--source-from", tmp_path / "source.safetensors"]
    found, _ = run("tiny", tmp_path / "run", *options)
    assert scores(found)["share"][0] == scores(results)["share"][0]


def test_a_frozen_source_may_be_an_exported_model(pretrained, tmp_path):
    """With its BatchNorm statistics, so what distils its outputs gives what it gave too."""
    folder, results, _ = pretrained
    file = tmp_path / "source.safetensors"
    export_part(folder / "checkpoints" / "source-seed0", file, "target", best=False)
    found, _ = run("tiny", tmp_path / "run", *LITTLE, "--source", "frozen", "--source-from", file)
    assert scores(found) == scores(results)


@pytest.mark.slow
def test_a_trajectory_shows_every_saved_step_in_order(trajectory):
    folder, _, records = trajectory
    saved_source = folder / "checkpoints" / "source-seed0"
    saved = sorted(int(path.name) for path in saved_source.iterdir() if path.name.isdigit())
    assert saved == [10, 20, 30]
    # Transfers go on over the whole of these six steps, reported by twos: two steps for each snapshot.
    shown = [record["adapter/snapshot"] for record in records if record["run"] == "share-seed0"]
    assert shown == [0.0, 1.0, 2.0]


@pytest.mark.slow
def test_a_trajectory_of_another_run_is_that_runs(trajectory, tmp_path):
    folder, results, records = trajectory
    again = run("tiny", tmp_path / "run", *SNAPSHOTS, "--source-from", folder)
    assert scores(again[0]) == scores(results)
    assert again[1] == of_methods(records)


@pytest.mark.slow
def test_the_last_step_of_a_trajectory_teaches_and_is_tested(trajectory, pretrained):
    """Distillation and the source's own score are those of the source at its last step."""
    assert scores(trajectory[1])["kd"] == scores(pretrained[1])["kd"]
    assert scores(trajectory[1])["share"][1] == scores(pretrained[1])["share"][1]


def test_a_resumed_run_goes_on_along_the_trajectory(trajectory, tmp_path):
    folder, _, records = trajectory
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    shutil.rmtree(copied / "checkpoints" / "share-seed0" / "6")
    (copied / "results.json").unlink()
    kept = [r for r in (copied / "metrics.jsonl").read_text().splitlines() if '"share-seed0", "step": 6' not in r]
    assert len(kept) == len(records) - 1
    (copied / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    _, again = run("tiny", copied, *SNAPSHOTS, "--resume")
    key = lambda record: (record["run"], record["step"])  # noqa: E731
    assert sorted(again, key=key) == sorted(records, key=key)


def refused(options, folder):
    config = parse(tiny.PRESETS, "", "", [*map(str, [*LITTLE, *options]), "--run-dir", str(folder)])
    config.check()
    scenario = tiny.build(config)
    source_plan = plan_source(scenario, config)
    if source_plan.read is not None:
        source_plan.read(0)


def test_sources_that_cannot_be_read_are_refused(pretrained, trajectory, tmp_path):
    mj.save_safetensors(tmp_path / "other.safetensors", {"fc": {"kernel": np.zeros((3, 4), np.float32)}})
    frozen, replayed = ["--source", "frozen"], ["--source", "trajectory"]
    cases = [
        (frozen, "a frozen source needs --source-from"),
        (
            ["--source-from", tmp_path],
            "--source-from is for a source that is frozen or a trajectory; this one is pretr",
        ),
        ([*replayed, "--snapshots", "0"], "snapshots must be at least 1, got 0"),
        ([*frozen, "--source-from", tmp_path / "none.safetensors"], "the source cannot be read: there is no file"),
        (
            [*frozen, "--source-from", tmp_path / "other.safetensors"],
            r"fc/kernel is float32\[3, 4\], the model's",
        ),
        ([*frozen, "--source-from", pretrained[0], "--seeds", "3"], "no checkpoints of source-seed1, source-seed2: it"),
        (
            [*frozen, "--source-from", pretrained[0], "--deep"],
            "params/hidden/kernel is not saved",
        ),
        ([*replayed, "--source-from", tmp_path], "no checkpoints of source-seed0: it must be the folder of a run"),
        ([*replayed, "--source-from", trajectory[0], "--deep"], "hidden/kernel is not saved"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            refused(options, tmp_path / "run")


def write_npz(path, state):
    with path.open("wb") as file:
        np.savez(file, **mj.flatten(state["params"]))


def write_orbax(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


@pytest.mark.parametrize(
    "write",
    [
        lambda path, state: path.write_bytes(flax.serialization.to_bytes(state)),
        write_npz,
        write_orbax,
    ],
    ids=["msgpack", "npz", "Orbax"],
)
def test_a_source_is_read_from_a_file_of_another_library(write, pretrained, tmp_path):
    params = source_of(pretrained[0])
    statistics = {"norm": {"mean": np.ones(64, np.float32), "var": np.ones(64, np.float32)}}
    state = {"params": params, "batch_stats": statistics, "opt_state": params, "step": np.array(3)}
    write(tmp_path / "source", state)
    words = [*LITTLE, "--source", "frozen", "--source-from", str(tmp_path / "source")]
    config = parse(tiny.PRESETS, "", "", words)
    read = plan_source(tiny.build(config), config).read
    assert read is not None
    found = mj.flatten(read(0).params)
    for path, leaf in mj.flatten(params).items():
        np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("kind", ["file", "frozen", "trajectory"])
def test_another_model_is_told_before_one_is_made_or_traced(kind, pretrained, trajectory, tmp_path, monkeypatch):
    mj.save_safetensors(tmp_path / "other.safetensors", {"fc": {"kernel": np.zeros((3, 4), np.float32)}})
    path = {"file": tmp_path / "other.safetensors", "frozen": pretrained[0], "trajectory": trajectory[0]}[kind]
    words = [*LITTLE, "--source", kind.replace("file", "frozen"), "--source-from", path, "--deep"]
    config = parse(tiny.PRESETS, "", "", list(map(str, words)))
    scenario = tiny.build(config)

    def init(key):
        assert isinstance(key, jax.core.Tracer), "a model is made"
        return scenario.source.init(key)

    monkeypatch.setattr(runner, "make_trials", lambda *arguments: pytest.fail("steps are traced"))
    with pytest.raises(ValueError, match=r"fc/kernel is float32\[3, 4\], the|hidden/kernel is not saved"):
        runner.check_run(replace(scenario, source=replace(scenario.source, init=init)), config)


def test_numbers_that_are_not_finite_are_told_before_steps_are_traced(pretrained, tmp_path, monkeypatch):
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), source_of(pretrained[0]))
    mj.save_safetensors(tmp_path / "source.safetensors", params)
    words = [*LITTLE, "--source", "frozen", "--source-from", str(tmp_path / "source.safetensors")]
    config = parse(tiny.PRESETS, "", "", words)
    monkeypatch.setattr(runner, "make_trials", lambda *arguments: pytest.fail("steps are traced"))
    with pytest.raises(ValueError, match="the source of seed 0"):
        runner.check_run(tiny.build(config), config)


@pytest.mark.parametrize(("more", "reads"), [([], 3), (["--resume"], 1)])
def test_a_run_that_goes_on_looks_at_no_source_of_a_seed_that_may_be_done(
    more, reads, pretrained, tmp_path, monkeypatch
):
    mj.save_safetensors(tmp_path / "source.safetensors", source_of(pretrained[0]))
    words = [
        *LITTLE,
        "--source",
        "frozen",
        "--source-from",
        str(tmp_path / "source.safetensors"),
        "--seeds",
        "2",
        *more,
    ]
    config, read = parse(tiny.PRESETS, "", "", words), []
    monkeypatch.setattr(sources, "load_params", lambda *of: read.append(of) or mj.load_params(*of))
    monkeypatch.setattr(runner, "make_trials", lambda *arguments: {})
    scenario = tiny.build(config)
    load = replace(scenario.source, load=sources.load_params)
    runner.check_run(replace(scenario, source=load), config)
    assert len(read) == reads  # One is of shapes.


@pytest.mark.parametrize("source", ["file", "orbax"])
def test_a_source_that_is_no_weights_is_told_before_data_is_read(source, tmp_path):
    (tmp_path / "m.msgpack").write_bytes(b"\x81\xa1")
    (tmp_path / "_METADATA").write_text("{}")
    path, told = {
        "file": (
            tmp_path / "m.msgpack",
            r"m\.msgpack is truncated or no msgpack of Flax: ",
        ),
        "orbax": (tmp_path, "is truncated or no checkpoint of Orbax: "),
    }[source]
    with pytest.raises(ValueError, match=told):
        runner.check_paths(tiny.Config(source="frozen", source_from=path))


def test_a_trajectory_needs_two_steps_or_more(pretrained, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(pretrained[0], copied)
    steps = [path for path in (copied / "checkpoints" / "source-seed0").iterdir() if path.name.isdigit()]
    for path in sorted(steps, key=lambda path: int(path.name))[:-1]:
        shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"2 or more, of every seed; .* has \[1\]: train it with --source trajectory"):
        refused(["--source", "trajectory", "--source-from", copied], tmp_path / "other")
