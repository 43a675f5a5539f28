#!/usr/bin/env bash
# jax 0.10.2: fold_in(key, i) is the key split(key, n)[i], bit for bit, for threefry and rbg keys. So a loop that folds its step into a key
# draws at step 0 and 1 what the two halves of the same key draw, such as a model's initial weights. And split(key, 2) is the start of
# split(key, 5). jax_threefry_partitionable brought it, the default of the last releases; the pages of both functions do not say so.
# Guess written down before the run: keys of two functions, or of splits into unlike numbers, have nothing in common.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import numpy as np


def common(keys, others):
    return int(np.all(jax.random.key_data(keys) == jax.random.key_data(others), axis=-1).sum())


key = jax.random.key(0)
steps = jax.vmap(lambda step: jax.random.fold_in(key, step))(np.arange(5))
weights_key, loop_key = jax.random.split(key)
print(f"steps 0 to 4 and split(key, 5) share {common(jax.random.split(key, 5), steps)} keys", end="; ")
print(f"split(key, 2) and (key, 5) {common(jax.random.split(key, 2), jax.random.split(key, 5)[:2])}", end="; ")
weights, noise = (jax.random.normal(one, (1000,)) for one in (weights_key, jax.random.fold_in(key, 0)))
print(f"weights and noise correlate by {np.corrcoef(weights, noise)[0, 1]:.1f}")
PY
echo "version: jax 0.10.2"
echo "expected: steps 0 to 4 and split(key, 5) share 0 keys; split(key, 2) and (key, 5) 0; weights and noise correlate by 0.0"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "steps 0 to 4 and split(key, 5) share 5 keys; split(key, 2) and (key, 5) 2; weights and noise correlate by 1.0" ]]
