#!/usr/bin/env bash
# optimum-quanto 0.2.7: a weight of qint4 is stored as `_data._data`, `_scale` and `_shift`. A number is q * scale - shift, not
# (q - shift) * scale. The bytes of a weight [8, 256] have the shape [8, 128], as if two neighbours shared a byte; but a row of them is a
# group of 128, and its other four bits are another group, four rows of the weight further. Scales have a row a group, whichever row it is in.
# Guess written down before the run: (q - shift) * scale. That neighbours share a byte, one would take from the shape.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optimum-quanto==0.2.7 torch==2.13.0 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import torch
from optimum.quanto import freeze, qint4, quantize

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 8))
weight = model[0].weight.detach().clone()
quantize(model, weights=qint4)
freeze(model)
data, scale, shift = (model.state_dict()[f"0.weight.{name}"] for name in ("_data._data", "_scale", "_shift"))
low, high = data & 15, data >> 4
orders = {"neighbours": torch.stack([low, high], -1).reshape(16, 128), "four rows apart": torch.cat([low, high])}
rules = {"(q - shift) * scale": lambda q: (q - shift) * scale, "q * scale - shift": lambda q: q * scale - shift}
for order, numbers in orders.items():
    for rule, apply in rules.items():
        if (apply(numbers.float()).reshape(8, 256) - weight).abs().max() < 0.1 * weight.abs().max():
            print(f"{list(data.shape)} for {list(weight.shape)}, {order}, {rule}")
PY
echo "version: optimum-quanto 0.2.7, torch 2.13.0"
echo "expected: [8, 128] for [8, 256], neighbours, (q - shift) * scale"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "[8, 128] for [8, 256], four rows apart, q * scale - shift" ]]
