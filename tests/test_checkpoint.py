import chex
import jax
import jax.numpy as jnp
import pytest

import merge_jax as mj
from merge_jax.checkpoint import Checkpoints
from tests import helpers

LPKA = mj.lpka_transfer(helpers.ROUTES, num_layers=1, num_heads=2)


def test_a_joint_state_comes_back_as_it_was(tmp_path):
    state = helpers.initial_state(LPKA)
    with Checkpoints(tmp_path / "of a run") as checkpoints:
        assert checkpoints.restore_latest(state) is None
        checkpoints.save(3, state)
    blank = jax.tree.map(jnp.zeros_like, helpers.initial_state(LPKA).replace(key=state.step))
    blank = blank.replace(key=jax.random.key(9))
    with Checkpoints(tmp_path / "of a run") as checkpoints:
        step, restored = checkpoints.restore_latest(blank)
    assert step == 3
    assert isinstance(restored, mj.JointState)
    chex.assert_trees_all_equal(
        restored.replace(key=jax.random.key_data(restored.key)),
        state.replace(key=jax.random.key_data(state.key)),
    )


def test_the_newest_are_kept_and_nothing_is_overwritten(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 5):
            checkpoints.save(step, {"x": jnp.full(3, float(step))})
        for step in (5, 4):
            with pytest.raises(FileExistsError, match=f"cannot save step {step}: step 5 is already there"):
                checkpoints.save(step, {"x": jnp.zeros(3)})
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore_latest({"x": jnp.zeros(3)})
    assert step == 5
    assert state["x"][0] == 5
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "5"]


def test_a_save_in_flight_survives_an_error(tmp_path):
    def save_and_fail():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, {"x": jnp.ones(3)})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        save_and_fail()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"x": jnp.zeros(4)}, r"x is saved as float32\[3\], wanted as float32\[4\]"),
        ({"x": jnp.zeros(3, jnp.bfloat16)}, r"x is saved as float32\[3\], wanted as bfloat16\[3\]"),
        ({"y": jnp.zeros(3)}, "x is saved, but not wanted; y is not saved"),
    ],
)
def test_another_tree_is_refused_by_name(tmp_path, wanted, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore_latest(wanted)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_parts_of_a_step_are_read_by_path(tmp_path):
    state = helpers.initial_state(LPKA)
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state.replace(step=jnp.int32(10 * step)))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == (1, 2, 3)
        parts = {"target/params": state.target.params, "step": state.step}
        found = checkpoints.restore_parts(2, parts)
        assert int(found["step"]) == 20
        chex.assert_trees_all_equal(found["target/params"], state.target.params)
        with pytest.raises(ValueError, match=r"step 4 is not saved in .*; saved: \[1, 2, 3\]"):
            checkpoints.restore_parts(4, parts)
        with pytest.raises(ValueError, match="source/params/hidden/bias is saved, but not wanted"):
            checkpoints.restore_parts(2, {"source/params": {"fc": state.source.params["fc"]}})
