"""Weights of each format, as its own library writes them."""

import gc
import importlib
import warnings

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import save_file

import merge_jax as mj
from merge_jax.checkpoints.torch_files import torch_array
from merge_jax.checkpoints.weights.load import find_format, weight_paths
from merge_jax.commands.convert import convert
from tests.checkpoints.weights.writers import FLAT, TREE, WRITERS, keras, keras_leaves, keras_model, state_of

__all__ = ["keras"]


def assert_leaves(found, expected):
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert isinstance(found[path], np.ndarray), path
        assert (found[path].dtype, found[path].shape) == (leaf.dtype, leaf.shape), path
        np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_names_shapes_dtypes_and_numbers_are_those_that_were_saved(writer, tmp_path):
    path = writer(tmp_path)
    assert_leaves(mj.flatten(mj.load_weights(path)), FLAT)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in mj.checkpoints.weight_shapes(path).items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in FLAT.items()
    }
    assert_leaves(
        mj.flatten(mj.load_weights(path, "encoder/**/kernel")),
        {"encoder/layer_0/kernel": FLAT["encoder/layer_0/kernel"]},
    )
    filled = mj.load_weights(path, like=jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE)))
    assert jax.tree.structure(filled) == jax.tree.structure(TREE)
    if path.is_file():  # A name says nothing.
        other = path.rename(tmp_path / "other.txt")
        assert_leaves(mj.flatten(mj.load_weights(other)), FLAT)


def test_small_floats_of_safetensors(tmp_path):
    kinds = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e8m0fnu)
    leaves = {f"a{i}": np.array([[1, 2, 0.5]], kind) for i, kind in enumerate(kinds)} | {
        "empty": np.ones((0, 3), np.int8)
    }
    mj.save_safetensors(tmp_path / "m.safetensors", leaves)
    assert_leaves(mj.flatten(mj.load_weights(tmp_path / "m.safetensors")), leaves)


def test_what_is_mapped_is_written_to_by_nobody(tmp_path):
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    leaf = mj.load_weights(tmp_path / "m.safetensors")["a"]
    assert leaf.base is not None  # Mapped: no copy.
    leaf[:] = 1
    assert (tmp_path / "m.safetensors").read_bytes() == before
    mj.save_safetensors(tmp_path / "m.safetensors", {"a": leaf * 2}, overwrite=True)
    np.testing.assert_array_equal(leaf, 1)
    np.testing.assert_array_equal(mj.load_weights(tmp_path / "m.safetensors")["a"], 2)


def test_small_floats_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {"a": torch.tensor([1.5, 2.0], dtype=torch.bfloat16), "b": torch.ones((), dtype=torch.float8_e4m3fn)}
    torch.save(tensors, tmp_path / "m.pt")
    expected = {"a": np.array([1.5, 2], jnp.bfloat16), "b": np.array(1, jnp.float8_e4m3fn)}
    assert_leaves(mj.flatten(mj.load_weights(tmp_path / "m.pt")), expected)
    with pytest.raises(ValueError, match=r"a tensor of PyTorch that is float32, torch\.sparse_coo, is none of NumPy's"):
        torch_array(torch.ones(2, 2).to_sparse())


def test_bfloat16_comes_out_of_npz_and_names_of_vision_repositories_too(tmp_path):
    leaves = {
        "params/Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": np.ones((2, 3), jnp.bfloat16),
        "params/cls": np.array(1.5, jnp.bfloat16),
    }
    np.savez(tmp_path / "m.npz", **leaves, **{"opt/0/mu": np.ones(3), "step": np.array(7)})
    assert_leaves(mj.flatten(mj.load_weights(tmp_path / "m.npz")), leaves)
    assert "opt/0/mu" in mj.flatten(mj.load_weights(tmp_path / "m.npz", select="**"))


def test_numbers_come_in_the_order_of_bytes_of_this_machine(tmp_path):
    expected = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    np.savez(tmp_path / "m.npz", a=expected["a"].astype(">f4"))
    assert_leaves(mj.load_weights(tmp_path / "m.npz"), expected)
    assert_leaves(mj.load_weights(tmp_path / "m.npz", like=expected), expected)
    assert mj.checkpoints.weight_shapes(tmp_path / "m.npz")["a"].dtype.isnative
    convert(tmp_path / "m.npz", tmp_path / "m.safetensors", None)
    assert_leaves(mj.load_weights(tmp_path / "m.safetensors"), expected)


