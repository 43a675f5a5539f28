"""Alignment in the experiments: what a run starts from, when it writes, and where it is refused."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import merge_jax as mj
from experiments import cross_structure, cross_task, self_transfer
from merge_jax.study.sources import SourcePlan
from merge_jax.study.trial import make_trials

CONFIG = replace(
    cross_structure.PRESETS["smoke"],
    labels=50,
    target_model="small_resnet_half",
    routes=("**=**",),
    methods=("aligned", "mergenet_residual_aligned"),
    steps=20,
)


@pytest.fixture(scope="module")
def scenario():
    return cross_structure.build(CONFIG)


@pytest.fixture(scope="module")
def trials(scenario):
    return make_trials(
        scenario, CONFIG, SourcePlan(live=False, read=None, lengths=scenario.schedule.source, snapshots=None)
    )


def test_a_run_starts_from_what_enters_the_source_on_the_targets_images(scenario, trials):
    trial = trials["aligned"]
    source = trial.fresh_source(0)
    state = trial.initial_state(0, source)
    images = scenario.target.splits(0).train["image"]
    assert len(images) == 50
    model = mj.models.small_resnet(10, num_stages=1)

    def read(params, model_state, images):
        return model.apply({"params": params, **model_state}, images)

    moments = mj.input_moments(read, source.params, source.model_state, images)
    expected = trial.method.transfer.fit(moments, source.params, state.target.params)
    for found, wanted in zip(*map(jax.tree.leaves, (state.adapter.params, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-3)  # Compiled otherwise.
    even = trial.method.transfer.init(jax.random.key(0), source.params, state.target.params)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.adapter.params, even)), strict=True))


def test_it_writes_at_the_first_step_alone(scenario, trials):
    assert trials["aligned"].method.stop * scenario.schedule.target.steps == 1
    trial = trials["mergenet_residual_aligned"]
    source = trial.fresh_source(0)
    state = trial.initial_state(0, source)
    aligned = trials["aligned"].initial_state(0, source)
    jax.tree.map(np.testing.assert_array_equal, state.adapter.params["0"], aligned.adapter.params)
    transfer, old = trial.method.transfer, state.target.params
    apply = jax.jit(transfer.apply)
    first, later = (apply(state.adapter.params, source.params, old, step=step) for step in (0, 1))
    wanted = jax.jit(trials["aligned"].method.transfer.apply)(aligned.adapter.params, source.params, old)
    for path, leaf in mj.flatten(first).items():
        np.testing.assert_allclose(leaf, mj.flatten(wanted)[path], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(mj.flatten(later)[path], mj.flatten(old)[path])


@pytest.mark.parametrize("source", ["live", "trajectory"])
def test_a_source_that_is_not_trained_before_is_refused(scenario, source):
    source_plan = SourcePlan(live=source == "live", snapshots=3 if source == "trajectory" else None)
    with pytest.raises(ValueError, match=f"with --source {source} there is none before the first step"):
        make_trials(scenario, replace(CONFIG, source=source), source_plan)


def test_a_source_that_is_many_or_the_model_itself_is_refused():
    several = replace(
        cross_task.PRESETS["digits"], source_task=("digits", "parity"), routes=("fc/kernel=fc/kernel",), agree=()
    )
    for module, config in ((cross_task, several), (self_transfer, self_transfer.PRESETS["default"])):
        with pytest.raises(ValueError, match="a method with aligned needs one source that is a separate model"):
            module.build(replace(config, methods=("aligned",)))
