#!/usr/bin/env bash
# flax 0.12.8: nnx.update writes arrays of any shape into a model, and names that the model does not have, without a message. Linen raises
# an error for both when the model is applied. So with a file of another size, or with a slip in a name, a model of NNX still runs: a kernel
# of one column stands for all columns by broadcasting, and under a wrong name the random weights stay in use. 0.12.12 does the same.
# Guess written down before the run: update refuses what does not fit the variables of the model, as Linen does.
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

x = jax.random.normal(jax.random.key(0), (2, 5, 3))
for name, key, kernel in (
    ("as made", "kernel", jnp.ones((3, 4))),
    ("one column", "kernel", jnp.ones((3, 1))),
    ("another name", "weight", jnp.ones((3, 4))),
):
    params = nn.Dense(4).init(jax.random.key(1), x)["params"]
    found = {}
    try:
        found["Linen"] = nn.Dense(4).apply({"params": {"bias": params["bias"], key: kernel}}, x).shape
    except Exception as error:
        found["Linen"] = type(error).__name__
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    before = layer(x)
    try:
        nnx.update(layer, {key: kernel})
        outputs = layer(x)
        same = outputs.shape == before.shape and bool((outputs == before).all())
        found["NNX"] = f"{outputs.shape}{' as before' if same else ''}"
    except Exception as error:
        found["NNX"] = type(error).__name__
    print(f"{name}:", *(f"{library} {value};" for library, value in found.items()))
PY
echo "version: flax 0.12.8, jax 0.10.2"
echo "expected: as made: (2, 5, 4) from both; errors from both for one column and for another name"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q "^as made: Linen (2, 5, 4); NNX (2, 5, 4);$" <<<"$seen"
grep -q "^one column: Linen ScopeParamShapeError; NNX (2, 5, 4);$" <<<"$seen"
grep -q "^another name: Linen ScopeParamNotFoundError; NNX (2, 5, 4) as before;$" <<<"$seen"
