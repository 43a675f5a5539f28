#!/usr/bin/env bash
# torch 2.13.0: after `parametrizations.orthogonal`, the layer has one parameter, `parametrizations.weight.original`. It is minus the
# identity, whatever the weight is; the weight itself is in a buffer, `parametrizations.weight.0.base`. After training, the weight follows
# from both. So two layers with the same parameters have different weights, and a mean of parameters is no mean of weights.
# Guess by the names (written down only after a first look): `original` has the weight's numbers, and the parameters determine the weight.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import torch

torch.manual_seed(0)
first, second = (torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(4, 4, bias=False)) for _ in range(2))
tensors = first.state_dict()
for name in ("original", "0.base"):
    tensor = tensors[f"parametrizations.weight.{name}"]
    named = {"the weight": first.weight, "minus the identity": -torch.eye(4)}
    print(name, next(what for what, value in named.items() if torch.allclose(tensor, value)), end="; ")
equal = all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters()))
weights = "equal" if torch.allclose(first.weight, second.weight) else "different"
print(f"two layers: {'equal' if equal else 'different'} parameters, {weights} weights")
PY
echo "version: torch 2.13.0"
echo "expected: original the weight; two layers: different parameters, different weights"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "original minus the identity; 0.base the weight; two layers: equal parameters, different weights" ]]
