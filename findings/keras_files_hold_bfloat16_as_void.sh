#!/usr/bin/env bash
# Keras 3.15.1, h5py 3.16.0: a bfloat16 variable stands in a .weights.h5 (and so in a .keras) as raw bytes, numpy's |V2; only an
# attribute says bfloat16. Reading it gives no number and no error. A layer stands under its class and a count (dense, dense_1), its own
# name is an attribute of the group of its variables, and the variables have numbers alone.
# Guess written down before the run: float32 numbers, in groups by the names of the layers: last/kernel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 h5py==3.16.0 jax==0.10.2
cat >"$folder/run.py" <<'PY'
import sys
import h5py
import keras

model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, dtype="bfloat16", name="last")])
model.save_weights(f"{sys.argv[1]}/net.weights.h5")
found = []
with h5py.File(f"{sys.argv[1]}/net.weights.h5") as file:
    file.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
    name, kernel = found[0]
    print(f"{name}: {kernel.dtype.str}, {kernel.attrs.get('dtype')}; the layer is {kernel.parent.attrs.get('name')}")
PY
echo "version: keras 3.15.1, h5py 3.16.0"
echo "expected: last/kernel: <f4, None; the layer is last"
seen=$(KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "layers/dense/vars/0: |V2, bfloat16; the layer is last" ]]
