#!/usr/bin/env bash
# transformers 5.24.0: if config.json states no dtype, from_pretrained gives all parameters the type of one tensor, the first of the file
# in the alphabet of names. One bias in bfloat16 there rounds a model in float32 to bfloat16; one in float32 doubles a model in bfloat16.
# Elsewhere in the file, the same tensor changes nothing. safetensors and torch.load return each tensor in its own type.
# Guess written down before the run: each parameter has the type of its tensor, or all have the widest type of the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 safetensors==0.8.0 torch==2.14.1
cat >"$folder/run.py" <<'PY'
import json
import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

folder = pathlib.Path(sys.argv[1])
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
BertModel(BertConfig(**sizes)).save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
config = json.loads((folder / "config.json").read_text())
(folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "dtype"}))
for name in (min(tensors), max(tensors)):
    save_file(tensors | {name: tensors[name].bfloat16()}, folder / "model.safetensors", {"format": "pt"})
    kinds = {str(leaf.dtype).removeprefix("torch.") for leaf in BertModel.from_pretrained(folder).parameters()}
    print(f"{name} in bfloat16: {' '.join(sorted(kinds))}", end="; ")
PY
echo "version: transformers 5.24.0"
echo "expected: embeddings.LayerNorm.bias in bfloat16: bfloat16 float32; pooler.dense.weight in bfloat16: bfloat16 float32;"
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder/model" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "embeddings.LayerNorm.bias in bfloat16: bfloat16; pooler.dense.weight in bfloat16: float32; " ]]
