"""The experiments as users run them: from the command line; where a process matters, in one of their own."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import product

import jax
import numpy as np
import pytest

from experiments import cross_structure
from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.paths import flatten
from merge_jax.runs import mean_and_error
from merge_jax.study.cli import main, parse
from merge_jax.study.contents import current_options
from merge_jax.study.sources import plan_source
from merge_jax.study.trial import make_trials
from tests import ROOT, tiny
from tests.data import test_cifar, test_image_folder
from tests.smoke import run

# Ten steps in two halves, of the experiment that compiles in a second.
TEN_STEPS = [
    *("--steps", "10", "--report-every", "5", "--checkpoint-every", "5"),
    *("--source-steps", "10", "--cycle", "2", "--methods", "operators"),
]

# Runs the experiment, and stops it after a save of step 5 as Ctrl-C would.
INTERRUPTED = """
import runpy, sys
from merge_jax.checkpoints.orbax import Checkpoints
save = Checkpoints.save
def save_and_stop(self, step, state, **options):
    save(self, step, state, **options)
    if step == 5:
        raise KeyboardInterrupt
Checkpoints.save = save_and_stop
sys.argv = ["tiny", *sys.argv[1:]]
runpy.run_module("tests.tiny", run_name="__main__")
"""


def start(*arguments, program=("-m", "tests.tiny"), devices=1):
    """Runs the tiny experiment in a process of its own."""
    command = [sys.executable, *program, *map(str, arguments)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(found, expected):
    """Compares records of metrics up to what other roundings do to ten steps."""
    assert [(r["run"], r["step"]) for r in found] == [(r["run"], r["step"]) for r in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("target/loss", "target/validation_loss", "adapter/change"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), (one["run"], one["step"], name)


def last_state(folder, name):
    """Returns all leaves of the checkpoint of step 10, by path."""
    config = parse(tiny.PRESETS, "", "", TEN_STEPS)
    scenario = tiny.build(config)
    trial = make_trials(scenario, config, plan_source(scenario, config))[name]
    state = jax.eval_shape(lambda: trial.initial_state(0, trial.fresh_source(0)))
    with Checkpoints(folder / "checkpoints" / f"{name}-seed0", read_only=True) as checkpoints:
        step, state = checkpoints.restore_latest(state)
    assert step == 10
    return flatten(state.replace(key=jax.random.key_data(state.key)))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with redirect_stdout(io.StringIO()) as printed:
        run("tiny", folder, *TEN_STEPS)
    return folder, printed.getvalue()


def test_a_run_leaves_everything_a_reader_needs(unbroken):
    folder, output = unbroken
    assert "operators" in output
    assert str(folder) in output
    for name in (
        "config.json",
        "environment.json",
        "README.md",
        "results.json",
        "table.txt",
        "curves.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").glob("operators-seed0/events*"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if record["run"] == "operators-seed0"]
    assert [record["step"] for record in found] == [5, 10]
    assert {"target/loss", "target/validation_accuracy", "adapter/change"} <= found[0].keys()
    (result,) = json.loads((folder / "results.json").read_text())
    assert 0 <= result["target_test"] <= 1
    assert result["adapter_parameters"] > 0


@pytest.mark.slow
def test_resumed_in_a_new_process_a_run_is_the_unbroken_one_bit_for_bit(unbroken, tmp_path):
    expected, _ = unbroken
    folder = tmp_path / "run"
    # The source's training is stopped first, the joint run second.
    for resume in ([], ["--resume"]):
        stopped = start(*TEN_STEPS, "--run-dir", folder, *resume, program=("-c", INTERRUPTED))
        assert stopped.returncode == 130
        assert "the same command with --resume goes on from the last checkpoint" in stopped.stderr
        assert "Traceback" not in stopped.stderr
    for name in ("source-seed0", "operators-seed0"):
        steps = [path.name for path in (folder / "checkpoints" / name).iterdir()]
        assert ("10" in steps) == (name == "source-seed0")
    done = start(*TEN_STEPS, "--run-dir", folder, "--resume")
    assert done.returncode == 0, done.stderr
    assert "compiled operators, 1 of 1: " in done.stderr  # The source is done, and is not compiled again.
    assert "operators-seed0: " in done.stderr
    for name in ("source", "operators"):
        resumed, straight = last_state(folder, name), last_state(expected, name)
        assert resumed.keys() == straight.keys()
        for path, leaf in straight.items():
            np.testing.assert_array_equal(resumed[path], leaf, err_msg=path)
    assert (folder / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()


def test_a_finished_run_resumes_to_its_table_and_trains_nothing(unbroken, capsys):
    folder, output = unbroken
    before = (folder / "results.json").read_text(), (folder / "metrics.jsonl").read_text()
    run("tiny", folder, *TEN_STEPS, "--resume")
    again = capsys.readouterr().out
    assert (folder / "results.json").read_text() == before[0]
    assert (folder / "metrics.jsonl").read_text() == before[1]
    assert "nothing to train" in again

    def table(text):
        return [line for line in text.splitlines() if line.startswith(" operators")]

    assert len(table(output)) == 1
    assert table(again) == table(output)


def test_a_finished_run_goes_on_with_more_seeds_and_methods(unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken[0], folder)
    (first,) = json.loads((folder / "results.json").read_text())
    more = (*TEN_STEPS, "vanilla", "--seeds", "2")
    with pytest.raises(SystemExit):
        run("tiny", folder, *more)
    assert "already holds this run: add --resume" in capsys.readouterr().err
    run("tiny", folder, *more, "--resume")
    results = json.loads((folder / "results.json").read_text())
    assert first in results
    assert {(result["method"], result["seed"]) for result in results} == set(product(("operators", "vanilla"), (0, 1)))
    assert json.loads((folder / "config.json").read_text())["seeds"] == 2
    with pytest.raises(SystemExit):
        run("tiny", folder, *TEN_STEPS, "--resume")
    refused = capsys.readouterr().err
    assert "methods was ['operators', 'vanilla'], is ['operators']\n  seeds was 2, is 1\n" in refused


def test_resume_refuses_a_changed_config_by_field(unbroken, capsys):
    folder, _ = unbroken
    with pytest.raises(SystemExit) as refused:
        run("tiny", folder, *TEN_STEPS, "--resume", "--cycle", "3", "--labels", "50")
    assert refused.value.code == 2
    assert "another config:\n  cycle was 2, is 3\n  labels was 100, is 50\n" in capsys.readouterr().err


def test_a_live_source_trains_beside_the_target(tmp_path):
    words = ("--source", "live", "--methods", "kd", "--steps", "4", "--report-every", "2", "--checkpoint-every", "2")
    _, found = run("tiny", tmp_path / "run", *words)
    assert {record["run"] for record in found} == {"kd-seed0"}
    assert {"source/loss", "source/validation_accuracy", "target/loss"} <= found[0].keys()


def test_a_run_of_another_version_goes_on_if_its_options_say_the_same(unbroken, tmp_path, capsys):
    """Options that have gone since, at the values that this version always has, and one of another name."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken[0], folder)
    config = json.loads((folder / "config.json").read_text())
    removed = {"vectorized": False, "cycle_end": None, "gate": "learned", "max_width": 512, "output": "warm"}
    assert not config.keys() & removed.keys()
    before = {name: value for name, value in config.items() if name != "compare_on"} | {"view": config["compare_on"]}
    (folder / "config.json").write_text(json.dumps(before | removed))
    shutil.rmtree(folder / "checkpoints" / "operators-seed0" / "10")
    (folder / "results.json").unlink()
    run("tiny", folder, *TEN_STEPS, "--resume")
    assert "operators-seed0 goes on from step 5 of 10" in capsys.readouterr().err
    assert records(folder) == records(unbroken[0])
    (folder / "config.json").write_text(json.dumps(config | {"vectorized": True}))
    with pytest.raises(SystemExit):
        run("tiny", folder, *TEN_STEPS, "--resume")
    assert "another config:\n  vectorized was True, is '(absent)'\n" in capsys.readouterr().err


