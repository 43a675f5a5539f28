#!/usr/bin/env bash
# flax 0.12.8: nnx.bridge.ToLinen gives an NNX module the `init` and `apply` of Linen. Linen's apply refuses variables that lack a
# parameter or the statistics of a BatchNorm. ToLinen's makes a new module from a fixed key, copies what is there, and computes with
# random weights or untouched statistics where something is missing, without an error or a warning. 0.12.12 does the same.
# Guess written down before the run: an error names what is missing, as in Linen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import warnings

import jax
import jax.numpy as jnp
from flax import linen, nnx


class OfLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8, name="first")(x)
        return linen.Dense(3, name="last")(linen.BatchNorm(use_running_average=True, name="norm")(x))


class OfNNX(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


x = jnp.ones((2, 4))
warnings.simplefilter("error", UserWarning)
for model in (OfLinen(), nnx.bridge.ToLinen(OfNNX)):
    variables = jax.tree.map(lambda leaf: leaf + 1, model.init(jax.random.key(1), x))
    params, statistics = variables["params"], variables["batch_stats"]
    whole = model.apply(variables, x)
    without = {name: layer for name, layer in params.items() if name != "first"}
    for part in ({"params": without, "batch_stats": statistics}, {"params": params}):
        try:
            outputs = model.apply(part, x)
            print("the same" if jnp.allclose(outputs, whole) else "other outputs", end="; ")
        except Exception as error:
            print(type(error).__name__, end="; ")
PY
echo "version: flax 0.12.8, jax 0.10.2"
echo "expected: an error, four times"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "ScopeParamNotFoundError; ScopeCollectionNotFound; other outputs; other outputs; " ]]
