#!/usr/bin/env bash
# jax 0.10.2: a persistent compilation cache that was written without a size bound stops taking entries once it has one.
# Guess written down before the run: old entries are evicted or ignored, new ones are written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 filelock==4.3.1
cat >"$folder/compile.py" <<'PY'
import sys
import jax

size, bound = int(sys.argv[1]), int(sys.argv[2])
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_compilation_cache_max_size", bound)
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((size, size))).block_until_ready()
PY
run() { "$folder/env/bin/python" "$folder/compile.py" "$1" "$2" "$folder/cache" 2>&1; }
entries() { find "$folder/cache" -name '*-cache' | wc -l; }

run 8 -1 >/dev/null
before=$(entries)
said=$(run 16 100000000)
after=$(entries)
echo "version: jax 0.10.2"
echo "expected: the bounded run adds entries to the $before of the unbounded one"
echo "seen: $after entries after it; it says: $(grep -o 'FileNotFoundError.*atime' <<<"$said" | head -1 | sed "s|$folder/||")"
[ "$before" -gt 0 ] && [ "$after" -eq "$before" ] && grep -q 'FileNotFoundError' <<<"$said"