def test_a_run_with_mergenet_of_another_version_is_another_run():
    saved = {"methods": ["vanilla", "mergenet"], "output": "warm", "view": "mixed", "steps": 3}
    others = {"output": "warm", "compare_on": "mixed", "steps": 3, "first_seed": 0}
    assert current_options(saved) == {"methods": saved["methods"], **others}


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--parallel", "pmap"), ("--shard-state",)])
def test_a_run_begun_on_five_devices_goes_on_on_one(unbroken, tmp_path, options):
    folder = tmp_path / "run"
    stopped = start(*TEN_STEPS, "--run-dir", folder, *options, program=("-c", INTERRUPTED), devices=5)
    assert stopped.returncode == 130, stopped.stderr
    assert f"5 x cpu by {'pmap' if 'pmap' in options else 'jit'}" in stopped.stdout
    # The source is saved whole; the joint run is stopped on five devices again, and ends on one.
    stopped = start(*TEN_STEPS, "--run-dir", folder, "--resume", *options, program=("-c", INTERRUPTED), devices=5)
    assert stopped.returncode == 130, stopped.stderr
    done = start(*TEN_STEPS, "--run-dir", folder, "--resume")
    assert done.returncode == 0, done.stderr
    assert "the run will not continue bit for bit: devices was 5, is 1" in done.stderr
    assert_close(records(folder), records(unbroken[0]))


