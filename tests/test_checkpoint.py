import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
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


def test_buffers_given_away_after_a_save_are_saved_as_they_were(tmp_path, monkeypatch):
    """As the training loop gives them away: the next step writes into them while they are saved."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    numbers = np.arange(10**6, dtype=np.float32)
    state = {"of jax": jnp.asarray(numbers), "of numpy": numbers.copy(), "half": jnp.asarray(numbers, jnp.bfloat16)}
    overwritten = threading.Event()
    with Checkpoints(tmp_path) as checkpoints:
        write = checkpoints._write
        monkeypatch.setattr(checkpoints, "_write", lambda *arguments: overwritten.wait() and write(*arguments))
        checkpoints.save(1, {**state, "key": jax.random.key(1)})
        given_away = overwrite({name: leaf for name, leaf in state.items() if name != "of numpy"})
        state["of numpy"][:] = -1
        overwritten.set()
    assert given_away["of jax"][0] == -1
    like = {**jax.tree.map(jnp.zeros_like, {**given_away, "of numpy": numbers}), "key": jax.random.key(0)}
    with Checkpoints(tmp_path) as checkpoints:
        _, restored = checkpoints.restore_latest(like)
    np.testing.assert_array_equal(restored["of jax"], numbers)
    np.testing.assert_array_equal(restored["of numpy"], numbers)
    np.testing.assert_array_equal(restored["half"], jnp.asarray(numbers, jnp.bfloat16))
    np.testing.assert_array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(jax.random.key(1)))


@pytest.mark.parametrize("ask", ["wait", "save", "close"])
def test_what_went_wrong_while_writing_is_told_by_what_comes_next(tmp_path, monkeypatch, ask):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.ones(3)}, score=0.5)
    checkpoints.wait()

    def full(*unused, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints._checkpointer, "save_async", full)
    checkpoints.save(2, {"x": jnp.ones(3)}, score=0.9)
    following = {"wait": checkpoints.wait, "close": checkpoints.close}
    following["save"] = lambda: checkpoints.save(3, {"x": jnp.ones(3)})
    with pytest.raises(OSError, match="no space left on device"):
        following[ask]()
    checkpoints.close()
    with Checkpoints(tmp_path) as again:
        assert again.steps == (1,)
        assert again.best_step == 1


def test_a_step_that_was_not_saved_is_not_the_best(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, score=0.5)
        checkpoints.wait()
        monkeypatch.setattr(checkpoints._checkpointer, "save_async", lambda *unused, **options: None)
        checkpoints.save(2, {"x": jnp.ones(3)}, score=0.9)
        with pytest.raises(RuntimeError, match="Orbax did not save step 2"):
            checkpoints.wait()
        assert checkpoints.best_step == 1


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
