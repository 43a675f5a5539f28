"""What a frozen source shows of the target's examples is computed once, and changes nothing."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import merge_jax.study.shown
from experiments import cross_structure, cross_task
from merge_jax.study.sources import SourcePlan
from merge_jax.study.trial import make_trials
from merge_jax.training.joint import TrainState

CONFIG = replace(
    cross_structure.PRESETS["smoke"], labels=60, target_model="small_resnet_half", compare_on="plain", steps=3
)


def trials_of(config, **plan):
    return make_trials(cross_structure.build(config), config, SourcePlan(**{"read": lambda seed: None, **plan}))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "unlabelled"), [("kd_agree", 0), ("kd", 100)])
def test_steps_are_the_same_where_a_source_is_asked_once(name, unlabelled, monkeypatch):
    config = replace(CONFIG, methods=(name,), unlabelled=unlabelled)
    found = []
    for most in (10**9, 0):
        monkeypatch.setattr(merge_jax.study.shown, "_MOST_BYTES", most)
        trial = trials_of(config)[name]
        assert (trial.shown is None) == (most == 0)
        source = TrainState(*trial.roles["source"].init(jax.random.key(5)), None)
        arrays = trial.shown_arrays(0, source)
        assert list(arrays) == (["target", "pool"] if unlabelled else ["target"])
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)
        assert trial._array_shapes(3, source) == shapes
        rows = trial.indices_at(0)(0, 3)
        state, sums = jax.jit(trial.epoch)(trial.initial_state(0, source), arrays, rows, np.int32(3))
        found.append([float(sums["target/loss"]), *np.asarray(state.target.params["fc"]["bias"])])
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)


def test_it_is_asked_once_for_all_methods_and_again_for_another_seed():
    trials = trials_of(replace(CONFIG, methods=("kd", "share_kd", "agree", "share_agree")))
    assert trials["kd"].shown is trials["share_kd"].shown
    assert trials["agree"].shown is trials["share_agree"].shown
    source = TrainState(*trials["kd"].roles["source"].init(jax.random.key(5)), None)
    first = trials["kd"].shown_arrays(0, source)["target"]["teacher_logits"]
    assert trials["share_kd"].shown_arrays(0, source)["target"]["teacher_logits"] is first
    assert (trials["kd"].shown_arrays(1, source)["target"]["teacher_logits"] != first).any()


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({"source": "live"}, {"live": True}),
        ({"augment": True}, {}),
        ({"methods": ("kd_mixed", "agree"), "compare_on": "mixed"}, {}),
        ({"methods": ("rkd_agree",), "unlabelled": 40}, {}),  # One reads labelled examples, the other the pool.
        ({"source": "trajectory"}, {"snapshots": 2}),
    ],
)
def test_what_changes_is_computed_at_every_step(options, plan):
    trials = trials_of(replace(CONFIG, **{"methods": ("kd",), **options}), **plan)
    assert [trial.shown for trial in trials.values()] == [None] * len(trials)


def test_texts_cannot_be_mixed_so_what_is_shown_of_them_stays():
    config = replace(cross_task.PRESETS["default"], methods=("agree",), steps=2, labels=40)
    assert config.compare_on == "mixed"
    trials = make_trials(cross_task.build(config), config, SourcePlan(read=lambda seed: None))
    assert trials["agree"].shown is not None
