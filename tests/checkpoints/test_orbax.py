import errno
import os
import shutil
import threading
from types import SimpleNamespace
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from merge_jax.checkpoints.lock import FolderLock
from merge_jax.checkpoints.orbax import CheckpointError, Checkpoints, NotBitExactWarning


def test_the_newest_are_kept_and_nothing_is_overwritten(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore_latest({"x": jnp.zeros(3)}) is None
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
@pytest.mark.parametrize("when", ["at once", "in the background"])
def test_what_went_wrong_while_writing_is_told_by_what_comes_next(tmp_path, monkeypatch, ask, when):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.ones(3)}, score=0.5)
    checkpoints.wait()

    def full(*unused, **options):
        raise OSError(errno.ENOSPC, "No space left on device")  # As a write says it, without a name.

    failing = {"at once": full, "in the background": lambda *unused, **options: SimpleNamespace(result=full)}
    monkeypatch.setattr(checkpoints._steps._checkpointer, "save_async", failing[when])
    checkpoints.save(2, {"x": jnp.ones(3)}, score=0.9)

    def save_more():  # Where the first save fails in the background, the second one finds that as it begins to write.
        checkpoints.save(3, {"x": jnp.ones(3)})
        checkpoints.save(4, {"x": jnp.ones(3)})

    following = {"wait": checkpoints.wait, "close": checkpoints.close, "save": save_more}
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        following[ask]()
    assert checkpoints.best_step == 1
    checkpoints.close()
    with Checkpoints(tmp_path) as again:
        assert again.steps == (1,)
        assert again.best_step == 1


def test_a_lock_that_was_just_taken_is_of_whoever_writes_that_down_a_moment_later(tmp_path):
    lock = FolderLock(tmp_path)
    holder = (tmp_path / "run.lock").read_text()
    (tmp_path / "run.lock").write_text("")
    writes = threading.Timer(0.1, (tmp_path / "run.lock").write_text, (holder,))
    writes.start()
    with pytest.raises(ValueError, match=rf"another run is writing into {tmp_path} \(process {os.getpid()} on "):
        FolderLock(tmp_path)
    writes.join()
    lock.release()


def test_a_clock_that_was_set_during_a_save_is_named_once(tmp_path, monkeypatch):
    def late(*unused, **options):
        raise TimeoutError("ChainedFuture completed 2/3 futures but timed out after 3600.00 seconds.")

    checkpoints = Checkpoints(tmp_path)
    orbax = checkpoints._steps._checkpointer
    monkeypatch.setattr(orbax, "save_async", lambda *unused, **options: SimpleNamespace(result=late))
    checkpoints.save(2, {"x": jnp.ones(3)})
    with pytest.raises(
        TimeoutError, match=f"step 2 was not saved in {tmp_path}: the system clock changed while it was"
    ):
        checkpoints.wait()
    monkeypatch.setattr(type(orbax), "close", late)  # As Orbax does: what went wrong comes again.
    checkpoints.close()


def test_saves_leave_no_threads_and_no_open_files(tmp_path):
    def held():
        return np.array([threading.active_count(), len(os.listdir("/proc/self/fd"))])

    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, {"x": jnp.ones(3)})
            if step == 2:  # The threads of the folder itself are there.
                checkpoints.wait()
                before = held()
        checkpoints.wait()
        assert np.all(held() <= before)  # Those of tests before may have ended.


