"""Memory and placement of a sharded joint step on 8 virtual devices, in a process of its own.

    python -m tests.benchmarks.test_scale OUT

is that process: the number of devices must be set before JAX starts. It writes OUT/scale.json.
"""

import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import merge_jax as mj
from benchmarks import scale
from benchmarks.collectives import received_bytes
from tests import ROOT

pytestmark = pytest.mark.slow

BATCH, LENGTH = 8, 16
ROLES = ("source", "target", "adapter")


class Words(nn.Module):
    """An embedding, a hidden layer and logits over the words, `[B, L]` to `[B, L, 512]`."""

    hidden: int

    @nn.compact
    def __call__(self, tokens, *, train=False):
        x = nn.Embed(512, 64, name="embedding")(tokens)
        return nn.Dense(512, name="logits")(nn.relu(nn.Dense(self.hidden, name="up")(x)))


def tiny_pair():
    """A pair whose kernels are just large enough to be split; compiling takes most of this file's time."""
    routes = {"up/kernel": "up/kernel"}
    transfer = mj.lpka_transfer(
        routes, num_layers=1, num_heads=2, attentions=("cols_cols",), max_hidden=128, spectral=False
    )
    return scale.Pair(Words(256), Words(128), scale.next_token_loss, False, transfer)


def placements(state):
    """Whether each moment lies as its parameter does, by path, and how many moments of each model are split."""
    alike, num_split = {}, dict.fromkeys(ROLES, 0)
    for role in ROLES:
        part = getattr(state, role)
        moments = {name: optax.tree.get(part.opt_state, name) for name in ("mu", "nu")}
        for name, moment in moments.items():
            params = mj.flatten(part.params)
            for path, leaf in mj.flatten(moment).items():
                split = not leaf.sharding.is_fully_replicated
                param = params.get(path.removeprefix("large/"))
                # Small leaves of the adapter are a vector to its optimizer.
                same = param is not None and leaf.shape == param.shape and leaf.sharding == param.sharding
                alike[f"{role}/{name}/{path}"] = split if path == "kernel" else same or path == "other"
                num_split[role] += split
    return {"alike": alike, "num_split": num_split}


def gathered_in_a_loop():
    """What 8 devices receive where a matrix of 4 KiB that is split is multiplied whole in five rounds."""
    mesh = mj.data_mesh(8)
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))

    def rounds(x):
        gather = lambda _, x: jax.lax.with_sharding_constraint(  # noqa: E731
            jax.lax.with_sharding_constraint(x, whole) @ x, split
        )
        return jax.lax.fori_loop(0, 5, gather, x)

    x = jax.ShapeDtypeStruct((32, 32), np.float32, sharding=split)
    return received_bytes(jax.jit(rounds).lower(x).compile().as_text(), 8)


def main(out):
    jax.config.update("jax_num_cpu_devices", 8)
    pair = tiny_pair()
    steps = {number: scale.compile_step(pair, number, batch_size=BATCH, length=LENGTH) for number in (1, 2, 8)}
    found = {"bytes": {}, "placements": {}, "received": gathered_in_a_loop()}
    for number, step in steps.items():
        memory = step.compiled.memory_analysis()
        found["bytes"][number] = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
    leaves = [leaf for role in ROLES for leaf in jax.tree.leaves(getattr(steps[8].state, role))]
    found["state"] = sum(4 * leaf.size for leaf in leaves)
    found["small"] = sum(4 * leaf.size for leaf in leaves if leaf.size < 2**12)

    layout = mj.jit_layout(mj.data_mesh(8), sharded=True)
    tokens = np.random.default_rng(0).integers(1, 512, (BATCH, LENGTH), np.int32)
    examples = {"tokens": tokens, "label": np.zeros(BATCH, np.int32)}
    rows = np.arange(BATCH, dtype=np.int32)[None]
    state = layout.put_state(jax.jit(pair.init)(jax.random.key(0), tokens))
    found["placements"]["put"] = placements(state)
    where = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    state, _ = steps[8].compiled(
        state,
        layout.put_arrays({"source": examples, "target": examples}),
        layout.put_indices({"source": rows, "target": rows}),
        np.int32(1),
    )
    found["placements"]["stepped"] = placements(state)
    with mj.Checkpoints(out / "checkpoints") as checkpoints:
        checkpoints.save(1, state)
    with mj.Checkpoints(out / "checkpoints") as checkpoints:
        _, restored = checkpoints.restore_latest(where)
    found["placements"]["restored"] = placements(restored)
    equal = jax.tree.map(np.array_equal, restored.adapter, state.adapter)
    found["restored_equal"] = bool(np.all(jax.tree.leaves(equal)))
    (out / "scale.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("scale")
    command = [sys.executable, "-m", "tests.benchmarks.test_scale", str(out)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads((out / "scale.json").read_text())


@pytest.mark.parametrize("number", [1, 2, 8])
def test_a_device_holds_its_part_of_all_large_leaves_and_the_small_ones(found, number):
    """Of the rest, batch, indices, step and key, there are less than 3 KiB."""
    large = found["state"] - found["small"]
    assert large > 0.9 * found["state"]
    expected = large / number + found["small"]
    assert expected <= found["bytes"][str(number)]["arguments"] < expected + 3 * 2**10


def test_arguments_fall_as_devices_are_added(found):
    one, two, eight = (found["bytes"][number]["arguments"] for number in "128")
    assert two < 0.55 * one
    assert eight < 1.35 * one / 8


def test_temporaries_do_not_grow_as_devices_are_added(found):
    one, two, eight = (found["bytes"][number]["temporaries"] for number in "128")
    assert eight < two < 1.1 * one  # What two devices exchange takes a few percent.


@pytest.mark.parametrize("when", ["put", "stepped", "restored"])
def test_moments_lie_as_their_parameters_do(found, when):
    placements = found["placements"][when]
    assert [path for path, alike in placements["alike"].items() if not alike] == []
    # Two of each: three kernels of a model; of the adapter one that is large, and the vector of all others.
    assert placements["num_split"] == {"source": 6, "target": 6, "adapter": 4}


def test_collectives_of_a_loop_are_counted_in_the_compiler_s_text(found):
    assert found["received"] == {"all-gather": 5 * 32 * 32 * 4 * 7 / 8}


def test_what_was_restored_is_what_was_saved(found):
    assert found["restored_equal"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
