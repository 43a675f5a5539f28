#!/usr/bin/env bash
# transformers 5.24.0: if a file has an embedding and another head, but config.json says that they are tied, from_pretrained warns and keeps
# both. resize_token_embeddings then ties them after all: the head becomes the embedding, in its old rows too, and no warning says so.
# Guess written down before the run: the old rows of the head are still the file's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 safetensors==0.8.0 torch==2.14.1 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(sys.argv[1])
tensors = load_file(f"{sys.argv[1]}/model.safetensors")
embedding = tensors["model.embed_tokens.weight"]
tensors["lm_head.weight"] = head = embedding + 1
save_file(tensors, f"{sys.argv[1]}/model.safetensors", metadata={"format": "pt"})
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
print("head as in the file", torch.equal(model.lm_head.weight, head), end=", ")
model.resize_token_embeddings(40)
rows = model.lm_head.weight[:32]
print("resized", torch.equal(rows, head), "embedding instead", torch.equal(rows, embedding))
PY
echo "version: transformers 5.24.0"
echo "expected: head as in the file True, resized True embedding instead False"
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder/model" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "head as in the file True, resized False embedding instead True" ]]
