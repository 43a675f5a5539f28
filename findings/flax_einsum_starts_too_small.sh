#!/usr/bin/env bash
# flax 0.12.8: nn.Einsum and nnx.Einsum start a kernel [inputs, heads, size] as if it were that of a convolution, whose inputs are the
# middle axis and all of the first: sqrt(heads) smaller than lecun_normal makes it in MultiHeadDotProductAttention, of the same shape.
# Guess written down before the run: both have a standard deviation of 1 / sqrt(inputs).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

inputs, heads, size = 512, 16, 32
key, x = jax.random.key(0), jnp.ones((1, 3, inputs))
equation, shape = "btd,dhk->bthk", (inputs, heads, size)
kernels = {
    "attention": nn.MultiHeadDotProductAttention(heads).init(key, x, x)["params"]["query"]["kernel"],
    "nn.Einsum": nn.Einsum(shape, equation).init(key, x)["params"]["kernel"],
    "nnx.Einsum": nnx.Einsum(equation, shape, rngs=nnx.Rngs(0)).kernel[...],
}
print(", ".join(f"{name} {float(kernel.std()) * inputs**0.5:.2f}" for name, kernel in kernels.items()))
PY
echo "version: flax 0.12.8"
echo "expected: attention 1.00, nn.Einsum 1.00, nnx.Einsum 1.00 (of 1 / sqrt(inputs))"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "attention 1.00, nn.Einsum 0.25, nnx.Einsum 0.25" ]]
