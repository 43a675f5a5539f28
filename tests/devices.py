"""A program for test_parallel.py: it trains five steps on several devices, in a process of its own.

    python -m tests.devices OUT DEVICES MODES [COORDINATOR NUM_PROCESSES PROCESS_ID]

Of each mode, such as `jit8`, it writes the losses of each step to OUT/<mode>.json and saves a checkpoint to
OUT/checkpoints-<mode>. The mode `mapped8` takes one step by `shard_map`. The number of devices must be known before
JAX starts, hence the process.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    _, out, devices, modes, *others = sys.argv
    local = int(devices) // (int(others[1]) if others else 1)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={local}"

import jax
import jax.numpy as jnp
import numpy as np
import optax

import merge_jax as mj
from tests import helpers

STEPS, BATCH = 5, 16
# It compiles fastest, and is compiled for every mode; its largest matrix is worth splitting.
TRANSFER = mj.linear_operator_transfer({"hidden/kernel": "hidden/kernel"})


def make_tasks(axis_name=None):
    """No dropout: devices of a pmap draw their own. Adam, so that there are moments to split."""

    def make(width):
        model = helpers.Tiny(width, dropout=0.0, axis_name=axis_name)
        return mj.Task(mj.classification_loss(model.apply, inputs="x"), optax.adam(1e-2))

    return make(96), make(64)


def initial_state():
    source, target = (helpers.variables(helpers.Tiny(width), seed) for seed, width in enumerate((96, 64)))
    return mj.init_joint_state(
        jax.random.key(2),
        *make_tasks(),
        TRANSFER,
        source_params=source[0],
        source_state=source[1],
        target_params=target[0],
        target_state=target[1],
    )


def train(folder, mode, number):
    """Trains on so many devices, reads what is saved there already, and saves what came out."""
    axis_name = mj.training.DATA_AXIS if mode == "pmap" else None
    # The axis of the second mesh is Explicit.
    mesh = jax.make_mesh((number,), ("data",)) if mode == "sharded" else mj.data_mesh(number)
    layout = mj.training.pmap_layout(number) if axis_name else mj.jit_layout(mesh, sharded=mode == "sharded")
    step = mj.make_joint_step(*make_tasks(axis_name), TRANSFER, cycle=2, axis_name=axis_name)
    state = layout.put_state(initial_state())
    examples = helpers.batch(0, size=STEPS * BATCH)
    arrays = layout.put_arrays({"source": examples, "target": examples})
    indices = np.arange(STEPS * BATCH, dtype=np.int32).reshape(STEPS, 1, BATCH)
    epoch = layout.lower(
        mj.make_epoch(step), state, arrays, {"source": indices[0], "target": indices[0]}, np.int32(1)
    ).compile()
    losses = []
    for rows in indices:
        placed = layout.put_indices({"source": rows, "target": rows})
        state, metrics = epoch(state, arrays, placed, np.int32(1))
        losses.append([float(metrics[name]) for name in ("source/loss", "target/loss", "adapter/gradient_norm")])

    name = f"{mode}{number}"
    with mj.Checkpoints(folder / f"checkpoints-{name}") as checkpoints:
        checkpoints.save(STEPS, state)
    restored = {}
    for path in sorted(folder.glob("checkpoints-*")):
        with mj.Checkpoints(path) as checkpoints:
            saved_step, other = checkpoints.restore_latest(state)
        placements = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), other, state)
        restored[path.name] = [saved_step, int(other.step), all(jax.tree.leaves(placements))]
    if jax.process_index() == 0:
        # Parts are on every device: the largest share of one tells whether the state is split.
        leaves = [leaf for leaf in jax.tree.leaves(state.adapter) if leaf.size >= 2**12]
        share = max(leaf.addressable_shards[0].data.size / leaf.size for leaf in leaves)
        (folder / f"{name}.json").write_text(json.dumps({"losses": losses, "share": share, "restored": restored}))


def take_step_by_shard_map(folder, name, number):
    """Saves one step of a small model, in a checked `shard_map` over so many devices and on one device."""

    def make(axis_name):
        def loss_fn(params, model_state, batch, key):
            outputs = batch @ params["w"]
            whole = mj.objectives.whole_batch(outputs, axis_name)  # Of a loss that compares examples.
            return jnp.mean(jnp.square(outputs - 1)) + jnp.mean(jnp.sin(whole)) ** 2, (model_state, {})

        return mj.make_joint_step(None, mj.Task(loss_fn, optax.sgd(0.1)), mj.identity_transfer(), axis_name=axis_name)

    task = mj.Task(lambda *_: None, optax.sgd(0.1))
    params = {"source_params": {}, "target_params": {"w": jnp.arange(3.0)}}
    state = mj.init_joint_state(jax.random.key(0), None, task, mj.identity_transfer(), **params)
    batches = {"target": jnp.linspace(-1, 1, 3 * BATCH).reshape(BATCH, 3) ** 2}
    specs = jax.P(), jax.P("data")
    several = jax.shard_map(make("data"), mesh=mj.data_mesh(number), in_specs=specs, out_specs=jax.P())
    found = [jax.jit(step)(state, batches)[0].target.params["w"].tolist() for step in (several, make(None))]
    (folder / f"{name}.json").write_text(json.dumps(dict(zip(("several", "one"), found, strict=True))))


def main():
    if others:
        mj.training.connect(others[0], int(others[1]), int(others[2]), timeout=60, answer_within=60)
    assert len(jax.devices()) == int(devices)
    for name in modes.split(","):
        mode, number = name.rstrip("0123456789"), int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
        if mode == "mapped":
            take_step_by_shard_map(Path(out), name, number)
        else:
            train(Path(out), mode, number)


if __name__ == "__main__":
    main()
