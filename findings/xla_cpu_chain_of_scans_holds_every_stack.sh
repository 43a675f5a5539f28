#!/usr/bin/env bash
# jax 0.10.2 on a CPU: of scans that each read what the one before stacked, XLA plans memory for every stack at once.
# Guess written down before the run: two are alive at a time, so eight scans over 67 MB need some 134 MB beside their input.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/plan.py" <<'PY'
import jax
import jax.numpy as jnp
from jax import lax

def chain(rows, total):
    def advance(total, row):
        row = jnp.sin(row + total)
        return total + row.mean(), row

    for _ in range(8):
        total, rows = lax.scan(advance, total, rows)
    return total

rows = jax.ShapeDtypeStruct((16, 2**20), jnp.float32)
plan = jax.jit(chain).lower(rows, jax.ShapeDtypeStruct((), jnp.float32)).compile().memory_analysis()
stack = 16 * 2**20 * 4
print(f"{plan.temp_size_in_bytes / stack:.1f} stacks of {stack / 1e6:.0f} MB")
raise SystemExit(plan.temp_size_in_bytes < 5 * stack)
PY
echo "version: jax 0.10.2, CPU"
echo "expected: about 2 stacks"
echo -n "seen: "
"$folder/env/bin/python" "$folder/plan.py"
