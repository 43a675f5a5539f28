#!/usr/bin/env bash
# jax 0.12.0.1 on a CPU: the second moments of rows as an einsum whose batch axis has size 1 ("nam,nak->amk", a = 1) hold the
# rows twice. Without that axis ("nm,nk->mk") they hold them once.
# Guess written down before the run: an axis of size 1 is free, since XLA simplifies products with such an axis.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1
cat >"$folder/plan.py" <<'PY'
import sys

import jax
import jax.numpy as jnp

form, *ones = sys.argv[1:]
rows, width = 16384, 1536


def moments(hidden):
    activations = jnp.tanh(hidden).reshape(rows, *map(int, ones), width)
    return jnp.einsum(form, activations, activations, precision="highest")


plan = jax.jit(moments).lower(jax.ShapeDtypeStruct((rows, width), jnp.float32)).compile().memory_analysis()
print(round(plan.temp_size_in_bytes / (rows * width * 4)))
PY
with=$("$folder/env/bin/python" "$folder/plan.py" "nam,nak->amk" 1)
without=$("$folder/env/bin/python" "$folder/plan.py" "nm,nk->mk")
echo "version: jax 0.12.0.1, CPU"
echo "expected: temporaries as large as the activations, once, in both forms"
echo "seen: $with times with an axis of size 1, $without without it"
[ "$with" -eq 2 ] && [ "$without" -eq 1 ]
