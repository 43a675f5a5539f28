#!/usr/bin/env bash
# ONNX Runtime 1.32.0 on x86-64: the optimised model that a session writes with its default options holds the kernels of convolutions in blocks of
# output channels, which suit the machine. The operation is still called Conv, in the domain com.microsoft.nchwc, and the array has the
# shape and dtype that it had, so that only the domain tells that axis 0 is no longer the outputs.
# Guess written down before the run: operations are fused, and kernels of Conv keep their numbers in the order [out, in, height, width].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

kernel = np.random.default_rng(0).normal(size=(32, 16, 3, 3)).astype(np.float32)
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size, 8, 8]) for name, size in (("x", 16), ("y", 32))]
node = helper.make_node("Conv", ["x", "kernel"], ["y"], pads=[1, 1, 1, 1])
graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(kernel, "kernel")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
options = onnxruntime.SessionOptions()
options.optimized_model_filepath, options.log_severity_level = "optimised.onnx", 3
onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
written = onnx.load("optimised.onnx").graph
(found,) = written.initializer
array = numpy_helper.to_array(found)
same = array.shape == kernel.shape and np.array_equal(np.sort(array, None), np.sort(kernel, None))
print(f"{[node.op_type for node in written.node if node.input[1:] == [found.name]]} on {list(array.shape)}, the same numbers"
      f" {same}, in the same order {np.array_equal(array, kernel)}")
PY
echo "version: onnxruntime 1.32.0"
echo "expected: ['Conv'] on [32, 16, 3, 3], the same numbers True, in the same order True"
seen=$(cd "$folder" && venv/bin/python run.py)
echo "seen: $seen"
[[ $seen == "['Conv'] on [32, 16, 3, 3], the same numbers True, in the same order False" ]]
