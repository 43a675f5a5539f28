#!/usr/bin/env bash
# flax 0.12.8, jax 0.10.2: a model that nnx.merge makes of the states of nnx.split shares its variables with them, and with the model that was
# split. So a call in training writes BatchNorm's statistics and the counters of random streams into the states that were passed. Under
# jax.jit, the same function leaves them as they are. The same with flax 0.12.12 and jax 0.12; nnx.merge(..., copy=True) copies.
# Guess written down before the run: the states are values, which a call of the merged model does not change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
from flax import nnx

graph, params, stats = nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
before, x = jnp.array(stats["mean"][...]), 5 + jax.random.normal(jax.random.key(0), (8, 3))


def apply(params, stats, x):
    return nnx.merge(graph, params, stats)(x)


for name, function in (("jitted", jax.jit(apply)), ("not jitted", apply)):
    function(params, stats, x)
    print(f"{name}: mean {'as before' if jnp.array_equal(stats['mean'][...], before) else 'another'}", end="; ")
PY
echo "version: flax 0.12.8, jax 0.10.2"
echo "expected: jitted: mean as before; not jitted: mean as before;"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "jitted: mean as before; not jitted: mean another; " ]]
