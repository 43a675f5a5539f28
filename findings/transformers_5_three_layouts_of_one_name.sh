#!/usr/bin/env bash
# transformers 5.24.0: the parameter experts.gate_up_proj has three layouts. In Mixtral and Qwen3-MoE it is [experts, out, in], in gpt-oss and
# Llama 4 [experts, in, out]. Gates are the first half of the outputs, but every second one in gpt-oss. No bias or class name tells, and
# where the inputs are twice as many as the hidden units, neither does the shape.
# Guess written down before the run: one name of one library has one layout, [experts, out, in] as nn.Linear, gates first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1
cat >"$folder/run.py" <<'PY'
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts": 4}
sizes |= {"num_experts_per_tok": 2}
gates = {"[out, in] first half": np.s_[:, :16], "[in, out] first half": np.s_[..., :16], "[in, out] every second": np.s_[..., ::2]}
for kind in ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text"):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    name = next(name for name, _ in model.named_parameters() if name.endswith("experts.gate_up_proj"))
    block = model.get_submodule(name.removesuffix(".experts.gate_up_proj"))
    with torch.no_grad():
        for leaf_name, leaf in block.named_parameters():
            leaf.normal_() if "bias" not in leaf_name and "shared" not in leaf_name else leaf.zero_()
        for layout, where in gates.items():
            kept = (weight := model.get_parameter(name)).clone()
            weight[where] = 0  # Without gates, a gated layer is zero.
            out = block(torch.ones(1, 3, 32))
            if (out[0] if isinstance(out, tuple) else out).abs().max() == 0:
                print(kind, list(weight.shape), layout, end="; ")
            weight.copy_(kept)
PY
echo "version: transformers 5.24.0"
same="[4, 32, 32] [out, in] first half;"
echo "expected: mixtral $same qwen3_moe $same gpt_oss $same llama4_text $same"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
other="[4, 32, 32] [in, out]"
[[ $seen == "mixtral $same qwen3_moe $same gpt_oss $other every second; llama4_text $other first half; " ]]