def test_gguf_of_a_machine_with_another_order_of_bytes(tmp_path):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    matrix = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", matrix.copy())
    writer.add_tensor("b", gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_leaves(mj.load_weights(tmp_path / "m.gguf", "a"), {"a": matrix})
    # No tool agrees with another on the bytes of a block.
    with pytest.raises(
        ValueError, match=r"another byte order than this machine, and the blocks of 'b' \(Q8_0\) cannot be swapped"
    ):
        mj.load_weights(tmp_path / "m.gguf")


def test_numbers_of_python_are_leaves_of_what_is_like_a_file(tmp_path):
    state = state_of({"fc": {"kernel": np.ones((2, 3), np.float32)}})
    (tmp_path / "m.msgpack").write_bytes(flax.serialization.to_bytes(state))
    filled = mj.load_weights(tmp_path / "m.msgpack", "**", like=state)
    assert (type(filled), filled.step) == (type(state), 0)


def test_of_a_training_state_the_model_is_taken(tmp_path):
    params = {"fc": {"kernel": np.ones((2, 3), np.float32)}}
    state = state_of(params)
    (tmp_path / "m.msgpack").write_bytes(flax.serialization.to_bytes(state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"state": {"params": params, "batch_stats": params, "opt_state": params}})
        checkpointer.save(tmp_path / "model", {"model": params, "optimizer": params, "step": np.array(3)})
        checkpointer.save(tmp_path / "unknown", {"model": params, "lm_head": params})
    assert weight_paths(tmp_path / "m.msgpack") == ("params/fc/kernel",)
    assert set(weight_paths(tmp_path / "state")) == {"params/fc/kernel", "batch_stats/fc/kernel"}
    assert weight_paths(tmp_path / "model") == ("fc/kernel",)
    assert set(weight_paths(tmp_path / "unknown")) == {"model/fc/kernel", "lm_head/fc/kernel"}
    assert "opt_state/0/mu/fc/kernel" in mj.flatten(mj.load_weights(tmp_path / "m.msgpack", select="opt_state/**"))
    # What is in `params` fits the model's parameters.
    np.testing.assert_array_equal(mj.load_weights(tmp_path / "m.msgpack", like=params)["fc"]["kernel"], 1)


def test_of_what_scripts_of_torch_save_the_model_is_taken(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {"model.fc.weight": torch.arange(6.0).reshape(2, 3), "model.fc.bias": torch.ones(2)}
    expected = {f"model/fc/{name}": tensors[f"model.fc.{name}"].numpy() for name in ("weight", "bias")}
    network = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    rest = {"epoch": 3, "arch": "fc", "loss": torch.tensor(0.5), "rng_state": torch.get_rng_state()}
    path = tmp_path / "m.pt"
    for name, others in (
        ("state_dict", {}),
        ("state_dict", {**rest, "optimizer": optimizer.state_dict()}),
        ("model", {**rest, "optimizer": optimizer.state_dict(), "lr_scheduler": {"last_epoch": 3}}),
        ("model_state_dict", {**rest, "optimizer_state_dict": optimizer.state_dict()}),
    ):
        torch.save({**others, name: tensors}, path)
        assert_leaves(mj.flatten(mj.load_weights(path)), expected)
        assert_leaves(mj.flatten(mj.checkpoints.load_torch(path)), expected)
        assert set(mj.checkpoints.weight_shapes(path)) == set(expected)
        assert list(mj.flatten(mj.load_weights(path, f"{name}/**/bias"))) == [f"{name}/model/fc/bias"]
    assert "optimizer_state_dict/state/0/exp_avg" in mj.checkpoints.weight_shapes(path, "**")
    # Which of two models is meant, nothing says.
    torch.save({"state_dict": tensors, "state_dict_ema": tensors}, path)
    names = {"state_dict/model/fc/weight", "state_dict_ema/model/fc/weight"}
    assert {name for name in mj.checkpoints.weight_shapes(path) if name.endswith("weight")} == names
    # A state dict whose own names begin so is no training state.
    torch.save(tensors, path)
    assert_leaves(mj.flatten(mj.load_weights(path)), expected)
    torch.save({"state_dict": {**tensors, "steps": 3}}, path)
    with pytest.raises(ValueError, match="must hold tensors by name, found 'state_dict/steps': save the state dict"):
        mj.load_weights(path)


def test_tensors_of_torch_that_are_marked_as_conjugate_or_have_numbers_for_names(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {"a": torch.tensor([1 + 2j]).conj(), "b": torch.tensor([1 + 2j]).conj().imag}
    torch.save(tensors, tmp_path / "m.pt")
    expected = {"a": np.array([1 - 2j], np.complex64), "b": np.array([-2], np.float32)}
    assert_leaves(mj.load_weights(tmp_path / "m.pt"), expected)
    torch.save({0: torch.ones(1), "0": torch.zeros(1)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="must hold tensors by name, found 0: save the state dict"):
        mj.load_weights(tmp_path / "m.pt")


def test_no_leaf_of_a_training_state_is_lost_where_names_meet(tmp_path):
    ones = np.ones(2)
    for names in (
        {"params/w": ones, "model_state/params": 2 * ones},
        {"params/w": ones, "batch_stats/w": ones, "model_state/batch_stats/v": ones},
        {"state_dict/w": ones, "current_model_state/w": 2 * ones},  # Of Lightning 2.6.6: the average and the trained.
        {"params/w": ones, "source/w": ones, "adapter/w": ones},  # Of no joint run, which would have a target.
    ):
        np.savez(tmp_path / "m.npz", **names)
        assert_leaves(mj.flatten(mj.load_weights(tmp_path / "m.npz")), names)


def test_of_a_joint_run_the_target_is_taken(tmp_path):
    ones = {"w": jnp.ones(2)}
    role = {"params": ones, "model_state": {"batch_stats": ones}, "opt_state": ones}
    state = {"key": jax.random.key(0), "step": jnp.array(1), "source": role, "target": role, "adapter": ones}
    with mj.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state)
    for path in ("run", "run/1"):
        assert set(weight_paths(tmp_path / path)) == {"params/w", "batch_stats/w"}
        assert list(mj.flatten(mj.load_weights(tmp_path / path, "source/params/*"))) == ["source/params/w"]


@pytest.mark.filterwarnings(  # Orbax's threads, where an array cannot be read.
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)
def test_numbers_of_checkpoints_that_have_changed_are_refused(tmp_path):
    with mj.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)})
    leaf = next(path for path in (tmp_path / "run" / "1" / "state").rglob("d/*") if path.is_file())
    leaf.write_bytes(bytes(len(leaf.read_bytes())))
    with pytest.raises(mj.CheckpointError, match="damaged"):
        mj.load_weights(tmp_path / "run")
    gc.collect()