def test_a_step_that_was_not_saved_is_not_the_best(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, score=0.5)
        checkpoints.wait()
        monkeypatch.setattr(checkpoints._steps._checkpointer, "save_async", lambda *unused, **options: None)
        checkpoints.save(2, {"x": jnp.ones(3)}, score=0.9)
        with pytest.raises(RuntimeError, match="Orbax did not save step 2"):
            checkpoints.wait()
        assert checkpoints.best_step == 1


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_parts_of_a_step_are_read_by_path(tmp_path):
    params = {"w": jnp.ones((2, 3))}
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"step": jnp.int32(10 * step), "target": {"params": params, "rest": jnp.zeros(2)}})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == (1, 2, 3)
        parts = {"target/params": params, "step": jnp.int32(0)}
        found = checkpoints.restore_parts(2, parts)
        assert int(found["step"]) == 20
        chex.assert_trees_all_equal(found["target/params"], params)
        with pytest.raises(ValueError, match=r"step 4 is not saved in .*; saved: \[1, 2, 3\]"):
            checkpoints.restore_parts(4, parts)


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (3, "model/epoch is 3, of the type int"),
        (0.5, "model/epoch is 0.5, of the type float"),
        (True, "model/epoch is True, of the type bool"),
        ("text", "model/epoch is 'text', of the type str"),
        (np.arange(3), r"model/epoch is int64\[3\] of NumPy, in JAX int32"),
        (np.float64(3), r"model/epoch is float64\[\] of NumPy, in JAX float32"),
        (np.ones(2, ">f4"), r"model/epoch is >f4\[2\] of NumPy, in JAX nothing"),
        (np.array(["a"]), r"model/epoch is <U1\[1\] of NumPy, in JAX nothing"),
        (jnp.ones(3, "uint4"), r"model/epoch is uint4\[3\], which Orbax does not write"),
        (jnp.ones(3, "float8_e4m3"), r"model/epoch is float8_e4m3\[3\], which Orbax does not write"),
        (np.ones((0, 3), np.float32), r"model/epoch is float32\[0, 3\], which Orbax does not write"),
    ],
)
def test_what_would_not_come_back_is_refused_before_it_is_saved(tmp_path, leaf, found):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=rf"{found}\. Give jnp\.asarray"):
            checkpoints.save(1, {"model": {"w": jnp.ones(2), "epoch": leaf}})
        assert checkpoints.steps == ()


def test_a_state_without_an_array_is_refused(tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"one array or more, the state has none: \{'model'"),
    ):
        checkpoints.save(1, {"model": {}})


class Two(NamedTuple):
    x: jax.Array
    none: None


X = np.arange(3, dtype=np.float32)


