#!/usr/bin/env bash
# jax 0.10.2 on a CPU: an executable that was read from the compilation cache runs, but when it is serialized and another
# process loads it, its functions are missing (0.12.0.1 likewise).
# Guess written down before the run: what is read from the cache serializes as what was just compiled does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/program.py" <<'PY'
import pickle
import sys

import jax
from jax.experimental import serialize_executable

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
x = jax.numpy.ones((64, 64))
if sys.argv[1] == "save":
    jax.config.update("jax_compilation_cache_dir", sys.argv[3])
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jax.numpy.sort(x @ x, axis=1), x)).lower(x).compile()
    with open(sys.argv[2], "wb") as file:
        pickle.dump(serialize_executable.serialize(step), file)
else:
    with open(sys.argv[2], "rb") as file:
        step = serialize_executable.deserialize_and_load(*pickle.load(file))
print("runs:", float(step(x)[0, 0]))
PY
run() { "$folder/env/bin/python" "$folder/program.py" "$@" 2>&1 | tail -1 || true; }

run save "$folder/first" "$folder/cache" >/dev/null   # Compiled.
here=$(run save "$folder/second" "$folder/cache")      # Read from the cache.
first=$(run load "$folder/first")
second=$(run load "$folder/second")
echo "version: jax 0.10.2"
echo "expected: both files run in another process"
echo "seen: compiled: $first; read from the cache: $here where it was read, and loaded elsewhere: $second"
[[ "$here" == runs:* && "$first" == runs:* && "$second" == *"not found"* ]]