class Small(nnx.Module):
    def __init__(self, rngs):
        self.fc, self.norm = nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.layers, self.table = nnx.List([nnx.Linear(3, 3, rngs=rngs)]), jnp.ones(4)  # An array in no variable.


def test_variables_of_nnx_are_leaves_however_they_were_saved(tmp_path):
    state, linen = nnx.state(Small(nnx.Rngs(0))), {"a": {"value": np.ones(2)}, "b": {"kernel": np.ones(3)}}
    expected = {path: np.asarray(leaf) for path, leaf in mj.flatten(state).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.save(tmp_path / "pure", nnx.to_pure_dict(state))
        checkpointer.save(tmp_path / "wrapped", {"model": state, "step": 3})
        checkpointer.save(tmp_path / "linen", linen)
    assert_leaves(mj.flatten(mj.load_weights(tmp_path / "linen")), mj.flatten(linen))  # Few are called so.
    for name in ("state", "pure", "wrapped"):
        assert_leaves(mj.flatten(mj.load_weights(tmp_path / name)), expected)
    filled = mj.load_weights(tmp_path / "wrapped", like=state)
    assert_leaves({path: np.asarray(leaf) for path, leaf in mj.flatten(filled).items()}, expected)


def test_arrays_that_flax_cuts_into_parts_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 16)
    (tmp_path / "m").write_bytes(flax.serialization.to_bytes({"a": {"b": np.arange(24.0).reshape(4, 6)}}))
    assert_leaves(mj.flatten(mj.load_weights(tmp_path / "m")), {"a/b": np.arange(24.0).reshape(4, 6)})
    assert mj.checkpoints.weight_shapes(tmp_path / "m")["a/b"].shape == (4, 6)


