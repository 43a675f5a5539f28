#!/usr/bin/env bash
# onnxruntime 1.32.0: with is_symmetric=True, MatMulNBitsQuantizer stores the numbers of a MatMul as bytes and scales, without zero points.
# ONNX's own DequantizeLinear has the zero point 0 then, but the operator MatMulNBits has 8. The bytes are of the transposed matrix, in
# blocks: [outputs, blocks, bytes], while the MatMul before had [inputs, outputs].
# Guess written down before the run: q * scale, in the order of the MatMul.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

matrix = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="fc")
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in ("x", "y")]
graph = helper.make_graph([node], "model", ends[:1], ends[1:], [numpy_helper.from_array(matrix, "fc.weight")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True)
quantizer.process()
stored = {t.name: numpy_helper.to_array(t) for t in quantizer.model.model.graph.initializer}
(packed,) = (array for array in stored.values() if array.dtype == np.uint8)
(scales,) = (array for array in stored.values() if array.dtype == np.float32)
numbers = np.stack([packed & 15, packed >> 4], -1).reshape(64, 2, 32).astype(np.float32)
for rule, zero in (("q * scale", 0), ("(q - 8) * scale", 8)):
    found = ((numbers - zero) * scales.reshape(64, 2, 1)).reshape(64, 64)
    for order, value in (("inputs first", found), ("outputs first", found.T)):
        if np.abs(value - matrix).max() < 0.1 * np.abs(matrix).max():
            print(f"{len(stored)} tensors, {order}, {rule}")
PY
echo "version: onnxruntime 1.32.0, onnx 1.23.2"
echo "expected: 2 tensors, inputs first, q * scale"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "2 tensors, outputs first, (q - 8) * scale" ]]
