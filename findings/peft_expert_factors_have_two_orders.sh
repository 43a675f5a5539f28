#!/usr/bin/env bash
# peft 0.21.2: LoRA of a parameter that stacks experts, [experts, out, in] (target_parameters), saves one matrix A, [experts * r, in], and
# one matrix B, [out, experts * r]. Along the axis that they share, A goes through the ranks of one expert after another, and B through
# the experts of one rank after another. Blocks of r cut from both give products of the right shape and wrong numbers.
# Guess written down before the run: expert e has rows e*r to (e+1)*r of A, and the same columns of B.
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

experts, size, inputs, rank = 3, 5, 4, 2


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = torch.nn.Parameter(torch.randn(experts, size, inputs))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.stack, x)


torch.manual_seed(0)
network = torch.nn.Sequential(Experts())
old = network[0].stack.detach().clone()
config = LoraConfig(target_modules=[], target_parameters=["0.stack"], r=rank, lora_alpha=rank, init_lora_weights=False)
adapted = get_peft_model(network, config)
adapted.save_pretrained(sys.argv[1])
tensors = {name.split(".")[-2]: tensor for name, tensor in load_file(f"{sys.argv[1]}/adapter_model.safetensors").items()}
change = adapted.merge_and_unload()[0].stack.detach() - old
a = tensors["lora_A"].reshape(experts, rank, inputs)
blocks = tensors["lora_B"].reshape(size, experts, rank).permute(1, 0, 2)
strides = tensors["lora_B"].reshape(size, rank, experts).permute(2, 0, 1)
same = [torch.allclose(b @ a, change, atol=1e-5) for b in (blocks, strides)]
print(f"A {list(tensors['lora_A'].shape)}, B {list(tensors['lora_B'].shape)}; blocks of both {same[0]}, every third column of B {same[1]}")
PY
echo "version: peft 0.21.2, torch 2.13.0"
echo "expected: A [6, 4], B [5, 6]; blocks of both True, every third column of B False"
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder/adapter" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "A [6, 4], B [5, 6]; blocks of both False, every third column of B True" ]]
