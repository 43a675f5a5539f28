#!/usr/bin/env bash
# numpy 2.3.5 with ml_dtypes 0.5.4: np.mean and np.sum of a bfloat16 array, such as jax.device_get gives of losses, add in bfloat16, one number
# after another. From 256 equal numbers on, a further one is lost: 10,000 correct answers have the accuracy 0.026. NumPy adds its own
# float16 in float32 for a mean, and its products (x @ y) of bfloat16 are not affected. mean(dtype=np.float32) is right.
# Guess written down before the run: 1.0 in both, since a mean of halves is computed in float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5 ml_dtypes==0.5.4
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

for dtype in (jnp.float16, jnp.bfloat16):
    right = jnp.ones(10_000, dtype)
    here = jax.device_get(right)
    means = {"jnp.mean": right.mean(), "np.mean": here.mean(), "with dtype": here.mean(dtype=np.float32)}
    print(dtype.__name__, ", ".join(f"{name} {float(value):.3f}" for name, value in means.items()), end="; ")
PY
echo "version: numpy 2.3.5, ml_dtypes 0.5.4, jax 0.10.2"
echo "expected: float16 jnp.mean 1.000, np.mean 1.000, with dtype 1.000; bfloat16 jnp.mean 1.000, np.mean 1.000, with dtype 1.000; "
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
bfloat16="bfloat16 jnp.mean 1.000, np.mean 0.026, with dtype 1.000"
[[ $seen == "float16 jnp.mean 1.000, np.mean 1.000, with dtype 1.000; $bfloat16; " ]]
