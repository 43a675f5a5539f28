#!/usr/bin/env bash
# jax 0.10.2: jax_enable_compilation_cache is read at the first program; switched off later, programs are kept all the same.
# Guess written down before the run: nothing is read from the cache or kept in it while the switch is off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/switch.py" <<'PY'
import os
import sys
import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def kept(function):
    before = set(os.listdir(sys.argv[1])) if os.path.isdir(sys.argv[1]) else set()
    jax.jit(function)(jnp.ones(3)).block_until_ready()
    return any("cache" in name for name in set(os.listdir(sys.argv[1])) - before)


if sys.argv[2] == "first":
    jax.config.update("jax_enable_compilation_cache", False)
    os.makedirs(sys.argv[1])
else:
    assert kept(lambda x: x * 2)
    jax.config.update("jax_enable_compilation_cache", False)
print("kept" if kept(lambda x: jnp.sin(x) * 3) else "not kept")
PY
echo "version: jax 0.10.2"
echo "expected: off before the first program: not kept; off after it: not kept"
seen="off before the first program: $("$folder/env/bin/python" "$folder/switch.py" "$folder/a" first 2>/dev/null); "
seen+="off after it: $("$folder/env/bin/python" "$folder/switch.py" "$folder/b" later 2>/dev/null)"
echo "seen: $seen"
grep -q 'first program: not kept; off after it: kept' <<<"$seen"