def test_gguf_is_dequantised_and_its_axes_are_those_of_torch(tmp_path):
    gguf = pytest.importorskip("gguf")
    matrix = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    kinds = gguf.GGMLQuantizationType
    quantised = {name: gguf.quantize(matrix, kind) for name, kind in (("q8", kinds.Q8_0), ("bf", kinds.BF16))}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_v.weight", matrix.astype(np.float16))
    writer.add_tensor("q8.weight", quantised["q8"], raw_dtype=kinds.Q8_0)
    writer.add_tensor("bf.weight", quantised["bf"], raw_dtype=kinds.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "n").write_bytes(content[:8] + bytes([123]) + content[9:])  # The byte that safetensors begins with.
    assert find_format(tmp_path / "n").name == "GGUF"
    found = mj.flatten(mj.load_weights(tmp_path / "m.gguf"))
    expected = {
        "blk/0/attn_v/weight": matrix.astype(np.float16),
        "q8/weight": gguf.dequantize(quantised["q8"], kinds.Q8_0),
        "bf/weight": matrix.astype(ml_dtypes.bfloat16),
    }
    assert_leaves(found, expected)
    assert np.abs(found["q8/weight"] - matrix).max() < 0.02
    assert mj.checkpoints.weight_shapes(tmp_path / "m.gguf")["q8/weight"].shape == (64, 32)
    assert mj.checkpoints.layouts_of(tmp_path / "m.gguf")["q8/weight"] == mj.MatrixSpec((0,), (1,))


def test_layers_of_keras_have_their_names_in_the_model(keras, tmp_path):
    model = keras_model(keras)
    expected = keras_leaves(model)
    model.save(tmp_path / "m.keras")
    found = mj.flatten(mj.load_weights(tmp_path / "m.keras"))
    assert_leaves(found, expected)
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.warns(UserWarning, match=r"does not store the names of batch_normal.*/0, .*: they are listed by"):
        found = mj.flatten(mj.load_weights(tmp_path / "m.weights.h5"))
    numbered = {path for path in found if path.startswith("batch_norm")}
    assert {path.partition("/")[2] for path in numbered} == {"0", "1", "2"}
    assert found.keys() - numbered == {path for path in expected if not path.startswith("batch_norm")}
    np.testing.assert_array_equal(found["block/inner/kernel"], expected["block/inner/kernel"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are saving your model as an HDF5")
        model.save(tmp_path / "m.h5")
    older = mj.flatten(mj.load_weights(tmp_path / "m.h5"))
    np.testing.assert_array_equal(older["stem/kernel"], expected["stem/kernel"])
    assert len(older) == len(expected)


def test_names_of_an_older_keras_are_in_its_configuration(keras, tmp_path):
    """Before it wrote names into groups, a file had only places: dense_1 is the second Dense of its model."""
    h5py, zipfile = importlib.import_module("h5py"), importlib.import_module("zipfile")
    model = keras_model(keras)
    model.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        archive.extractall(tmp_path / "parts")
    with h5py.File(tmp_path / "parts" / "model.weights.h5", "a") as file:
        file.visititems(lambda name, node: node.attrs.pop("name", None) and None)
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as archive:
        for name in ("config.json", "model.weights.h5"):
            archive.write(tmp_path / "parts" / name, name)
    with pytest.warns(UserWarning, match="does not store the names of "):
        found = mj.flatten(mj.load_weights(tmp_path / "old.keras"))
    expected = keras_leaves(model)
    gamma = next(name for name in expected if name.endswith("/gamma"))
    for name in ("stem/kernel", "block/inner/kernel", "head/kernel", gamma):
        np.testing.assert_array_equal(found[name], expected[name])


def test_statistics_of_the_inputs_of_a_model_of_keras_have_their_names(keras, tmp_path):
    normalization = keras.layers.Normalization(name="inputs")
    normalization.adapt(np.arange(8.0).reshape(4, 2))
    model = keras.Sequential([keras.Input((2,)), normalization])
    model.save(tmp_path / "m.keras")
    assert_leaves(mj.flatten(mj.load_weights(tmp_path / "m.keras")), keras_leaves(model))


def test_bfloat16_of_keras(keras, tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, dtype="bfloat16", name="fc")])
    model.save(tmp_path / "m.keras")
    found = mj.flatten(mj.load_weights(tmp_path / "m.keras"))
    assert found["fc/kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["fc/kernel"], np.asarray(model.weights[0].value))


def test_layers_that_keras_has_scaled_to_int8_are_divided_by_their_scale(keras, tmp_path):
    layers = [keras.layers.Embedding(7, 4, name="words"), keras.layers.Dense(5, name="fc")]
    layers.append(keras.layers.Dense(3, use_bias=False, name="head"))
    model = keras.Sequential([keras.Input((3,)), *layers])
    expected = keras_leaves(model)
    for layer in layers:
        layer.quantize("int8")
    model.save(tmp_path / "m.keras")
    found = mj.flatten(mj.load_weights(tmp_path / "m.keras"))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == np.float32
        np.testing.assert_allclose(found[path], array, atol=np.abs(array).max() / 127, err_msg=path)
    model.save_weights(tmp_path / "m.weights.h5")  # Without the configuration, which says what the numbers are.
    with (
        pytest.warns(UserWarning, match="does not store the names of fc/0"),
        pytest.warns(UserWarning, match=r"whole numbers of quantised layers in fc/0, head/0, words/0, which"),
    ):
        assert set(mj.load_weights(tmp_path / "m.weights.h5")["fc"]) == {"0", "1", "2"}


def test_a_layer_of_keras_with_lora_has_its_merged_kernel(keras, tmp_path):
    layer = keras.layers.Dense(4, name="fc")
    model = keras.Sequential([keras.Input((3,)), layer])
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.ones((2, 4)))
    model.save(tmp_path / "m.keras")
    found = mj.load_weights(tmp_path / "m.keras")["fc"]
    assert found.keys() == {"kernel", "bias"}  # Its factors are not saved (Keras 3.15.1).
    np.testing.assert_allclose(found["kernel"], np.asarray(layer.kernel), rtol=1e-6)


