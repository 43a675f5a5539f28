#!/usr/bin/env bash
# mlx-lm 0.32.2: Qwen3.5 and Gemma 3 both multiply by 1 + weight in their norms. For Qwen3.5, load_model adds 1 to the norms as it reads a file
# of Hugging Face, and save_model (and so mlx_lm.convert) writes the sums under the same names; the gated norm is left as it is.
# For Gemma 3 the file keeps the model's numbers. A kernel of conv1d, [channels, 1, taps], becomes [channels, taps, 1].
# Guess written down before the run: in both files the norms are the model's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import json
import pathlib
import sys

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text, qwen3_5
from mlx_lm.utils import load_model, save_model

mx.set_default_device(mx.cpu)
common = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16, "vocab_size": 16}
linear = {f"linear_{name}": 16 if "dim" in name else 1 for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}
qwen = {"linear_conv_kernel_dim": 4, "full_attention_interval": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
configs = {qwen3_5: {"model_type": "qwen3_5", **common, **linear, **qwen}, gemma3_text: {"model_type": "gemma3_text", **common}}
for module, config in configs.items():
    folder = pathlib.Path(sys.argv[1], config["model_type"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    parameters = dict(tree_flatten(module.Model(module.ModelArgs.from_dict(config)).parameters()))
    tensors = {name.removeprefix("language_model."): array for name, array in parameters.items()}  # As at Hugging Face.
    tensors = {name: array.moveaxis(2, 1) if "conv1d" in name else array for name, array in tensors.items()}
    tensors = {name: mx.full(array.shape, 0.25) if "norm" in name else array for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    save_model(folder / "mlx", load_model(folder)[0])
    written = mx.load(str(folder / "mlx/model.safetensors"))
    norms = {float(array[0]) for name, array in written.items() if "norm" in name and "linear_attn" not in name}
    gated = {float(array[0]) for name, array in written.items() if name.endswith("linear_attn.norm.weight")}
    print(config["model_type"], "norms of 0.25 are", *norms, *(f"(gated {number})" for number in gated), end="; ")
PY
echo "version: mlx-lm 0.32.2"
echo "expected: qwen3_5 norms of 0.25 are 0.25 (gated 0.25); gemma3_text norms of 0.25 are 0.25; "
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "qwen3_5 norms of 0.25 are 1.25 (gated 0.25); gemma3_text norms of 0.25 are 0.25; " ]]
