"""ONNX: weights that are constants of the graph, and those that are inside of its branches."""

import importlib

import numpy as np
import pytest

import merge_jax as mj
from tests.checkpoints.weights.test_formats import assert_leaves

onnx = pytest.importorskip("onnx")
helper, numpy_helper = importlib.import_module("onnx.helper"), importlib.import_module("onnx.numpy_helper")

MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


def constant(name, **value):
    return helper.make_node("Constant", [], [name], **value)


def tensor(array, name=""):
    return numpy_helper.from_array(np.asarray(array), name)


def save(path, nodes, initialisers=(), functions=()):
    graph = helper.make_graph(nodes, "g", [], [], list(initialisers))
    onnx.save(helper.make_model(graph, functions=list(functions)), path)
    return path


def test_constants_that_may_be_weights_are_read_by_the_name_of_their_output(tmp_path):
    nodes = [
        constant("fc.w_0", value=tensor(MATRIX)),
        constant("fc.b_0", value_floats=[1.0, 2.0, 0.5]),
        constant("int8.w_0", value=tensor(MATRIX.astype(np.int8))),
        constant("shape", value=tensor(np.array([1, -1]))),
        constant("axes", value_ints=[0, 1]),
        constant("epsilon", value=tensor(np.float32(1e-5))),
        constant("text", value=helper.make_tensor("", onnx.TensorProto.STRING, [1], [b"a"])),
        helper.make_node("Gemm", ["x", "fc.w_0", "fc.b_0"], ["y"], transB=1),
    ]
    path = save(tmp_path / "m.onnx", nodes, [tensor(MATRIX, "head.weight")])
    expected = {"fc/w_0": MATRIX, "fc/b_0": np.array([1, 2, 0.5], np.float32), "int8/w_0": MATRIX.astype(np.int8)}
    assert_leaves(mj.flatten(mj.load_weights(path)), {"head/weight": MATRIX, **expected})
    assert mj.checkpoints.layouts_of(path, "fc/w_0") == {"fc/w_0": mj.MatrixSpec((0,), (1,))}
    with pytest.raises(ValueError, match=r"m\.onnx has the name 'fc\.w_0' twice"):
        mj.load_weights(save(tmp_path / "m.onnx", nodes, [tensor(MATRIX, "fc.w_0")]))
    with pytest.raises(ValueError, match="no initialisers and no constants that are weights"):
        mj.load_weights(save(tmp_path / "m.onnx", nodes[3:6]))


def test_names_and_factors_of_the_older_exporter_of_torch(tmp_path):
    nodes = [
        helper.make_node("Identity", ["norm1.bias"], ["norm2.bias"]),
        helper.make_node("Identity", ["norm2.bias"], ["norm3.bias"]),
        helper.make_node("Identity", ["norm1.bias"], ["/layers/Identity_output_0"]),
        helper.make_node("Identity", ["x"], ["y"]),
        constant("/attn/Constant_11_output_0", value=tensor(np.ones(1, np.float32))),
        constant("/attn/Constant_output_0", value=tensor(np.ones(2, np.float32))),
    ]
    bias = np.arange(3, dtype=np.float32)
    found = mj.flatten(mj.load_weights(save(tmp_path / "m.onnx", nodes, [tensor(bias, "norm1.bias")])))
    equal = {f"norm{i}/bias": bias for i in (1, 2, 3)}
    assert_leaves(found, {**equal, "attn/Constant_output_0": np.ones(2, np.float32)})
    again = helper.make_node("Identity", ["norm1.bias"], ["norm1.bias"])
    with pytest.raises(ValueError, match=r"m\.onnx has the name 'norm1\.bias' twice"):
        mj.load_weights(save(tmp_path / "m.onnx", [again], [tensor(bias, "norm1.bias")]))


def test_weights_that_are_not_read_are_named(tmp_path):
    branch = helper.make_graph([constant("inner.w", value=tensor(MATRIX))], "b", [], [], [tensor(MATRIX, "branch.w")])
    choice = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    function = helper.make_function("own", "f", [], ["z"], [constant("z", value=tensor(MATRIX))], [])
    path = save(tmp_path / "m.onnx", [choice], [tensor(MATRIX, "head.weight")], [function])
    with pytest.warns(UserWarning, match="the tensors 'branch.w', 'inner.w', .*'z' in branches, loops or functions"):
        assert list(mj.load_weights(path)) == ["head"]
    sparse = helper.make_sparse_tensor(tensor([1.5], "v"), tensor([2]), [4])
    with pytest.raises(ValueError, match="has the sparse constant 's', which is not read: make it dense"):
        mj.load_weights(save(tmp_path / "m.onnx", [constant("s", sparse_value=sparse)]))


def test_constants_beside_the_file_stay_in_its_folder(tmp_path):
    beside = tensor(MATRIX)
    importlib.import_module("onnx.external_data_helper").set_external_data(beside, "../secret")
    beside.ClearField("raw_data")
    graph = helper.make_graph([constant("a", value=beside)], "g", [], [])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(ValueError, match="which is not inside its folder"):
        mj.load_weights(tmp_path / "m.onnx")


def test_a_second_save_of_a_model_lacks_the_numbers_of_the_first(tmp_path):
    onnx = importlib.import_module("onnx")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor(MATRIX, "w")]))
    for folder, beside in (("first", True), ("second", False)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "m.onnx"
        onnx.save_model(model, path, save_as_external_data=beside, size_threshold=0, location="data")
    assert_leaves(mj.flatten(mj.load_weights(tmp_path / "first" / "m.onnx")), {"w": MATRIX})
    with pytest.raises(FileNotFoundError, match=r"keeps 'w' in .*second/data, which is missing.*only the first save"):
        mj.checkpoints.weight_shapes(tmp_path / "second" / "m.onnx")


def test_kernels_that_onnx_runtime_has_put_in_blocks_are_refused(tmp_path):
    kernel, bias = tensor(np.zeros((8, 4, 3, 3), np.float32), "reorder"), tensor(np.zeros(8, np.float32), "c.bias")
    fused = helper.make_node("FusedConv", ["x", "reorder", "c.bias"], ["y"], domain="com.microsoft", activation="Relu")
    path = save(tmp_path / "m.onnx", [fused], [kernel, bias])
    assert mj.checkpoints.layouts_of(path)["reorder"] == mj.MatrixSpec((0,), (1,), (2, 3))
    blocked = helper.make_node("Conv", ["x", "reorder", "c.bias"], ["y"], domain="com.microsoft.nchwc")
    with pytest.raises(ValueError, match=r"'reorder', 'c.bias' in blocks of channels, .*ORT_ENABLE_EXTENDED"):
        mj.load_weights(save(tmp_path / "m.onnx", [blocked], [kernel, bias]))
