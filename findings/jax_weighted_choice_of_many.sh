#!/usr/bin/env bash
# jax 0.10.2: jax.random.choice with weights draws one float32 number, which has 2^23 values, and looks it up among sums of weights. Of
# 2^24 examples of equal weight it draws those of odd index alone; of ten million, a sixth is never drawn. Without weights all are.
# Guess written down before the run: each half of the examples is drawn as often.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

count, key = 2**24, jax.random.key(0)
for name, weights in (("equal weights", jnp.full((count,), 1 / count)), ("no weights", None)):
    drawn = np.asarray(jax.random.choice(key, count, (100_000,), p=weights))
    print(f"{name}: {(drawn % 2).mean():.0%} of odd index")
PY
echo "version: jax 0.10.2"
echo "expected: equal weights: 50% of odd index; no weights: 50% of odd index"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null | paste -sd ';')
echo "seen: ${seen//;/; }"
[[ $seen == "equal weights: 100% of odd index;no weights: 50% of odd index" ]]
