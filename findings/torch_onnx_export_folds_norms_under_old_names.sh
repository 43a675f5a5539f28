#!/usr/bin/env bash
# torch 2.14.1: torch.onnx.export folds a BatchNorm into the convolution before it, and keeps the kernel's name. So a file has the names of
# the model's state dict, and other values.
# Guess written down before the run: initialisers have the names and the values of the state dict.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 numpy==2.5.5
cat >"$folder/export.py" <<'PY'
import sys
import warnings

import numpy as np
import onnx
import torch

warnings.filterwarnings("ignore")
layers = torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 2)
net = torch.nn.Sequential(*layers).eval()
net[1].running_var.fill_(4.0)
for name, options in {"by default": {}, "optimize=False": {"optimize": False}}.items():
    torch.onnx.export(net, (torch.zeros(2, 3, 4, 4),), sys.argv[1], verbose=False, **options)
    held = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(sys.argv[1]).graph.initializer}
    kernel = net[0].weight.detach().numpy()
    ratio = float(np.mean(held["0.weight"] / kernel))
    print(f"{name}: 0.weight is {ratio:.2f} of the model's, of the norm's variance there is {'1.running_var' in held}")
PY
echo "version: torch 2.14.1"
echo "expected: by default: 0.weight is 1.00 of the model's, of the norm's variance there is True"
seen=$("$folder/env/bin/python" "$folder/export.py" "$folder/model.onnx" 2>/dev/null | grep "of the model's")
echo "seen:"
echo "$seen"
grep -q "by default: 0.weight is 0.50 of the model's, of the norm's variance there is False" <<<"$seen" &&
  grep -q "optimize=False: 0.weight is 1.00 of the model's, of the norm's variance there is True" <<<"$seen"
