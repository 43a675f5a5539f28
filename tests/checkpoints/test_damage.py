"""Checkpoints on a disk that forgets, fills and is shared: what was saved comes back, or is named as damaged."""

import contextlib
import gc
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.damage import DAMAGE, array_file, flip
from merge_jax.checkpoints.lock import FolderLock
from merge_jax.checkpoints.manifest import Manifest, _seal
from merge_jax.checkpoints.orbax import CheckpointError, Checkpoints, DamagedCheckpointWarning
from tests import ROOT

# Orbax leaves tasks behind when a file that it reads is damaged, and Python says so when it finds them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Spares the collector what was there before: to look at it after every test took half of all time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _found_here():
    """Lets Python find them in the test that left them."""
    yield
    gc.collect()


def state_of(step):
    """A state whose numbers no compression shortens."""
    random = np.random.default_rng(step)
    return {
        "model": {"kernel": jnp.asarray(random.normal(size=(40, 50)), jnp.float32), "bias": jnp.zeros(7)},
        "half": jnp.full((3, 5), step, jnp.bfloat16),
        "count": jnp.int32(step),
        "key": jax.random.key(step),
    }


def assert_is(state, step):
    expected = state_of(step)
    for name in ("half", "count"):
        np.testing.assert_array_equal(state[name], expected[name])
    np.testing.assert_array_equal(state["model"]["kernel"], expected["model"]["kernel"])
    np.testing.assert_array_equal(jax.random.key_data(state["key"]), jax.random.key_data(expected["key"]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "steps"
    with Checkpoints(folder, keep=None) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "steps")
    return tmp_path / "steps"


@pytest.mark.parametrize("damage", DAMAGE)
def test_after_damage_the_newest_whole_step_is_restored_and_what_is_damaged_is_named(folder, damage):
    if damage == "a state nobody may read" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    spoil, reason, restored = DAMAGE[damage]
    spoil(folder / "3")
    named = rf"damaged checkpoint in {re.escape(str(folder))}: step \d+: .*{reason}.*; going back to step {restored}$"
    warning = contextlib.nullcontext() if reason is None else pytest.warns(DamagedCheckpointWarning, match=named)
    with Checkpoints(folder, keep=None) as checkpoints:
        with warning:
            step, state = checkpoints.restore_latest(state_of(0))
        assert step == restored
        assert_is(state, restored)
        assert os.path.lexists(folder / "3")  # Somebody may want to look at it.
        checkpoints.save(step + 1, state_of(step + 1))
    with Checkpoints(folder, keep=None) as checkpoints:
        step, state = checkpoints.restore_latest(state_of(0))
    assert step == restored + 1
    assert_is(state, restored + 1)
    if reason is not None:
        assert (folder / "damaged").is_dir()


def test_what_is_damaged_is_set_aside_when_its_number_is_needed(folder):
    for _ in range(2):
        flip(array_file(folder / "3"))
        with Checkpoints(folder, keep=None) as checkpoints:
            with pytest.warns(DamagedCheckpointWarning):
                assert checkpoints.restore_latest(state_of(0))[0] == 2
            checkpoints.save(3, state_of(3))
            assert checkpoints.steps == (1, 2, 3)
        with Checkpoints(folder, keep=None) as checkpoints:
            step, state = checkpoints.restore_latest(state_of(0))
        assert step == 3
        assert_is(state, 3)
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["3", "3-1"]


def test_a_folder_of_a_larger_number_that_holds_nothing_is_passed_over(folder):
    (folder / "900").mkdir()
    (folder / "notes").mkdir()
    with Checkpoints(folder, keep=None) as checkpoints, pytest.warns(DamagedCheckpointWarning, match="step 900"):
        step, state = checkpoints.restore_latest(state_of(0))
    assert step == 3
    assert_is(state, 3)


def test_where_all_steps_are_damaged_each_is_named_and_nothing_starts_anew(folder):
    flip(array_file(folder / "1"))
    shutil.rmtree(folder / "2" / "state")
    os.truncate(folder / "3" / "_CHECKPOINT_METADATA", 9)
    message = (
        r"damaged checkpoints in .*: step 3: it has no manifest; step 2: .*; step 1: model/kernel changed since it was "
        r"saved; there is no other step to restore"
    )
    with Checkpoints(folder, keep=None) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore_latest(state_of(0))
    assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == ["1", "2", "3"]


def test_no_flipped_bit_is_silent(folder):
    """Whatever bit of whatever file flips, the step comes back as it was saved, or as damaged."""
    files = [path for path in (folder / "3").rglob("*") if path.is_file() and path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files])
    random, damaged = np.random.default_rng(0), 0
    with Checkpoints(folder, keep=None, read_only=True) as checkpoints:
        for _ in range(60):
            path = files[random.choice(len(files), p=sizes / sizes.sum())]
            before = path.read_bytes()
            content = bytearray(before)
            content[random.integers(len(content))] ^= 1 << random.integers(8)
            path.write_bytes(content)
            try:
                assert_is(checkpoints.restore_parts(3, state_of(0)), 3)
            except ValueError:
                damaged += 1
            path.write_bytes(before)
        assert_is(checkpoints.restore_latest(state_of(0))[1], 3)
    assert damaged > 30  # Most of the bits are numbers.


