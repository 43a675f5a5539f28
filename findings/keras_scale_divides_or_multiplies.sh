#!/usr/bin/env bash
# Keras 3.15.1: `kernel_scale` of a quantised layer is what the whole numbers are divided by after quantize("int8"), and what they are
# multiplied by after quantize("int4"), which works in blocks of inputs by default; int4 without blocks divides again. Variables have the
# same names in all three, and stand without a name in a .weights.h5.
# Guess written down before the run: the numbers times kernel_scale, in int8 and in int4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 h5py==3.16.0
cat >"$folder/run.py" <<'PY'
import keras
import numpy as np
from keras.quantizers import Int4QuantizationConfig, Int8QuantizationConfig, unpack_int4


def rule(config):
    keras.utils.set_random_seed(0)
    layer = keras.layers.Dense(6, use_bias=False)
    layer.build((None, 256))
    kernel = np.asarray(layer.kernel)
    layer.quantize(config.mode, config=config)
    stored = {variable.name: np.asarray(variable) for variable in layer.weights}
    scale, numbers = stored["kernel_scale"], stored["kernel"]
    numbers = np.asarray(unpack_int4(numbers, 6, axis=-1)) if config.mode == "int4" else numbers
    numbers = numbers.astype(np.float32)
    if "kernel_zero" in stored:
        block = stored["g_idx"].astype(int)
        numbers, scale = numbers - stored["kernel_zero"][block], scale[block]
    close = {"multiplied": numbers * scale, "divided": numbers / scale}
    return " ".join(name for name, found in close.items() if np.abs(found - kernel).max() < 0.1 * np.abs(kernel).max())


configs = {"int8": Int8QuantizationConfig(), "int4": Int4QuantizationConfig(), "whole int4": Int4QuantizationConfig(block_size=None)}
print("; ".join(f"{name} {rule(config)}" for name, config in configs.items()))
PY
echo "version: keras 3.15.1"
echo "expected: int8 multiplied; int4 multiplied; whole int4 multiplied"
seen=$(KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "int8 divided; int4 multiplied; whole int4 divided" ]]
