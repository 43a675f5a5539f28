import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.training.trajectory import last_of, load_trajectory, replay_evenly, replayed
from tests import helpers

SHARE = mj.share_transfer({"a": "b"})
TARGET = {"a": jnp.zeros((2, 3)), "rest": jnp.ones(4)}


def trajectory(*values):
    return {"b": jnp.stack([jnp.full((2, 3), float(value)) for value in values])}


@pytest.fixture
def saved(tmp_path):
    """A run of which the steps 3, 6 and 9 are saved; the target's parameters are filled with the step's number."""
    state = helpers.initial_state(mj.identity_transfer(), frozen=True)
    with mj.Checkpoints(tmp_path / "run", keep=None) as checkpoints:
        for step in (3, 6, 9):
            params = jax.tree.map(lambda leaf, step=step: jnp.full_like(leaf, step), state.target.params)
            checkpoints.save(step, state.replace(target=state.target.replace(params=params)))
    with mj.Checkpoints(tmp_path / "run") as checkpoints:
        yield checkpoints, state.target


@pytest.mark.parametrize("steps", [None, [6], pytest.param([9, 3], marks=pytest.mark.slow)])
def test_each_replayed_step_is_the_one_named(saved, steps):
    checkpoints, model = saved
    found = load_trajectory(checkpoints, {"target/params": model.params}, steps=steps)
    assert found.steps == (tuple(sorted(steps)) if steps else (3, 6, 9))
    params = found.parts["target/params"]
    replay = replay_evenly(len(found.steps), num_steps=12)
    routes = {"hidden/kernel": "hidden/kernel"}
    transfer = replayed(mj.share_transfer(routes), replay)
    blank = jax.tree.map(jnp.zeros_like, model.params)
    for step in range(14):
        number = min(step * len(found.steps) // 12, len(found.steps) - 1)
        merged = transfer.apply({}, params, blank, step=step)
        np.testing.assert_array_equal(merged["hidden"]["kernel"], found.steps[number])
        assert int(transfer.monitor({}, params, blank, step=step)["snapshot"]) == number


def test_missing_steps_are_named(saved):
    checkpoints, model = saved
    with pytest.raises(ValueError, match=r"run lacks the steps \[4, 12\]; saved: \[3, 6, 9\]"):
        load_trajectory(checkpoints, {"target/params": model.params}, steps=[3, 12, 4])


def test_a_run_without_steps_is_refused(tmp_path):
    with (
        mj.Checkpoints(tmp_path / "empty") as checkpoints,
        pytest.raises(ValueError, match=r"empty has no steps; saved: \[\]"),
    ):
        load_trajectory(checkpoints, {"target/params": {}})


@pytest.mark.parametrize(("snapshots", "steps"), [(1, 1), (1, 7), (3, 7), (5, 5), (8, 3), (4, 2**31 - 1)])
def test_saved_steps_are_shown_evenly_and_in_order(snapshots, steps):
    replay = replay_evenly(snapshots, steps)
    asked = range(steps + 2) if steps < 100 else [0, steps // 4, steps // 4 + 1, steps // 2, steps - 1]
    for step in asked:
        assert int(replay(step)) == min(step * snapshots // steps, snapshots - 1)


@pytest.mark.slow
def test_the_joint_step_replays(next_key):
    """Compiled, through a transfer that learns, with the number of the snapshot among the metrics."""
    source, _ = helpers.variables(helpers.SOURCE, 0)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), source)
    transfer = replayed(mj.lpka_transfer(helpers.ROUTES, num_layers=1), replay_evenly(2, 4))
    params, model_state = helpers.variables(helpers.TARGET, 1)
    task = helpers.task(helpers.TARGET)
    state = mj.init_joint_state(
        next_key(), None, task, transfer, source_params=stacked, target_params=params, target_state=model_state
    )
    step = jax.jit(mj.make_joint_step(None, task, transfer, cycle=1))
    seen = []
    for i in range(4):
        state, metrics = step(state, {"target": helpers.batch(i)})
        seen.append(float(metrics["adapter/snapshot"]))
    assert seen == [0, 0, 1, 1]
    assert f"adapter/gate/{next(iter(helpers.ROUTES))}" in metrics
    np.testing.assert_array_equal(state.source.params["fc"]["kernel"], stacked["fc"]["kernel"])


def test_routes_are_described_for_one_snapshot():
    one = SHARE.describe({"b": jnp.zeros((2, 3))}, TARGET)
    assert replayed(SHARE, replay_evenly(2, 4)).describe(trajectory(1, 2), TARGET) == one


def test_the_last_snapshot_teaches():
    teacher = last_of(lambda params, state, batch: {**batch, "teacher": (params["b"][0, 0], state)})
    taught = teacher(trajectory(1, 2, 3), {}, {"x": 0})
    assert (float(taught["teacher"][0]), taught["teacher"][1]) == (3.0, {})


def test_a_number_outside_is_an_end():
    for number, expected in ((-5, 1.0), (7, 2.0)):
        merged = replayed(SHARE, lambda step, number=number: number).apply({}, trajectory(1, 2), TARGET, step=0)
        assert merged["a"][0, 0] == expected


def test_bad_trajectories_are_refused():
    with pytest.raises(ValueError, match="what is replayed must be a Transfer"):
        replayed(3, replay_evenly(1, 1))
    with pytest.raises(ValueError, match="replay must be a function of the step"):
        replayed(SHARE, 3)
    with pytest.raises(ValueError, match=r"pass it, as in transfer.apply\(..., step=step\)"):
        replayed(SHARE, replay_evenly(1, 1)).apply({}, trajectory(1), TARGET)
    uneven = {"b": jnp.zeros((2, 2, 3)), "c": jnp.zeros((3, 2))}
    with pytest.raises(ValueError, match=r"one K for all, got leading axes \[2, 3\]"):
        replayed(SHARE, replay_evenly(1, 1)).apply({}, uneven, TARGET, step=0)
    with pytest.raises(ValueError, match="num_snapshots must be a whole number of at least 1, got 0"):
        replay_evenly(0, 4)
