#!/usr/bin/env bash
# peft 0.21.2: merge_adapter() adds the adapter to `base_layer.weight`, and keeps the factors. That it did so is an attribute, which a
# state_dict does not have. The state_dict of a merged model loads strictly into the same kind of model, which applies the adapter a
# second time: nothing in names, shapes or keys tells a merged file from another.
# Guess written down before the run: the outputs are the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.24.0
cat >"$folder/run.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model


def make(seed):
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    return get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)


x = torch.ones(1, 4)
trained, read = make(0), make(1)
plain = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
outputs = trained(x)
trained.merge_adapter()
merged = trained.state_dict()
same = []
for tensors in (plain, merged):
    read.load_state_dict(tensors, strict=True)
    same.append(torch.allclose(read(x), outputs, atol=1e-5))
print(f"same keys {plain.keys() == merged.keys()}; same outputs before the merge {same[0]}, after {same[1]}")
PY
echo "version: peft 0.21.2, torch 2.13.0"
echo "expected: same keys True; same outputs before the merge True, after True"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "same keys True; same outputs before the merge True, after False" ]]
