#!/usr/bin/env bash
# flax 0.12.8: BatchNorm with a mask and an axis_name first averages the examples of each device, then the devices, whatever number of
# examples each has. If the last batch of an epoch is padded, the few examples on the last device count as much as the many on each other
# one, so the statistics are not those of the batch. A device that has only padding makes mean and variance NaN on all. BatchNorm of NNX
# does the same; 0.12.12 too.
# Guess written down before the run: with axis_name, the statistics are those of the examples of all devices that the mask keeps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ("data",))
inputs = jnp.arange(16.0)[:, None]


def of_linen(inputs, mask, axis_name):
    norm = nn.BatchNorm(use_running_average=False, momentum=0, axis_name=axis_name)
    _, changed = norm.init_with_output(jax.random.key(0), inputs, mask=mask)
    _, changed = norm.apply(changed, inputs, mask=mask, mutable=["batch_stats"])
    return changed["batch_stats"]["mean"][0], changed["batch_stats"]["var"][0]


def of_nnx(inputs, mask, axis_name):
    norm = nnx.BatchNorm(1, momentum=0, axis_name=axis_name, rngs=nnx.Rngs(0))
    norm(inputs, mask=mask)
    return norm.mean[0], norm.var[0]


for library, statistics in (("linen", of_linen), ("nnx", of_nnx)):
    for examples in (16, 13, 12):
        mask = jnp.arange(16)[:, None] < examples
        one = statistics(inputs, mask, None)
        many = jax.shard_map(
            lambda inputs, mask: statistics(inputs, mask, "data"), mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P(), check_vma=False
        )(inputs, mask)
        print(f"{library}, {examples} of 16:", *(f"{float(value):.2f}" for value in (*one, *many)))
PY
echo "version: flax 0.12.8, jax 0.10.2, four devices of a CPU"
echo "expected: mean and variance of one device and of four are the same: 7.50 21.25 with 16 examples, 6.00 14.00 with 13, 5.50 11.92 with 12"
seen=$(JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
for library in linen nnx; do
  grep -q "^$library, 16 of 16: 7.50 21.25 7.50 21.25$" <<<"$seen" || exit 1
  grep -q "^$library, 13 of 16: 6.00 14.00 7.12 16.86$" <<<"$seen" || exit 1
  grep -q "^$library, 12 of 16: 5.50 11.92 nan nan$" <<<"$seen" || exit 1
done
