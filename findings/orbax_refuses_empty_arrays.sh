#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: a tree with an array of no elements can't be saved, though JAX and Optax make such arrays.
# Guess written down before the run: it is saved as an array of its shape, as NumPy's formats and safetensors save it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8 safetensors==0.8.0
cat >"$folder/save.py" <<'PY'
import sys
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load, save

tree = {"bias": jnp.zeros(0), "kernel": jnp.ones((2, 2))}
print("safetensors:", load(save({name: np.asarray(leaf) for name, leaf in tree.items()}))["bias"].shape)
try:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(sys.argv[1], tree)
    print("orbax: saved")
except ValueError as error:
    print("orbax:", str(error)[:60])
PY
echo "version: orbax-checkpoint 0.12.8"
echo "expected: an array of shape (0,) is saved and read back"
seen=$("$folder/env/bin/python" "$folder/save.py" "$folder/checkpoint" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q 'safetensors: (0,)' <<<"$seen" && grep -q 'orbax: Cannot save arrays with zero size' <<<"$seen"
