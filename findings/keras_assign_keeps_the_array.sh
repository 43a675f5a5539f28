#!/usr/bin/env bash
# Keras 3.15.1 with JAX: variable.assign(array) keeps that very array, though the method's name and that of TensorFlow say a copy. A program
# that donates its arguments (as training steps do) later frees the memory of the live model, whose next use fails.
# Guess written down before the run: the variable has a copy, and goes on when the array is donated.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import keras

layer = keras.layers.Dense(3)
layer.build((None, 2))
trained = jnp.ones((2, 3))
layer.kernel.assign(trained)
same = layer.kernel.value is trained
step = jax.jit(lambda kernel: kernel + 1, donate_argnums=0)
step(trained)
try:
    used = float(layer.kernel.value.sum())
except RuntimeError as error:
    used = str(error).partition(" with shape")[0]
print(f"the same array {same}; the model's kernel after a donated step: {used}")
PY
echo "version: keras 3.15.1, jax 0.10.2"
echo "expected: the same array False; the model's kernel after a donated step: 6.0"
seen=$(KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "the same array True; the model's kernel after a donated step: Array has been deleted"* ]]
