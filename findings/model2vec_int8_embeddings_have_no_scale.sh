#!/usr/bin/env bash
# model2vec 0.10.0: quantize_to="int8" divides the table by a scale that is then forgotten: neither model.safetensors nor config.json has
# it, and encode returns numbers of another size. vocabulary_quantization keeps fewer rows than tokens: row i of `embeddings` is
# no longer token i's. That is row mapping[i], times weights[i].
# Guess written down before the run: the scale is a tensor or in config.json, and encode returns the model's numbers, rounded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet model2vec==0.10.0 tokenizers==0.23.2 safetensors==0.8.0 scikit-learn==1.9.1 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import json
import pathlib
import sys

import numpy as np
from model2vec import StaticModel
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

folder = pathlib.Path(sys.argv[1])
words = ["[UNK]", "the", "cat", "dog", "sat", "ran", "a", "bird"]
tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
vectors = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
StaticModel(vectors, tokenizer).save_pretrained(folder / "plain")
whole = StaticModel.from_pretrained(folder / "plain").encode("the cat sat")
for name, options in (("int8", {"quantize_to": "int8"}), ("rows", {"vocabulary_quantization": 4})):
    StaticModel.from_pretrained(folder / "plain", **options).save_pretrained(folder / name)
tensors = load_file(folder / "int8/model.safetensors")
strings = json.loads((folder / "int8/config.json").read_text())
numbers = [key for key, value in strings.items() if isinstance(value, float)]
coded = StaticModel.from_pretrained(folder / "int8").encode("the cat sat").astype(np.float32)
ratio = float(coded @ whole / (whole @ whole))
print(f"int8: tensors {' '.join(tensors)}, scales in config {len(numbers)}, {'as' if 0.9 < ratio < 1.1 else 'not as'} large", end="; ")
tensors = load_file(folder / "rows/model.safetensors")
print(f"vocabulary: {len(tensors['embeddings'])} rows for {len(words)} tokens, {' '.join(sorted(tensors))}")
PY
echo "version: model2vec 0.10.0"
echo "expected: int8: tensors embeddings scale, scales in config 0, as large; vocabulary: 8 rows for 8 tokens, embeddings"
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "int8: tensors embeddings, scales in config 0, not as large; vocabulary: 4 rows for 8 tokens, embeddings mapping weights" ]]
