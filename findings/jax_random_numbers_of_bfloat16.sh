#!/usr/bin/env bash
# jax 0.10.2: random numbers of bfloat16 come from a uniform number of seven bits. So a million normal numbers have 128 values, none above
# 2.52, where those of float32 rounded to bfloat16 have some 3,600; the same holds for starts of a model that are drawn in bfloat16. And
# jax.random.categorical of bfloat16 logits takes the first of equal maxima: of 4,096 equal ones it never draws one of the second half.
# Expected, and for starts and draws written down before the run: float32 inside, rounded at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

key = jax.random.key(0)
start = jax.nn.initializers.lecun_normal()(key, (1000, 1000), jnp.bfloat16)
normal = jax.random.normal(key, (10**6,), jnp.bfloat16)
drawn = np.asarray(jax.random.categorical(key, jnp.zeros((4096,), jnp.bfloat16), shape=(20000,)))
values = [len(np.unique(np.asarray(array).view(np.uint16))) for array in (start, normal)]
print(f"over 1,000 values {[count > 1000 for count in values]}, a number above 4 {bool((normal > 4).any())}, half of the draws in each"
      f" half {bool(0.4 < (drawn < 2048).mean() < 0.6)}")
print(f"values {values}, largest {float(normal.max()):.2f}, draws in the first half {(drawn < 2048).mean():.0%}")
PY
echo "version: jax 0.10.2"
echo "expected: over 1,000 values [True, True], a number above 4 True, half of the draws in each half True"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
grep -qx "over 1,000 values \[False, False\], a number above 4 False, half of the draws in each half False" <<<"$seen"
