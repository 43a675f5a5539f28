"""Alignment in the experiments: what a run starts from, when it writes, and where it is refused."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import merge_jax as mj
from experiments import cross_structure, cross_task, self_transfer
from merge_jax.study.sources import Origin
from merge_jax.study.trial import make_stages

CONFIG = replace(
    cross_structure.PRESETS["smoke"],
    labels=50,
    target_model="small_resnet_half",
    routes=("**=**",),
    methods=("aligned", "mergenet_aligned"),
    steps=20,
)


@pytest.fixture(scope="module")
def scenario():
    return cross_structure.build(CONFIG)


@pytest.fixture(scope="module")
def stages(scenario):
    return make_stages(
        scenario, CONFIG, Origin(live=False, read=None, lengths=scenario.schedule.source, snapshots=None)
    )


def test_a_run_starts_from_what_enters_the_source_on_the_targets_images(scenario, stages):
    stage = stages["aligned"]
    source = stage.fresh_source(0)
    state = stage.initial_state(0, source)
    images = scenario.target.splits(0).train["image"]
    assert len(images) == 50
    model = mj.models.small_resnet(10, num_stages=1)

    def read(params, model_state, images):
        return model.apply({"params": params, **model_state}, images)

    moments = mj.input_moments(read, source.params, source.model_state, images)
    expected = stage.method.transfer.fit(moments, source.params, state.target.params)
    for found, wanted in zip(*map(jax.tree.leaves, (state.adapter.params, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-3)  # Compiled otherwise.
    even = stage.method.transfer.init(jax.random.key(0), source.params, state.target.params)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.adapter.params, even)), strict=True))


def test_it_writes_at_the_first_step_alone(scenario, stages):
    assert stages["aligned"].method.stop * scenario.schedule.target.steps == 1
    stage = stages["mergenet_aligned"]
    source = stage.fresh_source(0)
    state = stage.initial_state(0, source)
    aligned = stages["aligned"].initial_state(0, source)
    jax.tree.map(np.testing.assert_array_equal, state.adapter.params["0"], aligned.adapter.params)
    transfer, old = stage.method.transfer, state.target.params
    first, later = (transfer.apply(state.adapter.params, source.params, old, step=step) for step in (0, 1))
    wanted = stages["aligned"].method.transfer.apply(aligned.adapter.params, source.params, old)
    for path, leaf in mj.flatten(first).items():
        np.testing.assert_allclose(leaf, mj.flatten(wanted)[path], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(mj.flatten(later)[path], mj.flatten(old)[path])


@pytest.mark.parametrize("source", ["live", "trajectory"])
def test_a_source_that_is_not_trained_before_is_refused(scenario, source):
    origin = Origin(live=source == "live", snapshots=3 if source == "trajectory" else None)
    with pytest.raises(ValueError, match=f"with --source {source} there is none before the first step"):
        make_stages(scenario, replace(CONFIG, source=source), origin)


def test_a_source_that_is_many_or_the_model_itself_is_refused():
    several = replace(
        cross_task.PRESETS["digits"], source_task=("digits", "parity"), routes=("fc/kernel=fc/kernel",), agree=()
    )
    for module, config in ((cross_task, several), (self_transfer, self_transfer.PRESETS["default"])):
        with pytest.raises(ValueError, match="a method with aligned needs one source that is a model of its own"):
            module.build(replace(config, methods=("aligned",)))
