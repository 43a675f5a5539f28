#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2 (0.12.12 with 0.12.0.1 too), on a CPU: nn.Embed(dtype=bfloat16) has a table in float32, but the gradient
# of a row is summed in bfloat16, one use after the other. From 256 equal contributions on, a further one is lost. So the row of a
# frequent token, such as [CLS] in a batch of 1,000 texts, gets a quarter of its gradient. Dense and LayerNorm of the same dtype sum in
# float32.
# Guess written down before the run: 1000 for both, as gradients of a Dense layer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat >"$folder/run.py" <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp

USES = 1000


def largest(layer, x):
    variables = layer.init(jax.random.key(0), x)
    loss = lambda variables: layer.apply(variables, x).astype(jnp.float32).sum()
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(variables)))


tokens, ones = jnp.zeros(USES, jnp.int32), jnp.ones((USES, 1))
found = {"float32 Embed": largest(nn.Embed(2, 4), tokens), "bfloat16 Embed": largest(nn.Embed(2, 4, dtype=jnp.bfloat16), tokens)}
found["bfloat16 Dense"] = largest(nn.Dense(4, dtype=jnp.bfloat16), ones)
print("; ".join(f"{name} {value:.0f}" for name, value in found.items()))
PY
echo "version: flax 0.12.8, jax 0.10.2"
echo "expected: float32 Embed 1000; bfloat16 Embed 1000; bfloat16 Dense 1000"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "float32 Embed 1000; bfloat16 Embed 256; bfloat16 Dense 1000" ]]
