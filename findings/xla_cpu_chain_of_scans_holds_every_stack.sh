#!/usr/bin/env bash
# jax 0.10.2 on a CPU: of scans that each read what the one before stacked, XLA plans memory for every stack at once.
# The flag that orders operations otherwise helps in the environment, and as an option of jax.jit is accepted and does nothing.
# Guesses written down before the run: two are alive at a time, so eight scans over 67 MB need some 134 MB beside their
# input; and an option means the same in XLA_FLAGS and in compiler_options.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/plan.py" <<'PY'
import sys

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
rows, total = jax.ShapeDtypeStruct((16, 2**20), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
options = {"xla_cpu_enable_concurrency_optimized_scheduler": False} if "option" in sys.argv else None
plan = jax.jit(chain, compiler_options=options).lower(rows, total).compile().memory_analysis()
print(round(plan.temp_size_in_bytes / (16 * 2**20 * 4)))
PY
seen() { "$folder/env/bin/python" "$folder/plan.py" "$@"; }
default=$(seen)
option=$(seen option)
flag=$(XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false seen)
echo "version: jax 0.10.2, CPU"
echo "expected: about 2 stacks of 67 MB; and as many with an option of jax.jit as with the flag of that name"
echo "seen: $default stacks; $option with compiler_options, $flag with XLA_FLAGS"
[ "$default" -ge 5 ] && [ "$option" -eq "$default" ] && [ "$flag" -lt 5 ]
