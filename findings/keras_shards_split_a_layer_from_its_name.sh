#!/usr/bin/env bash
# Keras 3.15.1, h5py 3.16.0: save_weights(max_shard_size=...) writes an index whose weight_map has the groups of layers, each with a list of
# files. A layer that does not fit in what is left of one file has its group there, with its own name and without an array; the index does
# not name that file for it, and the group that holds the numbers has no name. With numbers in two files, each has a part of the group.
# Guess written down before the run: as in the index of safetensors, a map of each variable to one file, which has the layer's name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 h5py==3.16.0 jax==0.10.2
cat >"$folder/run.py" <<'PY'
import json
import sys
import h5py
import keras

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(30), keras.layers.Dense(40, name="last")])
model.save_weights(f"{sys.argv[1]}/m.weights.json", max_shard_size=4850 / 2**30)
with open(f"{sys.argv[1]}/m.weights.json") as file:
    files = json.load(file)["weight_map"]["/layers/dense_1/vars"]
found = []
for i in range(3):
    with h5py.File(f"{sys.argv[1]}/m_0000{i}.weights.h5") as file:
        group = file.get("layers/dense_1/vars")
        found.append("no group" if group is None else f"{list(group)} of {group.attrs.get('name')}")
print(f"{' '.join(files)}; {', '.join(found)}")
PY
echo "version: keras 3.15.1, h5py 3.16.0"
echo "expected: m_00001.weights.h5; no group, ['kernel'] of last, ['bias'] of last"
seen=$(KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "m_00001.weights.h5 m_00002.weights.h5; [] of last, ['0'] of None, ['1'] of None" ]]
