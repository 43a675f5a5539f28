#!/usr/bin/env bash
# safetensors 0.8.0: the NumPy writer stores a transposed view as its memory lies, under the shape of the view. 0.7.0 stored its values.
# Guess written down before the run: what is saved is read back, whatever its strides, as with numpy.save.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/run.py" <<'PY'
import sys
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

kernel = np.arange(6, dtype=np.float32).reshape(2, 3).T  # As a dense kernel [in, out] becomes a torch weight [out, in].
save_file({"weight": kernel}, sys.argv[1])
print(safetensors.__version__, "reads back what was saved:", np.array_equal(load_file(sys.argv[1])["weight"], kernel))
PY
for version in 0.7.0 0.8.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet numpy==2.3.5 "safetensors==$version"
done
echo "version: safetensors 0.7.0 and 0.8.0"
echo "expected: True of both"
seen=$(for version in 0.7.0 0.8.0; do "$folder/$version/bin/python" "$folder/run.py" "$folder/$version.safetensors"; done)
echo "seen:"
echo "$seen"
grep -q '0.7.0 .* True' <<<"$seen" && grep -q '0.8.0 .* False' <<<"$seen"
