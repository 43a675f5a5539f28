#!/usr/bin/env bash
# Keras 3.15.1: an Orbax checkpoint of keras.callbacks.OrbaxCheckpoint has a layer among trainable_variables or non_trainable_variables, as
# it was frozen when it was saved. load_weights into the same model with nothing frozen leaves the layers that were frozen as they are,
# without an error or a warning of them; a .weights.h5 of the same model is read in full.
# Guess written down before the run: all numbers come back, or an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 h5py==3.16.0 orbax-checkpoint==0.12.8
cat >"$folder/run.py" <<'PY'
import sys
import keras
import numpy as np

folder = sys.argv[1]


def make(seed, trainable):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(4, name="fc", trainable=trainable), keras.layers.Dense(2, name="head")]
    model = keras.Sequential([keras.Input((3,)), *layers], name="m")
    model.compile("sgd", "mse")
    return model


saved = make(0, trainable=False)
callback = keras.callbacks.OrbaxCheckpoint(f"{folder}/orbax", save_weights_only=True, save_on_background=False)
saved.fit(np.ones((8, 3)), np.ones((8, 2)), callbacks=[callback], verbose=0)
saved.save_weights(f"{folder}/m.weights.h5")
for name in ("orbax", "m.weights.h5"):
    read = make(1, trainable=True)
    read.load_weights(f"{folder}/{name}")
    same = [np.array_equal(a.kernel, b.kernel) for a, b in zip(saved.layers, read.layers, strict=True)]
    print(f"{name}: fc {same[0]}, head {same[1]}")
PY
echo "version: keras 3.15.1, orbax-checkpoint 0.12.8"
echo "expected: orbax: fc True, head True; m.weights.h5: fc True, head True"
seen=$(KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null | paste -sd ';')
echo "seen: ${seen//;/; }"
[[ $seen == "orbax: fc False, head True;m.weights.h5: fc True, head True" ]]
