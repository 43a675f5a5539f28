#!/usr/bin/env bash
# jax 0.10.2: `jax.make_mesh` makes axes of the type Explicit, `jax.sharding.Mesh` of the same devices makes Auto. Under the first, what
# the compiler would split on its own is an error while tracing: rows of a split array that are taken by indices.
# Guess written down before the run: both are Auto, and take the rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def outcome(mesh):
    rows = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))
    try:
        return jax.jit(lambda rows, indices: rows[indices])(rows, np.array([5, 1])).tolist()
    except Exception as error:
        return type(error).__name__


for name, mesh in {"make_mesh": jax.make_mesh((2,), ("data",)), "Mesh": Mesh(np.array(jax.devices()), ("data",))}.items():
    print(f"{name} {mesh.axis_types[0].name}: {outcome(mesh)}")
PY
echo "version: jax 0.10.2"
echo "expected: make_mesh Auto: [5.0, 1.0]; Mesh Auto: [5.0, 1.0]"
seen=$(XLA_FLAGS=--xla_force_host_platform_device_count=2 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null | paste -sd ';')
echo "seen: ${seen//;/; }"
[[ $seen == "make_mesh Explicit: ShardingTypeError;Mesh Auto: [5.0, 1.0]" ]]
