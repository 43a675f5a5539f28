#!/usr/bin/env bash
# safetensors 0.8.0: save_model stores tied tensors once, under the name that is first in the alphabet, whichever layer owns it. The
# other name is a key of the header's strings, with the stored name as its value. So the file of a language model may have the head and
# no embedding; load_file returns no tensor for it. huggingface_hub's save_torch_model writes the same.
# Guess written down before the run: the embedding stays, which comes first in the model and in its state dict.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 torch==2.14.1 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_model


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.word = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.word.weight


model = Model()
print("state dict", *model.state_dict(), end="; ")
save_model(model, sys.argv[1])
with safe_open(sys.argv[1], "np") as file:
    print("file", *file.keys(), end="; ")
    print("strings", *(f"{name}={value}" for name, value in (file.metadata() or {}).items()))
PY
echo "version: safetensors 0.8.0"
echo "expected: state dict word.weight head.weight; file word.weight; strings head.weight=word.weight"
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder/model.safetensors" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "state dict word.weight head.weight; file head.weight; strings word.weight=head.weight" ]]