@pytest.mark.slow
def test_a_batch_that_does_not_divide_among_the_devices_is_refused(tmp_path):
    refused = start("--run-dir", tmp_path / "run", devices=8)
    assert refused.returncode == 2
    assert "error: a batch of 50 (target) does not divide among 8 devices: take a multiple of 8" in refused.stderr
    assert not (tmp_path / "run").exists()


SMALL_NETWORKS = [
    *("--source-model", "small_resnet", "--target-model", "small_mobilenet_v2", "--stages", "1"),
    *("--routes", "fc/kernel=fc/kernel", "--num-layers", "1", "--num-heads", "1", "--seeds", "1"),
    *("--epochs", "2", "--batch-size", "4", "--cycle", "1", "--stop", "1.0"),
]


@pytest.mark.slow
def test_the_short_preset_trains_on_an_archive_of_cifar100(tmp_path):
    """The whole path: TFDS's layout, uint8 pixels, augmentation, epochs, both models live; the networks are small."""
    files, *_ = test_cifar.cifar_members("cifar100")
    test_cifar.put_archive(tmp_path / "data", "cifar100", files)
    results, found = run(
        *("cross_structure", tmp_path / "run", "short", "--data-dir", tmp_path / "data"),
        *("--validation", "0", "--image-size", "8", *SMALL_NETWORKS),
        *("--methods", "dkd", "mergenet_warm_nkd", "--dtype", "bfloat16"),
    )
    assert [result["method"] for result in results] == ["dkd", "mergenet_warm_nkd"]
    assert found[-1]["adapter/gate/fc/kernel"] != 0
    steps = sorted({record["step"] for record in found})
    assert len(steps) == 2
    assert steps[1] == 2 * steps[0]
    assert all(np.isfinite(record["target/loss"]) for record in found)
    assert all("source/loss" in record and "target/validation_accuracy" not in record for record in found)


@pytest.mark.slow
def test_a_folder_of_images_is_data_too(tmp_path, capsys):
    test_image_folder.write_folder(tmp_path / "images")
    run(
        *("cross_structure", tmp_path / "run", "--data", tmp_path / "images"),
        *("--validation", "0", "--labels", "None", *SMALL_NETWORKS),
        *("--methods", "vanilla", "--source", "live", "--report-every", "1", "--checkpoint-every", "1"),
    )
    assert "vanilla" in capsys.readouterr().out


def test_help_shows_every_option_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as shown:
        main(cross_structure.PRESETS, "experiments.cross_structure", "", cross_structure.build, ["--help"])
    assert shown.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option in ("--cycle", "--methods", "--adapter-learning-rate", "--run-dir", "--resume"):
        assert option in printed
    assert "default: 4" in printed
    assert "Steps from one transfer to the next" in printed
    assert "smoke" in printed


