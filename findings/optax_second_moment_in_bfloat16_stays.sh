#!/usr/bin/env bash
# optax 0.2.8: Adam keeps its second moment in the type of the parameters. In bfloat16 it stops half-way up, and never falls again: a
# thousandth of it, which it loses at a step, is less than half of its last digit. So once gradients are a hundredth of what they were,
# updates are a hundredth as well, for good, where Adam's do not depend on the size of gradients. mu_dtype is of the first moment alone.
# Guess written down before the first run: moments are kept in float32, so that the second one follows within 10,000 steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import optax

for dtype in (jnp.float32, jnp.bfloat16):
    optimizer, params = optax.adam(1e-3, mu_dtype=jnp.float32), {"w": jnp.zeros(1, dtype)}

    def after(state, gradient, steps):
        step = lambda _, state: optimizer.update({"w": jnp.full(1, gradient, dtype)}, state, params)[1]
        return jax.lax.fori_loop(0, steps, step, state)

    state = after(optimizer.init(params), 1.0, 5_000)
    state = after(state, 0.01, 20_000)
    update, _ = optimizer.update({"w": jnp.full(1, 0.01, dtype)}, state, params)
    share = abs(float(update["w"][0])) / 1e-3
    moment = float(state[0].nu["w"][0])
    print(f"{dtype.__name__}: an update of {'the rate' if share > 0.9 else 'less than a fiftieth of the rate' if share < 0.02 else share}"
          f" (second moment {moment:.1g} for squares of 1e-04)")
PY
echo "version: optax 0.2.8"
echo "expected: an update of the rate in both"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q "^float32: an update of the rate " <<<"$seen" && grep -q "^bfloat16: an update of less than a fiftieth of the rate " <<<"$seen"
