#!/usr/bin/env bash
# optax 0.2.8: global_norm adds the squared norms of the leaves in their own type. In bfloat16, a sum of equal leaves stops at 256 of
# them. So clip_by_global_norm does not clip gradients of 1,000 leaves, whose norm of 31.6 it takes for 16. Stacked in one leaf, the
# same numbers have the right norm.
# Guess written down before the run: 31.6 for 1,000 leaves of norm 1, to the digits of bfloat16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/run.py" <<'PY'
import jax.numpy as jnp
import optax

leaves = {f"layer_{i}": jnp.full(4, 0.5, jnp.bfloat16) for i in range(1000)}
clip = optax.clip_by_global_norm(20.0)
clipped, _ = clip.update(leaves, clip.init(leaves))
print(f"stacked {float(optax.global_norm(jnp.stack(list(leaves.values())))):.1f}", end="; ")
print(f"leaves {float(optax.global_norm(leaves)):.1f}", end="; ")
print(f"each leaf clipped to {float(clipped['layer_0'][0] / 0.5):.2f} of itself")
PY
echo "version: optax 0.2.8"
echo "expected: stacked 31.6; leaves 31.6; each leaf clipped to 0.63 of itself"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "stacked 31."*"; leaves 16.0; each leaf clipped to 1.00 of itself" ]]
