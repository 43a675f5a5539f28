#!/usr/bin/env bash
# optax 0.2.8: what is written into the parameters between two steps is gone after one step of COCOB or a schedule-free optimizer,
# since each computes the new parameters from a copy of its own and returns the difference.
# Guess written down before the run: an update is added to the parameters that are given, so a small step keeps what was written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import optax
from optax import contrib

loss = lambda w: jnp.sum((w - 0.5) ** 2)
made = {"sgd": optax.sgd(1e-2), "cocob": contrib.cocob(), "schedule_free_sgd": contrib.schedule_free_sgd(1e-2)}
for name, optimizer in made.items():
    state, written = optimizer.init(jnp.ones(3)), jnp.full(3, 10.0)  # From another network, between two steps.
    update, _ = optimizer.update(jax.grad(loss)(written), state, written)
    print(f"{name}: {float(optax.apply_updates(written, update)[0]):.2f}")
PY
echo "version: optax 0.2.8, jax 0.10.2"
echo "expected: near 10, where the parameters were written to"
seen=$("$folder/env/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q '^sgd: 9.81' <<<"$seen" && grep -qE '^cocob: (0|1)\.' <<<"$seen" && grep -qE '^schedule_free_sgd: (0|1)\.' <<<"$seen"
