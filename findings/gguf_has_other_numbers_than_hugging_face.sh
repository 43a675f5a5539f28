#!/usr/bin/env bash
# transformers 5.24.0: what it takes from a GGUF file is for six architectures not what stands there. Gains of norms of Gemma 2 and 3 and
# of Nemotron are 1 more in the file, the state matrix of Mamba is -exp of what a model has, and the rows of llama's queries and keys
# and of Bloom's fused attention stand in another order. Names and shapes are the same, and general.architecture alone tells.
# Expected, as docs/weights.md said until then: only queries and keys of llama are changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 gguf==0.19.0 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import numpy as np
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

config = {"num_attention_heads": 2, "num_key_value_heads": 2, "n_head": 2, "hidden_size": 8}
shapes = {"attn_q": (8, 8), "attn_norm": (8,), "attn_qkv": (24, 8), "ssm_a": (8, 4)}
random = np.random.default_rng(0)
stored = {f"blk.0.{name}.weight": -random.uniform(size=shape).astype(np.float32) for name, shape in shapes.items()}
for architecture in sorted(TENSOR_PROCESSORS):
    processor = TENSOR_PROCESSORS[architecture](config=config)
    taken = {name: processor.process(array, name).weights for name, array in stored.items()}
    for name, array in stored.items():
        if taken[name].shape == array.shape and not np.array_equal(taken[name], array):
            moved = np.array_equal(np.sort(taken[name], None), np.sort(array, None))
            how = "order" if moved else "minus 1" if np.array_equal(taken[name], array - 1) else "another function"
            print(f"{architecture} {name.split('.')[2]}: {how}")
PY
echo "version: transformers 5.24.0"
echo "expected: llama attn_q: order"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null | paste -sd ';')
echo "seen: ${seen//;/; }"
[[ $seen == "bloom attn_qkv: order;gemma2 attn_norm: minus 1;gemma3 attn_norm: minus 1;llama attn_q: order;mamba ssm_a: another function;\
nemotron attn_norm: minus 1" ]]
