"""Several devices and several processes, each set in a process of its own (tests/devices.py)."""

import json
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from tests import ROOT, devices, helpers


def start(*arguments):
    command = [sys.executable, "-m", "tests.devices", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]


def read(out):
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def train_here(out):
    """Trains on one device of this process, which reads what all others saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mj.checkpoints.NotBitExactWarning)  # Of more devices, as it is meant to.
        devices.train(out, "again", 1)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The folder and the output of a program that trains on one device, on eight, and not on three."""
    out = tmp_path_factory.mktemp("devices")
    output, _ = start(out, 8, "jit1,sharded8,mapped8,jit3").communicate(timeout=240)
    train_here(out)
    return out, output


@pytest.fixture(scope="module")
def outcomes(session):
    """What every mode came to; each one also restores the checkpoints of those before it."""
    return read(session[0])


@pytest.fixture(scope="module")
def outcomes_of_modes(tmp_path_factory):
    """The same of the other modes too."""
    out = tmp_path_factory.mktemp("modes")
    finish(start(out, 8, "jit1,sharded8,jit8,pmap8"))
    train_here(out)
    return read(out)


@pytest.fixture(scope="module")
def outcomes_of_processes(outcomes, tmp_path_factory):
    """The same of two processes, then of four; each reads what those before saved, the first one process of eight."""
    out = tmp_path_factory.mktemp("processes")
    finish(start(out, 8, "jit8"))
    for number, modes in ((2, "jit2,sharded2"), (4, "sharded4")):
        address = f"localhost:{helpers.free_port()}"
        group = [start(out, number, modes, address, number, process_id) for process_id in range(number)]
        for process in group:
            finish(process)
    train_here(out)
    return outcomes | read(out)


def test_many_devices_give_the_losses_of_one(outcomes):
    np.testing.assert_allclose(outcomes["sharded8"]["losses"], outcomes["jit1"]["losses"], rtol=1e-5, atol=1e-5)


