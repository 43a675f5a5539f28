#!/usr/bin/env bash
# Keras 3.15.1, h5py 3.16.0: the total_size of an index of shards is "in bytes", but counts a boolean as a bit. It need be no whole
# number, and is less than what the shards hold, where a boolean takes a byte.
# Guess written down before the run: 16, the bytes of three float32 and four booleans.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 h5py==3.16.0 jax==0.10.2
cat >"$folder/run.py" <<'PY'
import json
import pathlib
import sys
import h5py
import keras


class Masked(keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(3,), name="scale")
        self.mask = self.add_weight(shape=(4,), dtype="bool", initializer="zeros", trainable=False, name="mask")

    def call(self, inputs):
        return inputs * self.scale


folder = pathlib.Path(sys.argv[1])
keras.Sequential([keras.Input((3,)), Masked()]).save_weights(folder / "net.weights.json", max_shard_size=1)
sizes = []
with h5py.File(folder / "net_00000.weights.h5") as file:
    file.visititems(lambda name, item: sizes.append(item.nbytes) if isinstance(item, h5py.Dataset) else None)
total = json.loads((folder / "net.weights.json").read_text())["metadata"]["total_size"]
print(f"total_size {total}, in the shard {sum(sizes)}")
PY
echo "version: keras 3.15.1, h5py 3.16.0"
echo "expected: total_size 16, in the shard 16"
seen=$(KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "total_size 12.5, in the shard 16" ]]
