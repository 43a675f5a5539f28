#!/usr/bin/env bash
# peft 0.21.2: with trainable_token_indices, the adapter's file holds a tensor named `trainable_tokens_delta`. It has the new rows of
# the embedding themselves, which replace the old ones; a sum of old rows and "delta" is about twice the embedding. Which rows they are
# stands in adapter_config.json alone.
# Guess written down before the run: a difference, to be added to the rows of the embedding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.24.0 safetensors==0.8.0
cat >"$folder/run.py" <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

torch.manual_seed(0)
rows = [1, 4]
network = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 3))
old = network[0].weight.detach().clone()[rows]
adapted = get_peft_model(network, LoraConfig(target_modules=["1"], trainable_token_indices={"0": rows}))
with torch.no_grad():
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
adapted.save_pretrained(sys.argv[1])
tensors = load_file(f"{sys.argv[1]}/adapter_model.safetensors")
(delta,) = (tensor for name, tensor in tensors.items() if name.endswith("trainable_tokens_delta"))
new = adapted.merge_and_unload()[0].weight[rows]
print(f"old rows plus delta {torch.allclose(new, old + delta)}, delta alone {torch.allclose(new, delta)}")
PY
echo "version: peft 0.21.2, torch 2.13.0"
echo "expected: old rows plus delta True, delta alone False"
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder/adapter" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "old rows plus delta False, delta alone True" ]]
