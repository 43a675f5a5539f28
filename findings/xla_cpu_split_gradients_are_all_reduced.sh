#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1, 8 virtual devices of a CPU: the gradient of a matrix that is split over the devices, on a batch
# that is split too, is summed by an all-reduce of the whole matrix and cut after that. So every device holds it whole, and
# memory_analysis of such programs has temporaries that do not fall with the devices, where a reduce-scatter would do.
# Guess written down before the run: the program has a reduce-scatter, and no device holds the 4 MiB of the whole gradient.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
gradient = jax.grad(lambda w, x: jnp.square(x @ w).sum())
w, x = (jax.ShapeDtypeStruct((rows, 1024), jnp.float32) for rows in (1024, 4096))
program = jax.jit(gradient, in_shardings=(split, split), out_shardings=split).lower(w, x).compile()
text, memory = program.as_text(), program.memory_analysis()
print(", ".join(one for one in ("all-reduce", "reduce-scatter") if f" {one}(" in text))
print("whole gradient" if memory.temp_size_in_bytes >= 4 * w.size else "parts", "in the temporaries of a device")
PY
echo "version: jax 0.10.2, CPU"
echo "expected: reduce-scatter, parts in the temporaries"
seen=$("$folder/env/bin/python" "$folder/run.py")
echo "seen: $seen"
[ "$seen" = $'all-reduce\nwhole gradient in the temporaries of a device' ]
