#!/usr/bin/env bash
# optax 0.2.8: inject_hyperparams keeps a rate in the type of the parameters, and Adam's bias correction of bfloat16 is 0 / 0.
# Guess written down before the run: an optimizer with an injected rate makes the update that the plain one makes, up to rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/run.py" <<'PY'
import jax.numpy as jnp
import numpy as np
import optax

params, gradient = {"w": jnp.ones(3, jnp.bfloat16)}, {"w": jnp.full(3, 0.5, jnp.bfloat16)}
for name, optimizer in (("plain", optax.adam(1e-2)), ("injected", optax.inject_hyperparams(optax.adam)(1e-2))):
    update, _ = optimizer.update(gradient, optimizer.init(params), params)
    print(f"{name}:", np.asarray(update["w"], np.float32).round(3).tolist())
PY
echo "version: optax 0.2.8, jax 0.10.2"
echo "expected: about -0.01 of both, since the gradient is finite"
seen=$("$folder/env/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q '^plain: \[-0.01' <<<"$seen" && grep -q '^injected: \[nan, nan, nan\]' <<<"$seen"
