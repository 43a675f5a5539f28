#!/usr/bin/env bash
# transformers 5.24.0: BertTokenizer takes only the vocabulary of a folder's tokenizer.json, and builds the rest anew from its own
# defaults. So a cased tokenizer whose tokenizer_config.json does not repeat do_lower_case=false lowers case and strips accents.
# AutoTokenizer does the same where config.json says model_type "bert". The tokenizers library reads the file as it stands.
# Guess written down before the run: text is split as tokenizer.json says.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.2
mkdir "$folder/model"
cat >"$folder/run.py" <<'PY'
import json
import pathlib
import sys

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer

folder = pathlib.Path(sys.argv[1])
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Paris", "paris", "\u00e9t\u00e9", "ete"]
tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
tokenizer.save(str(folder / "tokenizer.json"))
(folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
text = "Paris \u00e9t\u00e9"
split = {"tokenizers": Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).tokens}
split |= {kind.__name__: kind.from_pretrained(folder).tokenize(text) for kind in (BertTokenizer, AutoTokenizer)}
print("; ".join(f"{name} {ascii(' '.join(tokens))}" for name, tokens in split.items()))
PY
echo "version: transformers 5.24.0"
cased="'Paris \\xe9t\\xe9'"
echo "expected: tokenizers $cased; BertTokenizer $cased; AutoTokenizer $cased"
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder/model" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "tokenizers $cased; BertTokenizer 'paris ete'; AutoTokenizer 'paris ete'" ]]
