#!/usr/bin/env bash
# flax 0.12.8: the target that from_bytes is given checks names alone: arrays of another shape and dtype come back.
# Guess written down before the run: a shape that is not the target's is refused, as a missing name is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat >"$folder/read.py" <<'PY'
import numpy as np
from flax import serialization

data = serialization.to_bytes({"kernel": np.ones((3, 4), np.float32)})
found = serialization.from_bytes({"kernel": np.zeros((5, 6), np.float16)}, data)["kernel"]
print(f"target float16[5, 6]: {found.dtype}{list(found.shape)}")
try:
    serialization.from_bytes({"bias": np.zeros(3)}, data)
    print("target of another name: read")
except ValueError as error:
    print("target of another name:", str(error)[:40])
PY
echo "version: flax 0.12.8"
echo "expected: float32[3, 4] is refused where the target is float16[5, 6]"
seen=$("$folder/env/bin/python" "$folder/read.py" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q 'target float16\[5, 6\]: float32\[3, 4\]' <<<"$seen" && grep -q 'another name: The target dict keys' <<<"$seen"
