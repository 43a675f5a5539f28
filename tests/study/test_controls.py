"""Controls of the source: what methods are handed in the place of a trained one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cross_structure, self_transfer
from merge_jax.data import indices_of, num_examples
from merge_jax.paths import flatten
from merge_jax.study.cli import parse
from merge_jax.study.runner import check_run
from merge_jax.study.sources import OTHER_SEED, PURPOSES, control_source, initial_key, plan_source
from merge_jax.study.trial import make_trials
from merge_jax.training.joint import TrainState
from tests import tiny

LITTLE = [
    *("smoke", "--steps", "4", "--source-steps", "4", "--report-every", "2", "--checkpoint-every", "4"),
    *("--methods", "share"),
]


def trained():
    keys = jax.random.split(jax.random.key(7), 2)
    params = {
        "kernel": 3 + 2 * jax.random.normal(keys[0], (40, 50)),
        "other": {"kernel": 3 + 2 * jax.random.normal(keys[1], (40, 50)).astype(jnp.bfloat16), "bias": jnp.ones(5)},
    }
    return TrainState(params, {"batch_stats": {"mean": jnp.arange(3.0)}}, None)


def trials_of(*options):
    config = parse(cross_structure.PRESETS, "", "", [*LITTLE, *options])
    config.check()
    scenario = cross_structure.build(config)
    source_plan = plan_source(scenario, config)
    return scenario, source_plan, make_trials(scenario, config, source_plan)


def assert_equal_trees(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_shuffled_keeps_the_numbers_of_each_leaf_and_moves_them():
    source = trained()
    found = control_source("shuffled", source, seed=3)
    for path, leaf in flatten(source.params).items():
        other = flatten(found.params)[path]
        assert (other.shape, other.dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_array_equal(np.sort(np.ravel(other)), np.sort(np.ravel(leaf)))
    moved = np.mean(np.asarray(found.params["kernel"]) != np.asarray(source.params["kernel"]))
    assert moved > 0.99
    assert found.model_state is source.model_state


def test_noise_keeps_mean_and_deviation_of_each_leaf_alone():
    source = trained()
    found = control_source("noise", source, seed=3)
    for path, leaf in flatten(source.params).items():
        other = flatten(found.params)[path]
        assert (other.shape, other.dtype) == (leaf.shape, leaf.dtype)
        other, leaf = np.asarray(other, np.float64), np.asarray(leaf, np.float64)
        assert np.mean(other) == pytest.approx(np.mean(leaf), abs=0.2)
        assert np.std(other) == pytest.approx(np.std(leaf), rel=0.1)
    kernels = found.params["kernel"], found.params["other"]["kernel"]
    assert not np.isin(np.asarray(kernels[0]), np.asarray(source.params["kernel"])).any()
    assert abs(np.corrcoef(np.ravel(kernels[0]), np.asarray(kernels[1], np.float32).ravel())[0, 1]) < 0.1
    assert len(np.unique(np.asarray(kernels[1]).view(np.uint16))) > 200  # JAX draws 128 values in bfloat16.
    assert found.model_state is source.model_state


@pytest.mark.parametrize("control", ["shuffled", "noise"])
def test_what_is_drawn_depends_on_the_seed_alone(control):
    source = trained()
    assert_equal_trees(control_source(control, source, 1).params, control_source(control, source, 1).params)
    other = control_source(control, source, 2).params["kernel"]
    assert not np.array_equal(control_source(control, source, 1).params["kernel"], other)


@pytest.mark.parametrize("control", ["none", "random", "other_seed"])
def test_controls_of_the_training_leave_the_source_as_it_is(control):
    source = trained()
    assert control_source(control, source, 1) is source


def test_random_is_the_source_as_it_starts_and_trains_none():
    scenario, source_plan, trials = trials_of("--source-control", "random")
    assert list(trials) == ["share"]
    params, model_state = scenario.source.init(initial_key(1, "source"))
    found = source_plan.read(1)
    assert_equal_trees(found.params, params)
    assert_equal_trees(found.model_state, model_state)


def test_random_is_the_start_of_the_source_that_a_run_trains():
    _, source_plan, _ = trials_of("--source-control", "random")
    _, _, plain = trials_of()
    start = plain["source"].initial_state(1, TrainState({}, {}, None)).target
    assert_equal_trees(source_plan.read(1).params, start.params)


def test_source_and_target_share_nothing_that_is_drawn():
    """Equal models on equal data: else leaves of one path and shape start alike, and batches come in one order."""
    config = parse(tiny.PRESETS, "", "", ["--labels", "None"])
    config.check()
    scenario = tiny.build(config)
    trials = make_trials(scenario, config, plan_source(scenario, config))
    fresh = trials["share"].fresh_source(0)
    of_source = trials["source"].initial_state(0, TrainState({}, {}, None))
    of_target = trials["share"].initial_state(0, fresh)
    kernels = [state.target.params["fc"]["kernel"] for state in (of_source, of_target)]
    assert not np.isin(*kernels).any()
    assert not np.array_equal(*(jax.random.key_data(state.key) for state in (of_source, of_target)))
    orders = [trials[name].indices_at(0)(0, 4)["target"] for name in ("source", "share")]
    assert not np.array_equal(*orders)
    # The source that learns beside the target begins and reads as the one that was trained before it.
    config = parse(tiny.PRESETS, "", "", ["--labels", "None", "--source", "live"])
    live = make_trials(scenario, config, plan_source(scenario, config))["share"]
    assert_equal_trees(live.fresh_source(0).params, of_source.target.params)
    np.testing.assert_array_equal(live.indices_at(0)(0, 4)["source"], orders[0])


def test_keys_of_a_seed_are_all_different_and_no_backend_matters():
    keys = {tuple(jax.random.key_data(initial_key(seed, purpose)).tolist()) for seed in (0, 1) for purpose in PURPOSES}
    assert len(keys) == 2 * len(PURPOSES)
    assert all(jax.random.key_impl(initial_key(0, purpose)) == "threefry2x32" for purpose in PURPOSES)


def test_other_seed_is_another_start_and_other_batches_of_the_same_split():
    _, _, plain = trials_of()
    _, _, other = trials_of("--source-control", "other_seed")
    mine, theirs = plain["source"], other["source"]
    fresh = mine.fresh_source(0)
    assert_equal_trees(
        theirs.initial_state(0, fresh).target.params, mine.initial_state(OTHER_SEED, fresh).target.params
    )
    keys = [
        jax.random.key_data(trial.initial_state(seed, fresh).key) for trial, seed in ((theirs, 0), (mine, OTHER_SEED))
    ]
    np.testing.assert_array_equal(*keys)
    assert_equal_trees(theirs.arrays(0), mine.arrays(0))
    size = num_examples(mine.roles["target"].splits(0).train)
    order = indices_of(size, mine.config.batch_size, OTHER_SEED, stream=1)(0, 4)
    np.testing.assert_array_equal(theirs.indices_at(0)(0, 4)["target"], order)
    assert not np.array_equal(mine.indices_at(0)(0, 4)["target"], order)
    # What receives is the same.
    given = plain["share"].fresh_source(0)
    assert_equal_trees(
        other["share"].initial_state(0, given).target.params, plain["share"].initial_state(0, given).target.params
    )
    np.testing.assert_array_equal(
        other["share"].indices_at(0)(0, 4)["target"], plain["share"].indices_at(0)(0, 4)["target"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "live"], "pretrained or frozen; this one is live: leave out shuffled"),
        (["--source", "trajectory"], "pretrained or frozen; this one is trajectory: leave out shuffled"),
    ],
)
def test_controls_need_a_source_that_is_handed_over(options, message):
    with pytest.raises(ValueError, match=message):
        trials_of("--source-control", "shuffled", *options)


def test_a_source_of_another_seed_is_trained_and_not_read(tmp_path):
    with pytest.raises(ValueError, match="other_seed trains a source of another seed: leave out --source frozen"):
        trials_of("--source-control", "other_seed", "--source", "frozen", "--source-from", str(tmp_path))


def test_a_target_that_is_its_own_source_has_none_to_control():
    config = parse(self_transfer.PRESETS, "", "", ["smoke", "--source-control", "noise"])
    with pytest.raises(ValueError, match="its own source has no control: leave out source_control noise"):
        check_run(self_transfer.build(config), config)
