#!/usr/bin/env bash
# optax 0.2.8 and flax 0.12.8: Adafactor keeps row and column sums of a weight in place of its second moment, where its two largest axes are
# 128 or longer. A query kernel of Flax is [width, heads, size], and sizes of 32 or 64 are too short. So of attention, Adafactor keeps
# every second moment, as many numbers as Adam; PyTorch's 512x512 matrix of the same weights would take 1,024. Its MLP is factored.
# Guess written down before the run: a kernel of 512x512 numbers is factored, whatever its axes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/run.py" <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

x = jnp.ones((1, 4, 512))
layers = {"attention": nn.MultiHeadDotProductAttention(8, use_bias=False), "dense": nn.Dense(2048, use_bias=False)}
for name, layer in layers.items():
    params = jax.eval_shape(layer.init, jax.random.key(0), *[x] * (2 if name == "attention" else 1))["params"]
    state = jax.eval_shape(optax.adafactor(1e-3).init, params)
    kept, weights = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state, params))
    print(f"{name} {kept / weights:.3f}", end="; ")
PY
echo "version: optax 0.2.8, flax 0.12.8"
echo "expected: less than 0.01 numbers of the state for a weight, in both"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "attention 1.000; dense 0.002; " ]]
