#!/usr/bin/env bash
# compressed-tensors 0.20.1, torch 2.14.1: a weight in NVFP4 has a scale for each 16 numbers, `weight_scale`, and one for the tensor,
# `weight_global_scale`. The first multiplies, the second divides: it is hundreds for weights around 1, and whoever multiplies by
# both, as their names say, is wrong by its square.
# Guess written down before the run: weight = packed * weight_scale * weight_global_scale.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet compressed-tensors==0.20.1 torch==2.14.1
cat >"$folder/run.py" <<'PY'
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

torch.manual_seed(0)
weight = torch.randn(8, 64)
scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
whole = generate_gparam(weight.min(), weight.max())
groups = weight.reshape(8, 4, 16)
scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=whole)
stored = NVFP4PackedCompressor.compress(
    {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}, scheme
)
packed, each = stored["weight_packed"], stored["weight_scale"].float().repeat_interleave(16, 1)
numbers = unpack_fp4_from_uint8(packed, 8, 64).float() * each
for name, made in {"product": numbers * whole, "quotient": numbers / whole}.items():
    error = ((made - weight).norm() / weight.norm()).item()
    print(name, "close" if error < 0.2 else "far", end="; ")
print("global scale above 100" if whole.item() > 100 else "global scale below 100")
PY
echo "version: compressed-tensors 0.20.1, torch 2.14.1"
echo "expected: product close; quotient far; global scale below 100"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>"$folder/errors" || tail -3 "$folder/errors")
echo "seen: $seen"
[[ $seen == "product far; quotient close; global scale above 100" ]]
