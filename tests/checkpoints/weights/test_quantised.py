"""Weights of quantised or converted models, which are read as stored or refused."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import merge_jax as mj


@pytest.mark.parametrize(
    ("dtype", "name", "scales"),
    [
        ("float8_e4m3fn", "weight", "weight_scale_inv"),
        ("int8", "weight", "weight_scale"),
        ("uint32", "weight", "scales"),
        ("int8", "weight", "SCB"),  # bitsandbytes.
        ("int32", "weight_packed", "weight_scale"),  # compressed-tensors.
        ("uint8", "gate_up_proj_blocks", "gate_up_proj_scales"),  # MXFP4, as in gpt-oss.
        ("uint8", "_weight_qdata", "_weight_scale"),  # torchao.
        ("int8", "weight_quantized", "weight_scale"),  # ONNX Runtime.
        ("uint8", "weight_Q4", "weight_scales"),  # The same, several in one.
        ("int8", "weight/_data", "weight/_scale"),  # optimum-quanto.
        ("uint8", "weight/_data/_data", "weight/_scale"),
        ("float8_e4m3fn", "array/qvalue", "array/scale"),  # Qwix.
    ],
)
def test_numbers_with_scales_beside_them_are_warned_of(dtype, name, scales, tmp_path):
    tree = {"fc": {name: jnp.ones((2, 3), dtype), scales: jnp.ones(()), "bias": jnp.ones(2)}}
    mj.save_safetensors(tmp_path / "m.safetensors", tree)
    with pytest.warns(UserWarning, match=rf"stores fc/{name} quantised.*read as stored, without their scales"):
        mj.load_weights(tmp_path / "m.safetensors", select=f"**/{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mj.load_weights(tmp_path / "m.safetensors", select="fc/bias")
        mj.save_safetensors(tmp_path / "n.safetensors", {"fc": {name: tree["fc"][name]}})
        mj.load_weights(tmp_path / "n.safetensors")


def test_a_table_of_model2vec_is_warned_of_where_its_rows_are_no_tokens(tmp_path):
    table = np.ones((4, 3), np.float32)
    files = {
        "plain": {"embeddings": table},
        "int8": {"embeddings": table.astype(np.int8)},
        "rows": {"embeddings": table, "mapping": np.zeros(9, np.int32), "weights": np.ones(9, np.float32)},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.warns(UserWarning, match="a table of model2vec, its numbers .* a scale that no file holds"):
        mj.load_weights(tmp_path / "int8.safetensors")
    with pytest.warns(UserWarning, match=r"a table of model2vec, its rows are shared: .* embeddings\[mapping\[i\]\]"):
        mj.load_weights(tmp_path / "rows.safetensors", select="embeddings")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mj.load_weights(tmp_path / "plain.safetensors")
        mj.load_weights(tmp_path / "rows.safetensors", select="mapping")


@pytest.mark.parametrize(
    ("architecture", "name", "how"),
    [
        ("gemma3", "attn_norm", "1 more than the model's"),
        ("llama", "attn_k", "rows in another order"),
        ("granite", "attn_k", "rows in another order"),
        ("falcon", "attn_qkv", "rows in another order"),
        ("jamba", "ssm_a", "-exp of the model's"),
        ("qwen35", "attn_k_norm", "1 more than the model's"),
        ("qwen35", "ssm_alpha", "heads in another order"),
        ("qwen3", "", ""),
    ],
)
def test_of_a_gguf_with_other_numbers_than_its_model_one_is_warned(architecture, name, how, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    for other in ("attn_norm", "attn_k", "attn_k_norm", "attn_qkv", "ssm_a", "ssm_alpha", "ssm_norm", "ffn_up"):
        writer.add_tensor(f"blk.0.{other}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mj.load_weights(tmp_path / "m.gguf", f"blk/0/{name or '*'}/weight")
    assert len(caught) == bool(name)
    assert all(f"at blk/0/{name}/weight of" in str(w.message) and how in str(w.message) for w in caught)
    assert all(w.filename == __file__ for w in caught)
    mj.load_weights(tmp_path / "m.gguf", ["blk/0/ffn_up/weight", "blk/0/ssm_norm/weight"])  # Not of those.


def test_a_scale_beside_a_tensor_of_gguf_is_warned_of(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    kind = gguf.GGMLQuantizationType.NVFP4
    writer.add_tensor("up.weight", np.full((2, 36), 0x38, np.uint8), raw_dtype=kind)  # As the converter writes it.
    writer.add_tensor("up.scale", np.full(1, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.warns(UserWarning, match="has a scale beside up/weight, by which llama.cpp multiplies"):
        found = mj.load_weights(tmp_path / "m.gguf", "up/weight")["up"]["weight"]
    assert found.shape == (2, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mj.load_weights(tmp_path / "m.gguf", "up/scale")


def test_layers_that_keras_packed_by_gptq_are_warned_of(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        variables = file.create_group("layers/dense/vars")
        arrays = (
            np.ones(4, np.float32),
            np.ones((2, 3), np.uint8),
            np.ones((4, 1), np.float32),
            np.ones(3, np.float32),
        )
        for i, array in enumerate(arrays):  # Bias, kernel, scale and g_idx; Keras 3.15.1 leaves out the zero points.
            variables[str(i)] = array
    with (
        pytest.warns(UserWarning, match="does not store the names of dense/0"),
        pytest.warns(UserWarning, match=r"whole numbers of quantised layers in dense/1, .* lack their zero points"),
    ):
        assert mj.load_weights(tmp_path / "m.weights.h5")["dense"]["1"].dtype == np.uint8


def test_weights_that_bitsandbytes_packed_are_refused(tmp_path):
    save_file(
        {"fc.weight": np.ones((6, 1), np.uint8), "fc.weight.nested_absmax": np.ones(2)}, tmp_path / "m.safetensors"
    )
    with pytest.raises(ValueError, match=r"'fc\.weight' and 'fc\.weight\.nested_absmax', .*bitsandbytes packed it"):
        mj.load_weights(tmp_path / "m.safetensors")
