#!/usr/bin/env bash
# jax 0.10.2: jnp.linalg.lstsq leaves out all directions whose singular value is below eps * max(rows, columns) of the largest, with the eps of
# float32. So its cut rises with the number of examples: at 100,000 it is 1.2 percent, at a million 12. Of three features with deviations 1,
# 0.1 and 0.01 and labels that are exactly linear in them, it then fits two, or one. jnp.linalg.pinv cuts at ten times as much. NumPy and
# SciPy fit all three, of the same float32 arrays. 0.12.0.1 does the same.
# Guess written down before the run: all three coefficients are right to a thousandth, at any number of rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import jax.numpy as jnp
import numpy as np

for rows in (1_000, 100_000, 1_000_000):
    deviations = np.array([1, 0.1, 0.01], np.float32)
    features = np.random.default_rng(0).standard_normal((rows, 3), np.float32) * deviations
    labels = features @ np.array([1, 2, 3], np.float32)
    for name, library in (("jax", jnp), ("numpy", np)):
        found = library.linalg.lstsq(features, labels, rcond=None)[0]
        print(rows, name, *(f"{abs(float(one)):.1f}" for one in found), end="; ")
PY
echo "version: jax 0.10.2, numpy 2.3.5"
echo "expected: 1.0 2.0 3.0 in all six"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
few="1000 jax 1.0 2.0 3.0; 1000 numpy 1.0 2.0 3.0; "
many="100000 jax 1.0 2.0 0.0; 100000 numpy 1.0 2.0 3.0; 1000000 jax 1.0 0.0 0.0; 1000000 numpy 1.0 2.0 3.0; "
[[ $seen == "$few$many" ]]