def test_devices_of_a_checked_shard_map_take_the_step_of_one(outcomes):
    """A gradient of parameters that they share would be a sum over them, eight times as large."""
    np.testing.assert_allclose(outcomes["mapped8"]["several"], outcomes["mapped8"]["one"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jit8", "pmap8"])
def test_in_every_mode_many_devices_give_the_losses_of_one(outcomes_of_modes, name):
    expected = outcomes_of_modes["jit1"]["losses"]
    np.testing.assert_allclose(outcomes_of_modes[name]["losses"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_processes_give_the_losses_of_one_and_read_and_write_what_other_numbers_of_them_do(outcomes_of_processes):
    found = {name: outcomes_of_processes[name] for name in ("jit1", "jit2", "sharded2", "sharded4", "again1")}
    for name in ("jit2", "sharded2", "sharded4"):
        np.testing.assert_allclose(found[name]["losses"], found["jit1"]["losses"], rtol=1e-5, atol=1e-5)
    assert [found[name]["share"] for name in ("jit2", "sharded2", "sharded4")] == [1, 1 / 2, 1 / 4]
    pairs = [("jit2", "jit8"), ("sharded4", "jit2"), ("sharded4", "sharded2"), ("again1", "sharded4")]
    for reader, writer in pairs:
        assert found[reader]["restored"][f"checkpoints-{writer}"] == [5, 5, True]


def test_training_moves_the_losses_and_the_adapter_learns_at_every_second_step(outcomes):
    source, target, gradient = np.array(outcomes["jit1"]["losses"]).T
    assert len(set(source)) == len(set(target)) == 5
    assert [bool(x) for x in gradient] == [True, False, True, False, True]


def test_a_sharded_state_lies_in_parts(outcomes):
    assert outcomes["sharded8"]["share"] == 1 / 8
    assert outcomes["jit1"]["share"] == 1


@pytest.mark.parametrize(("reader", "writer"), [("sharded8", "jit1"), ("again1", "jit1"), ("again1", "sharded8")])
def test_a_checkpoint_of_some_devices_is_read_on_others(outcomes, reader, writer):
    assert outcomes[reader]["restored"][f"checkpoints-{writer}"] == [5, 5, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "writer"),
    [("jit8", "sharded8"), ("pmap8", "sharded8"), ("pmap8", "jit8"), ("again1", "jit8"), ("again1", "pmap8")],
)
def test_so_it_is_in_every_mode(outcomes_of_modes, reader, writer):
    assert outcomes_of_modes[reader]["restored"][f"checkpoints-{writer}"] == [5, 5, True]


def test_a_batch_that_does_not_divide_is_refused(session):
    _, output = session
    assert "a batch of 16 (source) does not divide among 3 devices: take a multiple of 3, or fewer devices" in output


@pytest.mark.parametrize("number", [0, 2, -1])
def test_devices_that_are_not_there_are_refused(number):
    available = len(jax.devices())
    number = number if number < 1 else available + 1
    for layout in (mj.data_mesh, mj.training.pmap_layout):
        with pytest.raises(ValueError, match=rf"number of devices must lie in \[1, {available}\], got {number}"):
            layout(number)


def test_only_large_leaves_with_an_axis_that_divides_are_split():
    one = mj.data_mesh(1)
    tree = {"small": np.zeros(8), "large": np.zeros((3, 4096)), "scalar": np.zeros(())}
    specs = jax.tree.map(lambda s: s.spec, mj.training.state_shardings(tree, one, sharded=True))
    assert specs["small"] == specs["scalar"] == jax.sharding.PartitionSpec()
    assert specs["large"] == jax.sharding.PartitionSpec(None, "data")
    copied = mj.training.state_shardings(tree, one, sharded=False)
    assert all(s.spec == jax.sharding.PartitionSpec() for s in jax.tree.leaves(copied))


def test_a_mesh_whose_axes_are_explicit_is_taken_as_one_that_the_compiler_splits():
    explicit, auto = jax.make_mesh((1,), ("data",)), jax.sharding.AxisType.Auto
    assert explicit.axis_types != (auto,)  # Else this test shows nothing.
    layout, tree = mj.jit_layout(explicit, sharded=True), {"large": np.zeros((3, 4096))}
    for placed in (layout.put_state(tree), layout.put_arrays(tree), layout.put_indices(tree)):
        assert placed["large"].sharding.mesh.axis_types == (auto,)
    (sharding,) = jax.tree.leaves(mj.training.state_shardings(tree, explicit, sharded=True))
    assert sharding.mesh.axis_types == (auto,)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [mj.jit_layout(mj.data_mesh(1)), mj.training.pmap_layout(1)])
def test_a_layout_of_one_device_trains_as_jit_does(layout):
    transfer = mj.share_transfer(helpers.ROUTES)
    epoch = mj.make_epoch(helpers.joint_step(transfer, cycle=1))
    examples, rows = helpers.batch(0), np.arange(16, dtype=np.int32)[None]
    arrays, indices = {"source": examples, "target": examples}, {"source": rows, "target": rows}
    expected, _ = jax.jit(epoch)(helpers.initial_state(transfer), arrays, indices, 1)
    state = layout.put_state(helpers.initial_state(transfer))
    compiled = layout.lower(epoch, state, arrays, indices, np.int32(1)).compile()
    state, _ = compiled(state, layout.put_arrays(arrays), layout.put_indices(indices), np.int32(1))
    chex.assert_trees_all_close(state.target.params, expected.target.params, atol=1e-6)


def test_whole_numbers_of_a_model_state_are_not_averaged():
    """Under an axis their mean would be another type, and counters of examples a part of what they are."""

    def loss_fn(params, model_state, batch, key):
        return jnp.sum(params["w"]), ({"seen": model_state["seen"] + len(batch)}, {})

    task, same = mj.Task(loss_fn, optax.sgd(0.1)), mj.identity_transfer()
    state = mj.init_joint_state(
        jax.random.key(0),
        None,
        task,
        same,
        source_params={},
        target_params={"w": jnp.ones(2)},
        target_state={"seen": jnp.zeros((), jnp.int32)},
    )
    step = mj.make_joint_step(None, task, same, axis_name=mj.training.DATA_AXIS)
    with pytest.raises(ValueError, match="the model state has numbers in seen that are no floats, and devices of one"):
        jax.pmap(step, mj.training.DATA_AXIS, in_axes=(None, 0))(state, {"target": jnp.zeros((1, 4))})
    after, _ = jax.jit(mj.make_joint_step(None, task, same))(state, {"target": jnp.zeros(4)})
    assert after.target.model_state["seen"] == 4


def test_parts_of_an_axis_take_the_step_of_the_whole_batch():
    """As devices of a pmap do, here by vmap: gradients and metrics are means over the axis."""

    def loss_fn(params, model_state, batch, key):
        loss = jnp.mean(jnp.square(batch @ params["w"] - 1))
        return loss, (model_state, {"error": loss})

    task, same = mj.Task(loss_fn, optax.sgd(0.1)), mj.identity_transfer()
    state = mj.init_joint_state(jax.random.key(0), None, task, same, source_params={}, target_params={"w": jnp.ones(3)})
    batch = jnp.arange(24.0).reshape(8, 3) / 10
    of_part = mj.make_joint_step(None, task, same, axis_name="parts")
    parts, seen = jax.jit(jax.vmap(of_part, (None, 0), axis_name="parts"))(state, {"target": batch.reshape(4, 2, 3)})
    whole, expected = jax.jit(mj.make_joint_step(None, task, same))(state, {"target": batch})
    for part in range(4):
        np.testing.assert_allclose(parts.target.params["w"][part], whole.target.params["w"], rtol=1e-5)
        np.testing.assert_allclose(seen["target/error"][part], expected["target/error"], rtol=1e-5)
