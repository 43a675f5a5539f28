#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter(..., combination_type="linear") adds the factors of two adapters, each by the root of its weight, and not
# their products. So the new delta is no linear combination of the two: it has the products of one adapter's B with the other's A as well.
# combination_type="cat" gives the combination. A weight of -1 does not subtract an adapter either.
# Guess written down before the run: weights .5 and .5 give half of each delta.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.24.0
cat >"$folder/run.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
config = LoraConfig(target_modules=["0"], r=2, lora_alpha=2)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config, adapter_name="first")
model.add_adapter("second", config)
layer = model.base_model.model[0]
with torch.no_grad():
    for factors in (layer.lora_A, layer.lora_B):
        for factor in factors.values():
            factor.weight.normal_()
(a1, b1), (a2, b2) = ((layer.lora_A[name].weight, layer.lora_B[name].weight) for name in ("first", "second"))


def delta(kind, *weights):
    name = f"{kind} of {len(layer.lora_A)}"
    model.add_weighted_adapter(["first", "second"], list(weights), name, combination_type=kind)
    return layer.get_delta_weight(name)


for kind in ("linear", "cat"):
    found = delta(kind, 0.5, 0.5)
    close = {"half of each": 0.5 * (b1 @ a1 + b2 @ a2), "half of (B1 + B2)(A1 + A2)": 0.5 * (b1 + b2) @ (a1 + a2)}
    print(kind, next(name for name, value in close.items() if torch.allclose(found, value, atol=1e-5)), end="; ")
PY
echo "version: peft 0.21.2, torch 2.13.0"
echo "expected: linear half of each; cat half of each;"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "linear half of (B1 + B2)(A1 + A2); cat half of each; " ]]