@pytest.mark.parametrize("like", [{"w": X}, {"w": X, "none": None}, {"w": X, "none": {}}, {"w": X, "none": (None, [])}])
@pytest.mark.parametrize(
    ("saved", "wanted"),
    [([X, X], {"0": X, "1": X}), ((X, X), [X, X]), (Two(X, None), {"x": X}), ({"x": X}, Two(X, None))],
)
@pytest.mark.parametrize("way", ["latest", "best", "parts"])
def test_leaves_count_and_not_what_they_are_kept_in(tmp_path, like, saved, wanted, way):
    """Orbax raises the errors of damage for another container or one more None; no whole step is set aside for that."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": {"a": saved, "w": X}, "rest": X}, score=1.0)
    like = {"model": {"a": wanted, **like}, "rest": X}
    with Checkpoints(tmp_path) as checkpoints:
        if way == "parts":
            like = {"model": like["model"]}
        found = restoring(checkpoints, like)[way]()
        found = found if way == "parts" else found[1]
        assert jax.tree.structure(found) == jax.tree.structure(like)
        jax.tree.map(np.testing.assert_array_equal, found, like)
        checkpoints.save(2, found)
        assert checkpoints.steps == (1, 2)


def test_a_random_key_is_not_taken_for_numbers_nor_for_one_of_another_kind(tmp_path):
    key, other = jax.random.key(0, impl="rbg"), jax.random.key(0, impl="unsafe_rbg")
    data = jax.random.key_data(key)
    for number, (saved, wanted, message) in enumerate(
        [
            (key, data, r"k is saved as uint32\[4\] of key<rbg>, wanted as uint32\[4\]$"),
            (data, key, r"k is saved as uint32\[4\], wanted as uint32\[4\] of key<rbg>$"),
            (key, other, r"k is saved as uint32\[4\] of key<rbg>, wanted as uint32\[4\] of key<urbg>$"),
        ]
    ):
        with Checkpoints(tmp_path / str(number)) as checkpoints:
            checkpoints.save(1, {"k": saved})
            with pytest.raises(ValueError, match=message):
                checkpoints.restore_latest({"k": wanted})


class Listed(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])


def test_an_nnx_list_is_refused_by_its_path_and_its_state_comes_back_as_arrays(tmp_path):
    """Orbax saves the list and cannot read it."""
    module = Listed(nnx.Rngs(0))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            ValueError, match=r"model/layers is an nnx\.List, .* cannot read again: save nnx\.state\(mod"
        ):
            checkpoints.save(1, {"model": module})
        assert checkpoints.steps == ()
        checkpoints.save(1, {"model": nnx.state(module)})
    with Checkpoints(tmp_path) as checkpoints:
        arrays = checkpoints.restore_arrays(1)
    np.testing.assert_array_equal(arrays["model"]["layers"]["0"]["kernel"], module.layers[0].kernel[...])


def restoring(checkpoints, state):
    """All ways to restore, by name."""
    return {
        "latest": lambda: checkpoints.restore_latest(state),
        "best": lambda: checkpoints.restore_best(state),
        "parts": lambda: checkpoints.restore_parts(1, state),
        "arrays": lambda: checkpoints.restore_arrays(1),
    }


@pytest.mark.parametrize("way", ["latest", "best", "parts", "arrays"])
def test_every_way_to_restore_refuses_other_facts(tmp_path, way):
    state = {"x": jnp.ones(3)}
    facts = {"data": "abc", "batch_size": 50, "seed": 0}
    with Checkpoints(tmp_path, facts=facts) as checkpoints:
        checkpoints.save(1, state, score=0.5)
    message = r"step 1 in .* was saved by another run: batch_size was 50, is 20; data was 'abc', is 'abd'\. Restore"
    with (
        Checkpoints(tmp_path, facts={**facts, "data": "abd", "batch_size": 20}, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=message),
    ):
        restoring(checkpoints, state)[way]()
    for same in (facts, None):
        with Checkpoints(tmp_path, facts=same, read_only=True) as checkpoints:
            restoring(checkpoints, state)[way]()


@pytest.mark.parametrize("way", ["latest", "best", "parts"])
def test_every_way_to_restore_tells_of_other_circumstances_once(tmp_path, way, monkeypatch):
    state = {"x": jnp.ones(3)}
    monkeypatch.setenv("NPROC", "16")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, score=0.5)
    monkeypatch.setenv("NPROC", "3")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restore = restoring(checkpoints, state)[way]
        with pytest.warns(
            NotBitExactWarning, match="so the run will not continue bit for bit: threads was 16, is 3$"
        ) as caught:
            restore()
        assert caught[0].filename == __file__
        restore()  # Warnings are errors here: it is not told again.


def prune_after_listing(monkeypatch, reader, writer, scores):
    """Lets the writer save more, and so prune, once the reader has listed what is there."""
    listed = reader.steps, reader.best_step

    def manifest(step, read=reader._steps.manifest):
        while scores:
            score = scores.pop(0)
            at = writer.steps[-1] + 1
            writer.save(at, {"x": jnp.full(3, float(at))}, score=score)
        writer.wait()
        return read(step)

    monkeypatch.setattr(reader._steps, "manifest", manifest)
    return listed


def test_a_step_that_its_writer_has_pruned_is_passed_over_for_the_newer_ones(tmp_path, monkeypatch):
    blank = {"x": jnp.zeros(3)}
    with Checkpoints(tmp_path, keep=2) as writer:
        for step in (1, 2):
            writer.save(step, {"x": jnp.full(3, float(step))})
        writer.wait()
        with Checkpoints(tmp_path, read_only=True) as reader:
            assert prune_after_listing(monkeypatch, reader, writer, [None, None]) == ((1, 2), None)
            step, state = reader.restore_latest(blank)
            assert (step, state["x"][0]) == (4, 4)
            assert reader.steps == (3, 4)
            with pytest.raises(CheckpointError, match=r"step 1 is not saved in .*; saved: \[3, 4\]"):
                reader.restore_parts(1, blank)


def test_a_best_step_that_its_writer_has_pruned_gives_way_to_a_better_one(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as writer:
        writer.save(1, {"x": jnp.ones(3)}, score=0.5)
        writer.wait()
        with Checkpoints(tmp_path, read_only=True) as reader:
            assert prune_after_listing(monkeypatch, reader, writer, [0.9]) == ((1,), 1)
            step, state = reader.restore_best({"x": jnp.zeros(3)})
            assert (step, state["x"][0]) == (2, 2)


def test_a_best_step_that_its_writer_prunes_before_scores_are_read_gives_way_to_a_better_one(tmp_path):
    with Checkpoints(tmp_path, keep=1) as writer:
        writer.save(1, {"x": jnp.ones(3)}, score=0.5)
        writer.wait()
        with Checkpoints(tmp_path, read_only=True) as reader:
            writer.save(2, {"x": jnp.full(3, 2.0)}, score=0.9)
            writer.wait()
            assert reader.best_step == 2


def test_a_step_that_is_removed_while_steps_are_listed_is_left_out(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=None) as writer:
        for step in (1, 2):
            writer.save(step, {"x": jnp.ones(3)})
    metadata = ocp.path.step.Metadata
    timestamp, fail = metadata.commit_timestamp.fget, [None]

    def vanishing(self):
        if self.step == 1 and fail:
            fail.pop()
            shutil.rmtree(tmp_path / "1")
            raise FileNotFoundError(str(self.path))
        return timestamp(self)

    monkeypatch.setattr(metadata, "commit_timestamp", property(vanishing))
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.steps == (2,)


def test_parts_of_a_step_that_its_writer_has_pruned_are_not_saved(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as writer:
        writer.save(1, {"x": jnp.ones(3)})
        writer.wait()
        with Checkpoints(tmp_path, read_only=True) as reader:
            prune_after_listing(monkeypatch, reader, writer, [None])
            with pytest.raises(CheckpointError, match=r"step 1 is not saved in .*; saved: \[2\]"):
                reader.restore_parts(1, {"x": jnp.zeros(3)})


def test_a_step_whose_files_are_being_removed_is_waited_for(tmp_path):
    """Its writer removes them one after the other."""
    with Checkpoints(tmp_path, keep=None) as writer:
        for step in (1, 2):
            writer.save(step, {"x": jnp.full(3, float(step))})
        writer.wait()
        with Checkpoints(tmp_path, read_only=True) as reader:
            (tmp_path / "2" / "_CHECKPOINT_METADATA").unlink()
            removing = threading.Timer(0.2, lambda: shutil.rmtree(tmp_path / "2"))
            removing.start()
            step, state = reader.restore_latest({"x": jnp.zeros(3)})
            removing.join()
    assert (step, state["x"][0]) == (1, 1)


def test_what_orbax_saved_by_itself_is_called_by_its_name(tmp_path):
    tree = {"x": np.ones(3, np.float32)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "one", tree)
    with ocp.CheckpointManager(tmp_path / "several") as manager:
        manager.save(1, args=ocp.args.StandardSave(tree))
        manager.save(2, args=ocp.args.StandardSave(tree))
    for options in ({}, {"read_only": True}):
        with pytest.raises(
            ValueError, match=r"/one is one checkpoint that Orbax has written, not a folder of steps: na"
        ):
            Checkpoints(tmp_path / "one", **options)
    message = (
        r"/several has no step that Checkpoints saved: {}step 1: it has no manifest\. Orbax by itself writes none: "
        r"read such a step with orbax\.checkpoint"
    )
    with Checkpoints(tmp_path / "several", read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match=message.format("step 2: it has no manifest, ")):
            checkpoints.restore_latest(tree)
        with pytest.raises(CheckpointError, match=message.format("")):
            checkpoints.restore_parts(1, tree)
