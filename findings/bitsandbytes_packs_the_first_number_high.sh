#!/usr/bin/env bash
# bitsandbytes 0.50.2, compressed-tensors 0.20.1, torch 2.14.1: of two numbers in a byte, bitsandbytes has the first in the upper four bits,
# compressed-tensors in the lower four. Both bytes are uint8 tensors of a safetensors file. Read in the other order,
# each number changes places with its neighbour, and all statistics of the layer stay right.
# Guess written down before the run: one order, the lower bits first, as of the bytes in a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet bitsandbytes==0.50.2 compressed-tensors==0.20.1 torch==2.14.1
cat >"$folder/run.py" <<'PY'
import bitsandbytes.functional
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

# Of the numbers of four bits, the largest and zero (FP4), or the smallest (NF4), have other bits.
bytes_of = {
    "bitsandbytes nf4": bitsandbytes.functional.quantize_4bit(torch.tensor([1.0, -1.0] * 32), quant_type="nf4")[0],
    "compressed-tensors fp4": pack_fp4_to_uint8(torch.tensor([[6.0, 0.0] * 8])),
}
for name, packed in bytes_of.items():
    high, low = int(packed.flatten()[0]) >> 4, int(packed.flatten()[0]) & 15
    print(name, "first number", "high" if high > low else "low", end="; ")
PY
echo "version: bitsandbytes 0.50.2, compressed-tensors 0.20.1"
echo "expected: bitsandbytes nf4 first number low; compressed-tensors fp4 first number low;"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "bitsandbytes nf4 first number high; compressed-tensors fp4 first number low; " ]]