def refusal(capsys, *arguments):
    """Returns what the command line prints as it refuses, and checks that it trained nothing."""
    with pytest.raises(SystemExit) as stopped:
        main(
            cross_structure.PRESETS,
            "experiments.cross_structure",
            "",
            cross_structure.build,
            list(map(str, arguments)),
        )
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smok"], "unknown preset 'smok'; did you mean 'smoke'?"),
        (["--cycl", "2"], "--cycle"),
        (["--methods", "mergnet"], "mergenet"),
        (["--cycle", "0"], "cycle must be a whole number of at least 1, got 0"),
        (["--stop", "1.5"], "stop must be a fraction in [0, 1], got 1.5"),
        (["--num-layers", "0"], "num_layers must be a whole number of at least 1, got 0"),
        (["--num-heads", "0"], "num_heads must be a whole number of at least 1, got 0"),
        (
            ["--num-heads", "1000", "--methods", "mergenet"],
            "the route to 'stage1_0/conv1/kernel' cannot be applied: num_heads must lie in [1, 128], the width of its",
        ),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--labels", "5"], "between 10, one of each class, and 1197, the number there is, got 5"),
        (["--checkpoint-every", "30"], "checkpoint_every must be a multiple of report_every"),
        (["--adapter-learning-rate", "nan"], "adapter_learning_rate must be a finite number, got nan"),
        (["--learning-rate", "-1"], "learning_rate must be a finite number above 0, got -1.0"),
        (["--temperature", "0", "--methods", "kd"], "temperature must be above 0, got 0.0"),
        (["--routes", "fc/kernal"], "a route must be target=source, such as fc/kernel=fc/kernel, got 'fc/kernal'"),
        (["--routes", "fc/kernel=fc/kernel", "fc/kernel=head/kernel"], "'fc/kernel' is routed twice"),
        (["--routes"], "no routes"),
        (["--epochs", "0"], "epochs must be a whole number of at least 1, got 0"),
        (["--source-epochs", "2"], "source_epochs is given without epochs"),
        (["--devices", "99"], "the number of devices must lie in [1, "),
        (["--devices", "99", "--parallel", "pmap"], "the number of devices must lie in [1, "),
        (["--parallel", "pmap", "--shard-state"], "shard_state needs --parallel jit"),
        (["--coordinator", "localhost:80"], "need all of coordinator, num_processes and process_id"),
        (["--num-processes", "2"], "need all of coordinator, num_processes and process_id"),
        (["--validation", "-1"], "validation must be 0 or more, got -1"),
        (["--steps", "4"], "stop is 0.1 of 4 steps, less than one: nothing would be transferred"),
        (["--image-size", "4"], "shifted_digits are 10x10 images: image_size is for other data, got 4"),
        (["--data", "cifar1000"], "cifar100"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--source-model", "resnet51"], "resnet50"),
        (["--methods"], "no methods"),
        (["--methods", "kd", "kd"], "the method 'kd' is named twice"),
    ],
)
def test_bad_options_are_refused_before_the_run_folder_is_made(arguments, message, capsys, tmp_path):
    folder = tmp_path / "run"
    assert message in refusal(capsys, *arguments, "--run-dir", folder)
    assert not folder.exists()


def test_an_unknown_method_is_refused_in_a_config_made_by_hand():
    config = cross_structure.Config(methods=("mergnet",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown method 'mergnet'; did you mean 'mergenet'"):
        cross_structure.build(config)


def test_a_run_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = refusal(capsys, "smoke", "--methods", "vanilla", "--run-dir", tmp_path / "file" / "run")
    assert "cannot be written" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_no_word_means_default():
    config = parse(cross_structure.PRESETS, "m", "", ["--seeds", "2"])
    assert config == replace(cross_structure.PRESETS["default"], seeds=2)
    assert parse(cross_structure.PRESETS, "m", "", ["smoke"]) == cross_structure.PRESETS["smoke"]


def test_mean_and_standard_error():
    mean, error = mean_and_error([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    assert mean_and_error([2.0]) == (2.0, None)
