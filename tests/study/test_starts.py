"""What a method does before its first step: once, by a key of its own, and measured right after."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.study.sources import PURPOSES, SourcePlan, initial_key
from merge_jax.study.starts import once_a_seed
from merge_jax.study.trial import keeping, make_trials
from merge_jax.training.signals import StopSignals
from merge_jax.transfers import share_transfer
from tests import tiny
from tests.smoke import run

CONFIG = tiny.PRESETS["default"]
SHORT = ["--steps", "20", "--source-steps", "20", "--report-every", "10", "--checkpoint-every", "10", "--seeds", "1"]


def trial_of(monkeypatch, start, **options):
    monkeypatch.setattr(tiny, "copied", start)
    config = replace(CONFIG, methods=("copied",), **options)
    scenario = tiny.build(config)
    return make_trials(scenario, config, SourcePlan(lengths=scenario.schedule.source))["copied"]


def test_a_start_gets_its_own_key_both_models_and_the_labelled_examples(monkeypatch):
    seen = []

    def start(key, source, target, examples):
        seen.append((key, source, target, examples))
        return target.replace(params=jax.tree.map(lambda leaf: leaf + 1, target.params))

    trial = trial_of(monkeypatch, start)
    source = trial.fresh_source(3)
    jax.eval_shape(lambda: trial.blank_state(3, source))
    assert seen == []
    state, blank = trial.initial_state(3, source), trial.blank_state(3, source)
    ((key, given, target, examples),) = seen
    assert jax.random.key_data(key).tolist() == jax.random.key_data(initial_key(3, "start")).tolist()
    assert given is source
    assert target.opt_state is None
    assert set(examples) == {"image", "label"}
    assert len(examples["label"]) == 100
    for found, old in zip(jax.tree.leaves(state.target.params), jax.tree.leaves(blank.target.params), strict=True):
        np.testing.assert_allclose(found, old + 1)
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(blank.key).tolist()


def test_a_start_by_features_also_of_models_that_average_over_devices():
    options = {"methods": ("prepare",), "agree": ("norm=norm",), "prepare_steps": 2, "parallel": "pmap"}
    config = replace(CONFIG, **options)
    scenario = tiny.build(config)
    trial = make_trials(scenario, config, SourcePlan(lengths=scenario.schedule.source))["prepare"]
    source = trial.fresh_source(0)
    state, blank = trial.initial_state(0, source), trial.blank_state(0, source)
    for name, old in blank.target.model_state["batch_stats"]["norm"].items():
        assert np.isfinite(state.target.model_state["batch_stats"]["norm"][name]).all()
        assert not np.allclose(state.target.model_state["batch_stats"]["norm"][name], old)


def test_a_new_purpose_stands_last_so_that_the_others_draw_as_before():
    assert PURPOSES == ("source", "target", "adapter", "steps", "control", "source_steps", "start")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (lambda key, source, target, examples: target.params, "the start of 'copied' must give a TrainState, got dict"),
        (
            lambda key, source, target, examples: target.replace(params={"fc": target.params["fc"]}),
            "gives another target: it lacks params/norm/bias, params/norm/scale, and has nothing more",
        ),
        (
            lambda key, source, target, examples: target.replace(params=jax.tree.map(jnp.ravel, target.params)),
            r"'params/fc/kernel' must be \(64, 10\) of float32, got \(640,\) of float32",
        ),
    ],
)
def test_what_is_no_such_target_is_refused(monkeypatch, start, message):
    trial = trial_of(monkeypatch, start)
    with pytest.raises(ValueError, match=message):
        trial.initial_state(0, trial.fresh_source(0))


def test_a_source_that_is_not_trained_before_is_refused():
    config = replace(CONFIG, methods=("copied",), source="live")
    with pytest.raises(ValueError, match="with --source live there is none before the first step"):
        make_trials(tiny.build(config), config, SourcePlan(live=True))


def test_it_runs_once_and_what_it_is_worth_is_kept(monkeypatch, tmp_path):
    """Stopped after its first call, a run goes on without a start, and has its results all the same."""
    calls, copied = [], tiny.copied
    monkeypatch.setattr(tiny, "copied", lambda *given: calls.append(given) or copied(*given))
    words = [*SHORT, "--methods", "copied", "vanilla", "copied_kd"]
    expected, _ = run("tiny", tmp_path / "unbroken", *words)
    assert len(calls) == 1  # For both methods.
    stops = iter([False, False, True])  # The source's two calls, and the first of the method.
    monkeypatch.setattr(StopSignals, "should_stop", lambda signals: next(stops, False))
    with pytest.raises(SystemExit):
        run("tiny", tmp_path / "broken", *words)
    measured = tmp_path / "broken" / "opponents.json"
    measured.write_text(json.dumps([{"opponent": "source", "seed": 0, "target_test": 0.5}]))  # As of fewer --opponents.
    found, _ = run("tiny", tmp_path / "broken", *words, "--resume")
    assert len(calls) == 3
    names = ("target_test", "target_start_test", "target_start_probe", "target_probe")
    assert [[one[name] for name in names] for one in found] == [[one[name] for name in names] for one in expected]
    by_method = {one["method"]: one for one in found}
    # As the source is, which is tested on the same images.
    assert by_method["copied"]["target_start_test"] == by_method["copied"]["source_test"]
    assert by_method["copied_kd"]["target_start_test"] == by_method["copied"]["source_test"]
    assert by_method["vanilla"]["target_start_test"] < 0.4
    # It sows no features.
    assert {one["target_start_probe"] for one in found} == {None}
    opponents = {one["opponent"]: one["target_test"] for one in json.loads(measured.read_text())}
    assert opponents.pop("source") == 0.5
    assert opponents.pop("inputs_lr") > 0.85
    assert not opponents
    table = (tmp_path / "broken" / "table.txt").read_text()
    assert "after write" in table
    assert "inputs_lr" in table


def test_each_seed_and_each_source_has_its_own_start():
    state, other = (mj.TrainState({"w": jnp.full(2, value)}, {}, None) for value in (1.0, 2.0))
    begin = once_a_seed(lambda key, source, target, examples: source.replace(model_state={"k": jax.random.normal(key)}))
    keys = jax.random.split(jax.random.key(0))
    begun = [begin(key, source, other, {}) for key, source in [(keys[0], state), (keys[1], state), (keys[1], other)]]
    np.testing.assert_array_equal(
        [one.model_state["k"] for one in begun], jax.vmap(jax.random.normal)(keys[jnp.array([0, 1, 1])])
    )
    np.testing.assert_array_equal([one.params["w"][0] for one in begun], [1, 1, 2])
    assert begin(keys[1], other, state, {}) is begun[-1]


def test_a_kept_layer_is_left_to_the_target():
    source, target = (
        {"fc": {"kernel": np.full((3, 2), x, np.float32), "bias": np.full(2, x, np.float32)}} for x in (1.0, 0.0)
    )
    transfer = keeping(share_transfer({"**": "**"}), ("fc/kernel",))
    written = transfer.apply(transfer.init(jax.random.key(0), source, target), source, target)
    assert written["fc"]["kernel"].max() == 0
    assert written["fc"]["bias"].min() == 1
