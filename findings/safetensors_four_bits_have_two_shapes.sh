#!/usr/bin/env bash
# safetensors 0.8.0, torch 2.14.1: a tensor of float4_e2m1fn_x2 has two numbers in each element. It is saved with twice the last axis, and
# comes back with its own. So the shape in the header, which get_slice gives, is not that of get_tensor, nor of the model's parameter.
# With framework "np", the tensor cannot be read, since the name of a type of PyTorch is looked up in NumPy.
# Guess written down before the run: one shape before, in the file, and after, as for every other type.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 torch==2.14.1 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

tensor = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
for kind in (torch.float8_e4m3fn, torch.float4_e2m1fn_x2):
    save_file({"w": tensor.view(kind)}, sys.argv[1])
    with safe_open(sys.argv[1], "pt") as file:
        shapes = [list(tensor.view(kind).shape), file.get_slice("w").get_shape(), list(file.get_tensor("w").shape)]
        print(file.get_slice("w").get_dtype(), "saved {}, header {}, loaded {}".format(*shapes), end="; ")
PY
echo "version: safetensors 0.8.0, torch 2.14.1"
echo "expected: F8_E4M3 saved [4, 8], header [4, 8], loaded [4, 8]; F4 saved [4, 8], header [4, 8], loaded [4, 8];"
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder/model.safetensors" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "F8_E4M3 saved [4, 8], header [4, 8], loaded [4, 8]; F4 saved [4, 8], header [4, 16], loaded [4, 8]; " ]]
