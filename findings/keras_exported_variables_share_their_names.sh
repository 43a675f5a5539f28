#!/usr/bin/env bash
# keras 3.15.1: the variables of a SavedModel from model.export have the names of their layers with the backend tensorflow
# ("sequential/a/kernel:0"), but not with jax, where every kernel is "kernel:0". A dict of arrays by name, for numpy.savez, then has one
# kernel of three. The statistics of BatchNorm come last there, not beside their layer.
# Guess written down before the run: the names are those of the layers' paths with either backend.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 tensorflow-cpu==2.21.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import os
import sys

import keras
import tensorflow as tf
from keras import layers

path = f"{sys.argv[1]}/{keras.backend.backend()}"
convolution, norm = layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="norm")
model = keras.Sequential([keras.Input((8, 8, 3)), convolution, norm, layers.Flatten(), layers.Dense(6, name="a"), layers.Dense(6, name="b")])
model.export(path, verbose=False)
variables = tf.saved_model.load(path).variables
print(keras.backend.backend(), len({variable.name for variable in variables}), "names of", len(variables), end="; ")
PY
echo "version: keras 3.15.1, tensorflow 2.21.0"
echo "expected: tensorflow 10 names of 10; jax 10 names of 10; "
seen=""
for backend in tensorflow jax; do
    seen+=$(KERAS_BACKEND=$backend "$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null)
done
echo "seen: $seen"
[[ $seen == "tensorflow 10 names of 10; jax 6 names of 10; " ]]
