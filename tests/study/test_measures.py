"""Probes, opponents, heads fitted first and pools, on digits with small networks."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import merge_jax as mj
from experiments import cross_structure
from merge_jax import data, study
from merge_jax.runs import Run, result_tables
from merge_jax.runs.table import notes
from merge_jax.study.measures import (
    Sample,
    inputs_lr,
    make_fit_head,
    make_measures,
    make_opponents,
    observer,
    probe,
    sampled,
)
from merge_jax.study.models.model import check_pool, draw_pool, inputs_of
from merge_jax.study.sources import SourcePlan
from merge_jax.study.trial import make_trials
from merge_jax.training.joint import TrainState

CONFIG = replace(
    cross_structure.PRESETS["smoke"],
    labels=60,
    target_model="small_resnet_half",
    routes=("**=**",),
    methods=("vanilla", "aligned"),
    steps=20,
)


def clusters(seed, classes=3, size=60):
    random = np.random.default_rng(seed)
    labels = np.arange(size) % classes
    return (3 * np.eye(classes, 5)[labels] + random.normal(size=(size, 5))).astype(np.float32), labels


def test_a_probe_is_the_regression_as_a_layer():
    (features, labels), (test_features, test_labels) = clusters(0), clusters(1)
    features, test_features = 10 * features + 7, 10 * test_features + 7  # Standardised, so the same.
    head = mj.fit_head(features, labels)
    found = np.mean(head(test_features).argmax(axis=1) == test_labels)
    assert probe(features, labels, test_features, test_labels, 1.0) == pytest.approx(found)
    assert found > 0.8


def test_more_features_than_examples_give_the_same_regression():
    random = np.random.default_rng(0)
    features, test_features = random.normal(size=(2, 40, 90)).astype(np.float32)
    labels = np.arange(40) % 3
    head = mj.fit_head(features, labels, penalty=10.0)
    answers = np.asarray(head(test_features).argmax(axis=1))  # What it says of noise is as good a test as any.
    assert probe(features, labels, test_features, answers, 10.0) == 1


def test_of_one_class_or_what_is_not_finite_there_is_no_probe():
    (features, labels), (test_features, test_labels) = clusters(0), clusters(1)
    assert probe(features, 0 * labels, test_features, test_labels, 1.0) is None
    assert probe(features, labels, np.full_like(test_features, np.inf), test_labels, 1.0) is None


def test_inputs_are_pixels_or_words():
    target = study.StudyModel(
        name="m", init=None, loss=None, optimizer=None, splits=None, evaluate=None, apply=len, inputs=("x",)
    )
    random = np.random.default_rng(0)
    labels = np.arange(80) % 2
    # The class is a word of its own, wherever it stands; as a number it says nothing.
    words = random.integers(10, 30, size=(80, 6))
    words[np.arange(80), random.integers(0, 6, 80)] = np.where(labels, 5, 40)
    halves = [{"x": words[part].astype(np.int32), "label": labels[part]} for part in (slice(40), slice(40, None))]
    assert inputs_lr(target, Sample(*halves)) > 0.9
    pixels = random.integers(0, 100, size=(80, 2, 2, 1)) + 100 * labels[:, None, None, None]
    halves = [{"x": pixels[part].astype(np.uint8), "label": labels[part]} for part in (slice(40), slice(40, None))]
    assert inputs_lr(target, Sample(*halves)) > 0.9


@pytest.fixture(scope="module")
def scenario():
    return cross_structure.build(CONFIG)


def trials_of(scenario, config=CONFIG):
    return make_trials(scenario, config, SourcePlan(lengths=scenario.schedule.source))


@pytest.fixture(scope="module")
def source(scenario):
    return TrainState(*scenario.source.init(jax.random.key(0)), None)


def test_a_target_is_measured_after_the_first_write_of_its_transfer(scenario, source):
    trial = trials_of(scenario)["aligned"]
    state = trial.initial_state(0, source)
    found = trial.measure_start(state, 0)
    params = trial.method.transfer.apply(state.adapter.params, source.params, state.target.params)
    splits = scenario.target.splits(0)
    expected = scenario.target.evaluate(params, state.target.model_state, splits.test)["accuracy"]
    assert found["target_start_test"] == pytest.approx(expected)
    observe = observer(scenario.target, splits.test)
    variables = {"params": params, **state.target.model_state}
    statistics = {
        "batch_stats": mj.reset_statistics(scenario.target.apply, variables, splits.train["image"])["batch_stats"]
    }
    (features, _), (test_features, logits) = (observe(params, statistics, part) for part in (splits.train, splits.test))
    assert found["target_start_reset"] == np.mean(logits.argmax(axis=1) == splits.test["label"])
    assert found["target_start_reset"] != found["target_start_test"]
    assert found["target_start_probe"] == pytest.approx(
        probe(features, splits.train["label"], test_features, splits.test["label"], 1.0), abs=0.006
    )
    vanilla = trials_of(scenario)["vanilla"]
    blank = vanilla.initial_state(0, source)
    assert (
        vanilla.measure_start(blank, 0)["target_start_test"]
        == scenario.target.evaluate(blank.target.params, blank.target.model_state, splits.test)["accuracy"]
    )


def test_opponents_are_the_inputs_and_the_source(scenario, source):
    plan = SourcePlan(lengths=scenario.schedule.source)
    found = make_opponents(scenario, plan)(source, 0)
    assert list(found) == ["inputs_lr", "source_lr", "source"]
    assert found["inputs_lr"] > 0.75
    splits = scenario.source.splits(0)
    assert found["source"] == scenario.source.evaluate(source.params, source.model_state, splits.test)["accuracy"]
    # One that is not trained before, or has other labels, is none.
    assert list(make_opponents(scenario, replace(plan, live=True))(source, 0)) == ["inputs_lr"]

    def relabelled(seed):
        own = splits.test
        return replace(splits, test={**own, "label": own["label"] % 2})

    other = replace(scenario, source=replace(scenario.source, splits=relabelled))
    assert list(make_opponents(other, plan)(source, 0)) == ["inputs_lr", "source_lr"]
    assert list(make_opponents(replace(scenario, source=None), plan)(source, 0)) == ["inputs_lr"]
    assert make_opponents(scenario, plan)(source, 0, ["source"]) == {"source": found["source"]}
    assert make_opponents(scenario, plan)(source, 0, []) == {}


def test_a_source_that_knows_nothing_is_warned_of(scenario, source, capsys):
    plan = SourcePlan(lengths=scenario.schedule.source)
    make_opponents(scenario, plan)(source, 0)
    line = capsys.readouterr().err
    assert "warning: the source small_resnet of seed 0 is right on" in line
    assert "--source-steps" in line
    make_opponents(scenario, plan, controlled=True)(source, 0)  # An untrained one is asked for.
    splits = scenario.source.splits(0)
    features = observer(scenario.source, splits.test)(source.params, source.model_state, splits.train).features
    head = mj.fit_head(features, splits.train["label"])
    make_opponents(scenario, plan)(source.replace(params={**source.params, "fc": head._asdict()}), 0)
    assert "warning" not in capsys.readouterr().err


def test_what_is_no_classifier_has_its_metric_alone(scenario, source):
    judged = replace(scenario.target, metric="f1", evaluate=lambda *given: {"f1": 0.25})
    target = TrainState(*judged.init(jax.random.key(0)), None)
    assert make_measures(judged, observer(judged, judged.splits(0).test)).start(target, 0) == {
        "test": 0.25,
        "reset": None,
        "probe": None,
    }
    assert make_opponents(replace(scenario, target=judged), SourcePlan())(source, 0) == {}


def test_of_many_examples_some_are_drawn(scenario, monkeypatch):
    monkeypatch.setattr("merge_jax.study.measures._MOST", 20)
    target = replace(scenario.target, splits=lambda seed: scenario.target.splits(0))
    found = [sampled(target, seed).fitted["image"] for seed in (0, 0, 1)]
    assert [len(one) for one in found] == [20] * 3
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


@pytest.mark.parametrize("method", [pytest.param("vanilla", marks=pytest.mark.slow), "aligned"])
def test_the_head_is_fitted_first_to_what_a_method_writes_and_is_kept(scenario, source, method):
    trial = trials_of(replace(scenario, head_first=True))[method]
    state = trial.initial_state(0, source)
    plain = trials_of(scenario)[method].initial_state(0, source)
    measured, before = trial.measure_start(state, 0), trials_of(scenario)[method].measure_start(plain, 0)
    assert measured["target_start_test"] == pytest.approx(measured["target_start_probe"], abs=0.006)
    assert measured["target_start_probe"] == pytest.approx(before["target_start_probe"], abs=0.006)
    changed = [
        path
        for path, leaf in mj.flatten(state.target.params).items()
        if (leaf != mj.flatten(plain.target.params)[path]).any()
    ]
    assert changed == ["fc/bias", "fc/kernel"]
    jax.tree.map(np.testing.assert_array_equal, state.target.opt_state, plain.target.opt_state)
    written = trial.method.transfer.apply(state.adapter.params, source.params, state.target.params)
    np.testing.assert_array_equal(written["fc"]["kernel"], state.target.params["fc"]["kernel"])


def test_a_head_is_that_of_a_classifier_with_features(scenario):
    bare = replace(scenario.target, metric="f1")
    with pytest.raises(ValueError, match="head_first needs a classifier that sows 'features'"):
        trials_of(replace(scenario, target=bare, head_first=True))


def test_a_method_that_writes_the_fitted_head_alone_is_refused(scenario):
    share = replace(scenario.methods["vanilla"], transfer=mj.share_transfer({"fc/*": "fc/*"}))
    methods = {**scenario.methods, "heads": share}
    with pytest.raises(
        ValueError, match=r"the method 'heads' writes fc/.* alone, and --head-first fits the last layer"
    ):
        trials_of(replace(scenario, methods=methods, head_first=True))
    trials_of(replace(scenario, methods=methods))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_head_that_dropout_would_undo_is_warned_of(rate, capsys):
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            x = nn.Dense(4, name="first")(x) + 100  # Alike in all examples, but for a little.
            self.sow("intermediates", "features", x)
            return nn.Dense(3, name="last")(nn.Dropout(rate, deterministic=not train)(x))

    features, labels = clusters(0)
    module, splits = Classifier(), data.Splits(*({"x": features, "label": labels},) * 3)
    model = study.StudyModel(
        name="little",
        init=lambda key: (module.init(key, features[:1])["params"], {}),
        splits=lambda seed: splits,
        apply=module.apply,
        inputs=("x",),
        loss=mj.classification_loss(module.apply, inputs="x"),
        optimizer=lambda steps: optax.sgd(0.1),
        evaluate=mj.evaluate_classifier(module.apply, inputs="x"),
    )
    paths, fit_head = make_fit_head(model, observer(model, splits.test))
    assert paths == ("last/kernel", "last/bias")
    state = TrainState(*model.init(jax.random.key(0)), None)
    for method in ("vanilla", "vanilla", "prepare"):
        fitted, _ = fit_head(state, 0, method)
    floored, _ = make_fit_head(replace(model, head_floor=9.0), observer(model, splits.test))[1](state, 0, "vanilla")
    assert np.abs(floored["last/kernel"]).max() < 0.5 * np.abs(fitted["last/kernel"]).max()
    said = capsys.readouterr().err
    for method, times in {"vanilla": 2, "prepare": 1}.items():  # Once for each of a run.
        assert said.count(f"the last layer of little, before {method}, was fitted first") == times * (rate > 0)


def test_a_pool_has_the_labelled_inputs_first_and_others_without_labels():
    train = {"image": np.arange(50.0)[:, None], "label": np.arange(50) % 5}
    labelled = mj.data.class_balanced(train, 10, 3)
    few, more = (draw_pool(train, 10, size, 3, ("image",)) for size in (5, 20))
    assert list(few) == ["image"]
    np.testing.assert_array_equal(few["image"][:10], labelled["image"])
    np.testing.assert_array_equal(more["image"][:15], few["image"])
    assert len(np.unique(more["image"])) == 30
    for labels, message in ((40, "40 are labelled, which leaves 10"), (None, "all are labelled, which leaves 0")):
        with pytest.raises(ValueError, match=f"unlabelled is 20, but of 50 training examples {message}"):
            check_pool(train, labels, 20)
    examples = {**labelled, "pool/image": few["image"]}
    assert [len(one) for one in inputs_of(examples, ("image",))] == [15]
    assert [len(one) for one in inputs_of(labelled, ("image",))] == [10]


def test_all_methods_see_the_same_pool_and_the_labelled_batches_stay():
    names = ("vanilla", "kd", "agree", "kd_mixed_agree", "aligned")
    config = replace(CONFIG, methods=names, unlabelled=300)
    scenario, plain = cross_structure.build(config), cross_structure.build(replace(config, unlabelled=0))
    trials = trials_of(scenario, config)
    assert [name for name, trial in trials.items() if trial.method.pooled] == ["kd", "agree", "kd_mixed_agree"]
    assert len(trials["kd"].arrays(0)["pool"]["image"]) == 360
    assert "pool" not in trials["vanilla"].arrays(0)
    rows = {name: trial.indices_at(0)(0, 4) for name, trial in trials.items()}
    np.testing.assert_array_equal(rows["kd"]["pool"], rows["agree"]["pool"])
    before = trials_of(plain, config)["kd"].indices_at(0)(0, 4)
    for found in (rows[name] for name in names):
        np.testing.assert_array_equal(found["target"], before["target"])
    # The loss reads the pool, and labels are of the labelled images alone.
    method, (params, state) = scenario.methods["kd"], scenario.target.init(jax.random.key(1))
    source = scenario.source.init(jax.random.key(0))
    arrays = trials["kd"].arrays(0)
    batch = {"image": arrays["target"]["image"][:8], "label": arrays["target"]["label"][:8]}

    def loss(first):
        shown = method.teacher(*source, {**batch, "pool/image": arrays["pool"]["image"][first : first + 8]})
        return float(jax.jit(method.task.loss_fn)(params, state, shown, jax.random.key(0))[0])

    assert loss(100) != loss(200)
    examples = trials["aligned"]._examples(0)
    assert set(examples) == {"image", "label", "pool/image"}


def test_a_scenario_without_a_pool_refuses_unlabelled_inputs(capsys):
    config = replace(CONFIG, unlabelled=10, head_floor=0.1)
    target = cross_structure.build(CONFIG).target
    with pytest.raises(ValueError, match="unlabelled is 10, but small_resnet_half has no pool of unlabelled inputs"):
        study.make_scenario("s", config, target, target, [])
    assert "--head-floor has no effect without --head-first" in capsys.readouterr().err


def test_a_rate_is_a_factor_on_every_update(scenario):
    scaled = cross_structure.build(replace(CONFIG, target_rate=0.5))
    params, _ = scenario.target.init(jax.random.key(0))
    grads = jax.tree.map(np.ones_like, params)
    updates = []
    for one in (scenario, scaled):
        optimizer = one.methods["vanilla"].task.optimizer
        updates.append(optimizer.update(grads, optimizer.init(params), params)[0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), *[jax.tree.map(np.asarray, u) for u in (
        jax.tree.map(lambda update: update / 2, updates[0]), updates[1])])  # fmt: skip


@pytest.mark.slow
def test_channels_by_magnitude_are_the_largest_and_random_ones_the_seeds(scenario, source):
    config = replace(CONFIG, methods=("pruned", "random_channels"))
    trials = trials_of(cross_structure.build(config), config)
    found = [trials["random_channels"].initial_state(seed, source).target.params["fc"]["kernel"] for seed in (0, 1)]
    assert (found[0] != found[1]).any()
    pruned = trials["pruned"].initial_state(0, source).target.params
    taken = np.asarray(source.params["stem"]["kernel"])[..., None, :] == np.asarray(pruned["stem"]["kernel"])[..., None]
    assert taken.all(axis=tuple(range(taken.ndim - 2))).any(axis=-1).all()  # Each whole channel is one of the source's.


def test_old_runs_have_no_columns_of_what_they_did_not_measure():
    results = [{"method": "vanilla", "seed": 0, "target_test": 0.5, "source_test": None, "target_best_validation": 0.6,
                "seconds": 1.0, "compile_seconds": 1.0, "adapter_parameters": 0,
                "test_metrics": {"target": {"accuracy": 0.5}}}]  # fmt: skip
    model = mj.runs.Model("m", 1, "accuracy", (1, 1, 1))
    plan = mj.runs.Plan(
        experiment="e", source=None, target=model, origin="", steps=1, batch_size=1, methods=("vanilla",), seeds=1,
        transfers={}, devices="",
    )  # fmt: skip
    (table,) = result_tables(Run(None, plan, {}, [{}], results, []))
    assert table.headings == ("method", "target", "- vanilla", "best val.", "source", "s/run", "compile s", "adapter")
    measured = [{**results[0], "target_start_test": 0.25, "target_start_probe": 0.375}]
    opponents = [{"opponent": "inputs_lr", "seed": 0, "target_test": 0.75}]
    (table,) = result_tables(Run(None, plan, {}, [{}], measured, [], opponents))
    assert table.headings[3:5] == ("after write", "probe")
    assert table.rows[0][3:5] == ("25.0", "37.5")
    assert table.rows[1][:4] == ("inputs_lr", "75.0", "+25.0", "")
    assert len(table.rows[1]) == len(table.headings)
    session = {"command": "c", "cpu_count": 1, "versions": {"jax": "0"}, "date": "2026-11-30"}
    two = [*measured, {**measured[0], "seed": 1}]
    assert "inputs_lr: measured on 1 of 2 seeds" in notes(Run(None, plan, {}, [session], two, [], opponents))
