#!/usr/bin/env bash
# Keras 3.15.1: a saved layer with LoRA holds the merged kernel, and neither of its two factors. Loading sets both factors to zero, so
# that each has a gradient of zero: a loaded model trains on without an error, and its LoRA layers never change again. enable_lora starts
# only the second factor at zero.
# Guess written down before the run: training goes on where it stopped, with the saved factors or with a new random one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 h5py==3.16.0
cat >"$folder/run.py" <<'PY'
import sys

import keras
import numpy as np

keras.utils.set_random_seed(0)
x, y = np.random.normal(size=(64, 8)).astype(np.float32), np.random.normal(size=(64, 6)).astype(np.float32)


def change(model):
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    layer = model.layers[0]
    before = np.asarray(layer.kernel)
    model.fit(x, y, epochs=10, verbose=0)
    return float(np.abs(np.asarray(layer.kernel) - before).max())


model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6)])
model.layers[0].enable_lora(2)
print(f"before: {'the kernel changes' if change(model) > 1e-3 else 'no change'}", end="; ")
model.save(sys.argv[1])
loaded = keras.models.load_model(sys.argv[1])
np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
print(f"loaded: {'the kernel changes' if change(loaded) > 1e-3 else 'no change'}")
PY
echo "version: keras 3.15.1"
echo "expected: before: the kernel changes; loaded: the kernel changes"
seen=$(KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/run.py" "$folder/model.keras" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "before: the kernel changes; loaded: no change" ]]
