"""Files of weights as the libraries of their formats write them."""

import importlib
import json

import flax.serialization
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from orbax.checkpoint import v1
from safetensors.numpy import save_file

import merge_jax as mj

TREE = {
    "encoder": {
        "layer_0": {
            "kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
            "bias": np.array([1.5, -2, 0.25], np.float16),
        }
    },
    "scale": np.array(3.5, np.float32),
    "is_on": np.array([True, False]),
}
FLAT = mj.flatten(TREE)


def state_of(params):
    return TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))


def write_safetensors(folder):
    save_file({path.replace("/", "."): leaf for path, leaf in FLAT.items()}, folder / "m.safetensors")
    return folder / "m.safetensors"


def write_shards(folder):
    names = {path.replace("/", "."): leaf for path, leaf in FLAT.items()}
    shards = {name: f"model-0000{i}-of-2.safetensors" for i, name in enumerate(names)}
    for name, shard in shards.items():
        save_file({name: names[name]}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def write_npz(folder):
    np.savez(folder / "m.npz", **FLAT)
    return folder / "m.npz"


def write_compressed_npz(folder):
    np.savez_compressed(folder / "m.npz", **FLAT)
    return folder / "m.npz"


def write_msgpack(folder):
    (folder / "m.msgpack").write_bytes(flax.serialization.to_bytes(TREE))
    return folder / "m.msgpack"


def write_orbax(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "one", TREE)
    return folder / "one"


def write_orbax_v1(folder):
    v1.save(folder / "v1", TREE)
    return folder / "v1"


def write_orbax_steps(folder):
    with ocp.CheckpointManager(folder / "steps") as manager:
        manager.save(9, args=ocp.args.StandardSave({"encoder": TREE["scale"]}))
        manager.save(10, args=ocp.args.StandardSave(TREE))
    return folder / "steps"


def write_checkpoints(folder):
    with mj.Checkpoints(folder / "ours") as checkpoints:
        checkpoints.save(3, TREE)
    return folder / "ours"


def write_torch(folder):
    torch = pytest.importorskip("torch")
    torch.save({path.replace("/", "."): torch.from_numpy(leaf) for path, leaf in FLAT.items()}, folder / "m.pth")
    return folder / "m.pth"


def write_older_torch(folder):
    torch = pytest.importorskip("torch")
    tensors = {path.replace("/", "."): torch.from_numpy(leaf) for path, leaf in FLAT.items()}
    torch.save(tensors, folder / "m.bin", _use_new_zipfile_serialization=False)
    return folder / "m.bin"


def write_onnx(folder, **options):
    onnx = pytest.importorskip("onnx")
    numpy_helper = importlib.import_module("onnx.numpy_helper")
    tensors = [numpy_helper.from_array(leaf, path.replace("/", ".")) for path, leaf in FLAT.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors)), folder / "m.onnx", **options)
    return folder / "m.onnx"


def write_onnx_beside(folder):
    return write_onnx(folder, save_as_external_data=True, location="numbers.bin", size_threshold=0)


WRITERS = {
    "safetensors": write_safetensors,
    "shards": write_shards,
    "npz": write_npz,
    "compressed npz": write_compressed_npz,
    "msgpack": write_msgpack,
    "Orbax": write_orbax,
    "Orbax v1": write_orbax_v1,
    "steps of Orbax": write_orbax_steps,
    "Checkpoints": write_checkpoints,
    "torch": write_torch,
    "older torch": write_older_torch,
    "ONNX": write_onnx,
    "ONNX with numbers beside": write_onnx_beside,
}


@pytest.fixture(scope="session")
def keras(tmp_path_factory):
    """Keras on JAX, with its settings in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        yield pytest.importorskip("keras")


def keras_model(keras):
    """A model with layers that Keras has named and layers that its user has."""
    with jax.numpy_rank_promotion("allow"):
        return _keras_model(keras)


def _keras_model(keras):
    layers = keras.layers
    images = keras.Input((8, 8, 3))
    states = layers.Conv2D(4, 3, name="stem")(images)
    states = layers.BatchNormalization(center=False)(states)
    states = layers.DepthwiseConv2D(3, name="dw", use_bias=False)(states)
    states = layers.Conv2DTranspose(5, 2, name="up")(states)
    states = layers.Reshape((25, 5))(states)
    states = layers.MultiHeadAttention(2, 4, name="attention")(states, states)
    states = layers.Dropout(0.5)(states)
    states = keras.Sequential([layers.Dense(6, name="inner"), layers.Dense(6)], name="block")(states)
    states = layers.Bidirectional(layers.GRU(2), name="both")(states)
    model = keras.Model(images, layers.Dense(3, name="head")(states))
    model.compile("adam")
    return model


def keras_leaves(model):
    """The weights by Keras's own paths, without the name of the model."""
    return {weight.path.removeprefix(f"{model.name}/"): weight.numpy() for weight in model.weights}
