#!/usr/bin/env bash
# gguf 0.19.0: a big-endian file has two layouts. The package's writer leaves the bytes of quantised blocks as they are in a
# little-endian file; its converter (gguf-convert-endian) turns the scale of each block around. Both call the file big-endian, and nothing
# in it tells which it is; read without a swap, the scales of the converted file are other numbers.
# Guess written down before the run: one tensor has the same bytes in both files.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import subprocess
import sys
import gguf
import numpy as np

kind = gguf.GGMLQuantizationType.Q8_0
blocks = gguf.quantize(np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32), kind)
for name, endian in (("written", gguf.GGUFEndian.BIG), ("converted", gguf.GGUFEndian.LITTLE)):
    writer = gguf.GGUFWriter(name, "llama", endianess=endian)
    writer.add_tensor("a", blocks.copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
command = [sys.executable, "-m", "gguf.scripts.gguf_convert_endian", "converted", "big"]
subprocess.run(command, input="YES\n", text=True, capture_output=True, check=True)
written, converted = (np.asarray(gguf.GGUFReader(name).tensors[0].data).ravel()[:2].tolist() for name in ("written", "converted"))
print(f"the first scale: the same bytes {written == converted}, the bytes in reverse {written == converted[::-1]}")
PY
echo "version: gguf 0.19.0"
echo "expected: the first scale: the same bytes True, the bytes in reverse False"
seen=$(cd "$folder" && venv/bin/python run.py)
echo "seen: $seen"
[[ $seen == "the first scale: the same bytes False, the bytes in reverse True" ]]
