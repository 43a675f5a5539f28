#!/usr/bin/env bash
# jax 0.10.2: in a shard_map with its default checks, jax.grad of parameters that all devices share gives the sum over the devices already,
# the same on each, and lax.pmean of that sum is the sum. So a step from pmap, which averages its gradients, takes steps that are larger
# by the number of devices. With check_vma=False, and in pmap, each device has its own gradient. So it has with checks, if the parameters
# were marked by lax.pcast(params, axis, to="varying"). 0.12.0.1 does the same.
# Guess written down before the run: jax.grad gives each device the gradient of its own batch, and pmean their mean, as in pmap.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

mesh, batch, w = Mesh(np.array(jax.devices()), ("data",)), jnp.arange(8.0), jnp.float32(1)
gradient = jax.grad(lambda w, x: jnp.mean(w * x))


def averaged(w, x):
    return lax.pmean(gradient(w, x), "data")


def marked(w, x):
    return averaged(lax.pcast(w, "data", to="varying"), x)


options = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P()}
found = {
    "one device": gradient(w, batch),
    "pmap": jax.pmap(averaged, "data", in_axes=(None, 0))(w, batch.reshape(4, 2))[0],
    "shard_map": jax.shard_map(averaged, **options)(w, batch),
    "without checks": jax.shard_map(averaged, check_vma=False, **options)(w, batch),
    "marked": jax.shard_map(marked, **options)(w, batch),
}
print(", ".join(f"{name} {float(value):.1f}" for name, value in found.items()))
PY
echo "version: jax 0.10.2, four devices of a CPU"
echo "expected: one device 3.5, pmap 3.5, shard_map 3.5, without checks 3.5, marked 3.5"
seen=$(JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "one device 3.5, pmap 3.5, shard_map 14.0, without checks 3.5, marked 3.5" ]]
