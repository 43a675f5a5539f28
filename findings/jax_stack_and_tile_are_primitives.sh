#!/usr/bin/env bash
# jax 0.10.2: jnp.stack, jnp.tile and jnp.unstack are primitives of their own in a jaxpr, so code that walks jaxprs and knows
# concatenate, broadcast_in_dim, slice and reshape meets names that it does not know. jnp.repeat is still made of those.
# Guess written down before the run: they are concatenate, broadcast_in_dim, slice and reshape, as jnp's other functions of shape.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/names.py" <<'PY'
import jax
import jax.numpy as jnp


def names(jaxpr):
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr")]
        if inner:
            for one in inner:
                yield from names(one.jaxpr)
        else:
            yield equation.primitive.name


functions = {
    "stack": lambda x: jnp.stack([x, x], 2),
    "tile": lambda x: jnp.tile(x, (2, 3)),
    "unstack": lambda x: jnp.unstack(x, axis=1),
    "repeat": lambda x: jnp.repeat(x, 2, axis=0),
}
for name, function in functions.items():
    print(f"{name}: {', '.join(names(jax.make_jaxpr(function)(jnp.ones((2, 4))).jaxpr))}")
PY
echo "version: jax 0.10.2"
echo "expected: stack: broadcast_in_dim and concatenate; tile: broadcast_in_dim and reshape; unstack: slice and squeeze"
seen=$("$folder/env/bin/python" "$folder/names.py" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -qx 'stack: stack' <<<"$seen" && grep -qx 'tile: tile' <<<"$seen" && grep -qx 'unstack: unstack' <<<"$seen" &&
  grep -qx 'repeat: broadcast_in_dim, reshape' <<<"$seen"