def test_the_newest_two_and_the_best_stay_and_a_nan_is_never_the_best(tmp_path):
    scores = {1: 0.5, 2: np.float32(0.9), 3: math.nan, 4: 0.7, 5: None, 6: math.inf}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state_of(step), score=score)
        assert checkpoints.best_step == 2
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == (2, 5, 6)
        step, state = checkpoints.restore_best(state_of(0))
        assert step == 2
        assert_is(state, 2)
        checkpoints.save(7, state_of(7), score=0.95)
        assert checkpoints.best_step == 7
        checkpoints.save(8, state_of(8), score=0.95)  # Of equals, the newest.
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == (7, 8)
        assert checkpoints.best_step == 8


def test_without_scores_there_is_no_best(folder):
    with (
        Checkpoints(folder, read_only=True) as checkpoints,
        pytest.raises(ValueError, match=r"no step in .* has a score; saved: \[1, 2, 3\]"),
    ):
        checkpoints.restore_best(state_of(0))


def test_facts_are_plain_values(tmp_path):
    with pytest.raises(
        ValueError, match=r"the fact 'data' must be text, a number or True or False, got array\(\[1\]\)"
    ):
        Checkpoints(tmp_path, facts={"data": np.array([1])})


def test_a_manifest_of_a_later_format_is_refused(tmp_path):
    sealed = Manifest.of(1, {"x": jnp.ones(2)}, {}, {}, None).to_json()
    assert Manifest.from_json(sealed).step == 1
    content = {**sealed["content"], "format": 2}
    with pytest.raises(ValueError, match="its manifest has the format 2, this version reads 1"):
        Manifest.from_json({"content": content, "sha256": _seal(content)})


def test_one_writer_at_a_time_and_any_number_of_readers(folder):
    with Checkpoints(folder, keep=None) as checkpoints:
        with pytest.raises(ValueError, match=rf"another run is writing into .* \(process {os.getpid()} on .+\): wait"):
            Checkpoints(folder)
        with Checkpoints(folder, read_only=True) as reader:
            assert reader.restore_latest(state_of(0))[0] == 3
            with pytest.raises(ValueError, match="is open read-only"):
                reader.save(4, state_of(4))
        checkpoints.save(4, state_of(4))
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step == 4


def test_a_reader_leaves_a_save_in_flight_alone_and_a_writer_clears_one_that_was_killed(folder):
    unfinished = folder / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpoints(folder, read_only=True):
        assert unfinished.is_dir()
    with Checkpoints(folder, keep=None) as checkpoints:
        checkpoints.save(4, state_of(4))
    assert not unfinished.exists()
    with pytest.raises(ValueError, match=r"there is no folder of checkpoints .*absent"):
        Checkpoints(folder / "absent", read_only=True)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    holds = "import sys, time; from pathlib import Path; from merge_jax.checkpoints.lock import FolderLock\n"
    holds += "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", holds, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=rf"another run is writing into .* \(process {holder.pid} on "):
        FolderLock(tmp_path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    lock = FolderLock(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    FolderLock(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("unshare"), reason="root writes everywhere")
def test_a_full_disk_loses_nothing_that_was_saved(tmp_path):
    """On a file system of two megabytes, mounted in a namespace of its own where that is allowed."""
    program = textwrap.dedent(
        """
        import sys
        import jax.numpy as jnp, numpy as np
        from merge_jax.checkpoints.orbax import Checkpoints
        def state(step, size):
            return {"x": jnp.asarray(np.random.default_rng(step).normal(size=size), jnp.float32)}
        try:
            with Checkpoints(sys.argv[1]) as checkpoints:
                checkpoints.save(1, state(1, 1000))
                checkpoints.save(2, state(2, 10**6))
        except Exception as error:
            print("stopped", type(error).__name__)
        with Checkpoints(sys.argv[1]) as checkpoints:
            print(checkpoints.restore_latest(state(0, 1000))[0])
        """
    )
    (tmp_path / "small").mkdir()
    mount = f"mount -t tmpfs -o size=2m tmpfs {tmp_path}/small && {sys.executable} -c '{program}' {tmp_path}/small/run"
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], cwd=ROOT, capture_output=True, text=True)
    if "Operation not permitted" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("nothing may be mounted here")
    assert done.stdout.splitlines() == ["stopped ValueError", "1"], done.stderr[-2000:]


def test_a_random_key_that_comes_back_as_its_numbers_is_damage(tmp_path, monkeypatch):
    state = {"key": jax.random.key(0)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state)
        checkpoints.wait()
        steps = checkpoints._steps
        load = steps._checkpointer.load

        def damaged(step, *wanted):
            found = load(step, *wanted)
            return {"key": jax.random.key_data(found["key"])} if step == 2 else found

        monkeypatch.setattr(steps._checkpointer, "load", damaged)
        with pytest.warns(DamagedCheckpointWarning, match=r"key came back as uint32, not as key<fry>"):
            step, restored = checkpoints.restore_latest(state)
        with pytest.raises(CheckpointError, match=r"key came back as uint32, not as key<fry>"):
            checkpoints.restore_arrays(2)
    assert step == 1
    assert restored["key"].dtype == state["key"].dtype
