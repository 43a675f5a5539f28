#!/usr/bin/env bash
# jax 0.10.2 on a CPU: the gradient of a convolution's kernel takes tens of times longer inside a compiled loop than outside.
# Guess written down before the run: the same operation takes the same time, whatever stands around it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/time.py" <<'PY'
import time
import jax
import jax.numpy as jnp
from jax import lax

x = jax.random.normal(jax.random.key(0), (32, 16, 16, 128))
kernel = jax.random.normal(jax.random.key(1), (3, 3, 128, 128))

def convolve(kernel, x):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

def gradient(x):
    return jax.vjp(lambda kernel: convolve(kernel, x), kernel)[1](x)[0]

def loop(x):
    return lax.fori_loop(0, 1, lambda _, total: total + jnp.sum(gradient(x + 0 * total)), jnp.float32(0))

def seconds(function):
    compiled = jax.jit(function).lower(x).compile()
    jax.block_until_ready(compiled(x))
    start = time.perf_counter()
    jax.block_until_ready(compiled(x))
    return time.perf_counter() - start

outside, inside = seconds(gradient), seconds(lambda x: loop(x))
print(f"{outside * 1e3:.0f} ms outside of a loop, {inside * 1e3:.0f} ms inside: {inside / outside:.0f} times")
raise SystemExit(inside < 10 * outside)
PY
echo "version: jax 0.10.2, CPU"
echo "expected: about the same time"
echo -n "seen: "
"$folder/env/bin/python" "$folder/time.py"
