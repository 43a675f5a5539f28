"""How leaves of a file are matrices: given, told by the file, or by names; the rest is refused."""

import json
import math
import struct
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import merge_jax as mj
from merge_jax.checkpoints import layouts_of
from merge_jax.layouts import as_matrix
from tests.checkpoints.weights.writers import keras, keras_model

__all__ = ["keras"]

FIRST, LAST = mj.MatrixSpec((0,), (1,)), mj.MatrixSpec((1,), (0,))


def test_names_tell_the_layouts_of_torch_and_of_flax(tmp_path):
    arrays = {
        "fc.weight": np.ones((3, 4)),
        "fc.bias": np.ones(3),
        "conv.weight": np.ones((5, 2, 3, 3)),
        "dense.kernel": np.ones((4, 3)),
        "emb.embedding": np.ones((9, 4)),
        "count": np.array(3),
    }
    save_file(arrays, tmp_path / "m.safetensors")
    assert layouts_of(tmp_path / "m.safetensors") == {
        "fc/weight": FIRST,
        "fc/bias": mj.MatrixSpec((), (0,)),
        "conv/weight": mj.MatrixSpec((0,), (1,), (2, 3)),
        "dense/kernel": LAST,
        "emb/embedding": FIRST,
    }


@pytest.mark.parametrize("strings", [None, {"format": "mlx"}])
@pytest.mark.parametrize("shards", [False, True])
def test_kernels_of_mlx_have_their_inputs_last(strings, shards, tmp_path):
    shapes = {"conv.weight": (5, 3, 3, 2), "fc.weight": (3, 4)}
    header: dict[str, Any] = {"__metadata__": strings}  # MLX writes null, mlx-lm its name.
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    file = tmp_path / "m.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + np.arange(end // 4, dtype=np.float32).tobytes())
    if shards:
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(shapes, file.name)}))
        file = index
    assert layouts_of(file) == {"conv/weight": mj.MatrixSpec((0,), (3,), (1, 2)), "fc/weight": FIRST}
    with pytest.warns(
        UserWarning, match="was written by MLX: of kernels of convolutions, such as conv/weight, the last"
    ):
        mj.load_weights(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mj.load_weights(file, select="fc/weight")
        save_file({"conv.weight": np.ones((5, 2, 3, 3))}, tmp_path / "torch.safetensors", {"format": "pt"})
        mj.load_weights(tmp_path / "torch.safetensors")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        # The Conv1D of GPT-2: its weight is [in, out], under the name of a torch weight.
        (
            {"c_fc.weight": np.ones((4, 16)), "c_fc.bias": np.ones(16)},
            r"give specs=\{'c_fc/weight': \.\.\.\} of the shape \[4, 16\], since its name says that its outputs are 4,"
            r" its bias that they are 16: MatrixSpec\(.*\(outputs first\); .* \(inputs first\); .* \(one vector\)",
        ),
        (
            {"mix": np.ones((4, 4))},
            r"'mix'.*since neither its name nor the file says which axis is what: MatrixSpec\(rows",
        ),
        ({"blocks.kernel": np.ones((4, 4, 4))}, r"'blocks/kernel' nor the shape \(4, 4, 4\) says which axis is what"),
    ],
)
def test_what_nothing_tells_is_refused_and_a_spec_settles_it(arrays, message, tmp_path):
    save_file(arrays, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message):
        layouts_of(tmp_path / "m.safetensors")
    leaf = next(iter(arrays)).replace(".", "/")
    rank = len(next(iter(arrays.values())).shape)
    spec = mj.MatrixSpec((rank - 1,), tuple(range(rank - 1)))
    assert layouts_of(tmp_path / "m.safetensors", specs={leaf: spec})[leaf] == spec
    with pytest.raises(ValueError, match="must name each axis"):
        layouts_of(tmp_path / "m.safetensors", specs={leaf: mj.MatrixSpec((0,), ())})
    with pytest.raises(ValueError, match="unknown file path 'nothing'"):
        layouts_of(tmp_path / "m.safetensors", specs={"nothing": spec})


def test_the_operations_of_a_graph_tell_its_layouts(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    arrays = {
        "onnx::MatMul_1": np.ones((4, 3), np.float32),
        "fc.weight": np.ones((2, 3), np.float32),
        "straight.weight": np.ones((2, 5), np.float32),
        "conv.weight": np.ones((6, 1, 3, 3), np.float32),
        "up.weight": np.ones((6, 2, 3, 3), np.float32),
        "/words/table": np.ones((9, 4), np.float32),
        "tied": np.ones((4, 4), np.float32),
        "columns": np.ones((4, 4), np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"]),
        helper.make_node("Gemm", ["a", "fc.weight"], ["b"], transB=1),
        helper.make_node("Gemm", ["b", "straight.weight"], ["c"]),
        helper.make_node("Conv", ["c", "conv.weight"], ["d"]),
        helper.make_node("ConvTranspose", ["d", "up.weight"], ["e"]),
        helper.make_node("Gather", ["/words/table", "i"], ["f"]),
        helper.make_node("MatMul", ["x", "tied"], ["g"]),
        helper.make_node("Gather", ["tied", "i"], ["h"]),
        helper.make_node("Gather", ["columns", "i"], ["j"], axis=1),
    ]
    tensors = [numpy_helper.from_array(leaf, name) for name, leaf in arrays.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"give specs=\{'tied': \.\.\.\} of the shape \[4, 4\]"):  # Used in two ways.
        layouts_of(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"give specs=\{'columns': \.\.\.\}"):  # A row is no thing of its own.
        layouts_of(tmp_path / "m.onnx", specs={"tied": FIRST})
    assert layouts_of(tmp_path / "m.onnx", specs={"tied": FIRST, "columns": LAST}) == {
        "columns": LAST,
        "onnx::MatMul_1": LAST,
        "fc/weight": FIRST,
        "straight/weight": LAST,
        "conv/weight": mj.MatrixSpec((0,), (1,), (2, 3)),
        "up/weight": mj.MatrixSpec((1,), (0,), (2, 3)),
        "words/table": FIRST,
        "tied": FIRST,
    }


def test_the_classes_of_keras_tell_what_names_do_not(keras, tmp_path):
    keras_model(keras).save(tmp_path / "m.keras")
    found = layouts_of(tmp_path / "m.keras")
    assert found["dw/kernel"] == mj.MatrixSpec((2, 3), (), (0, 1))
    assert found["up/kernel"] == mj.MatrixSpec((2,), (3,), (0, 1))
    assert found["stem/kernel"] == mj.MatrixSpec((3,), (2,), (0, 1))
    assert found["attention/query/kernel"] == mj.MatrixSpec((1, 2), (0,))
    assert found["block/inner/kernel"] == LAST


def test_layouts_are_specs_of_routes(tmp_path):
    """A matrix of either layout arrives as `[out, in]`."""
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"a.weight": weight, "b.kernel": weight.T.copy()}, tmp_path / "m.safetensors")
    tree, specs = mj.load_weights(tmp_path / "m.safetensors"), layouts_of(tmp_path / "m.safetensors")
    for path, leaf in mj.flatten(tree).items():
        np.testing.assert_array_equal(as_matrix(jnp.asarray(leaf), specs[path]), weight)