def test_a_layer_of_keras_with_spectral_norm_is_warned_of(keras, tmp_path):
    layer = keras.layers.SpectralNormalization(keras.layers.Dense(4, name="fc"), name="sn")
    model = keras.Sequential([keras.Input((3,)), layer])
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match=r"layers of SpectralNormalization, sn: in training, .*stores the undivided"):
        found = mj.flatten(mj.load_weights(tmp_path / "m.keras"))
    assert_leaves(found, keras_leaves(model))


def test_arrays_that_orbax_stored_under_one_name_are_refused(tmp_path):
    """Orbax joins keys by dots, and gives both paths the numbers of one (0.12.8)."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "o", {"fc": {"bias": np.ones(2)}, "fc.bias": np.zeros(2), "scale": np.ones(3)})
    with pytest.raises(ValueError, match=r"has 'fc/bias' and 'fc\.bias', which Orbax joins at dots to one name"):
        mj.load_weights(tmp_path / "o")
    assert list(mj.load_weights(tmp_path / "o", select="scale")) == ["scale"]


@pytest.mark.filterwarnings("ignore:.*")
def test_of_keras_in_orbax_the_layers_are_taken_whether_they_were_frozen(keras, tmp_path):
    layers = [keras.layers.Dense(4, name="fc"), keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *layers], name="net")
    layers[0].trainable = False
    model.compile("sgd", "mse")
    callback = keras.callbacks.OrbaxCheckpoint(str(tmp_path / "saved"), save_on_background=False)
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_end(0)
    callback.on_train_end()
    found = mj.flatten(mj.load_weights(tmp_path / "saved"))
    expected = {weight.path: weight.numpy() for weight in model.weights}
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_every_format_has_a_writer_here():
    names = {kind.name for kind in importlib.import_module("merge_jax.checkpoints.weights.load").FORMATS}
    assert names == {
        "index of shards",
        *("safetensors", "PyTorch", "Keras", "HDF5 of Keras", "npz", "GGUF", "Orbax", "Flax msgpack", "ONNX"),
    }


def test_a_package_is_read_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "brings").mkdir()
    (tmp_path / "brings" / "__init__.py").write_text("raise RuntimeError")
    mj.save_safetensors(tmp_path / "brings" / "m.safetensors", {"a": np.ones(2)})
    monkeypatch.syspath_prepend(tmp_path)
    assert list(mj.load_weights("package:brings")) == ["a"]
    assert find_format(tmp_path / "brings").name == "safetensors"
