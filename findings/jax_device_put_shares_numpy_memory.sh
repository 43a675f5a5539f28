#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1 on a CPU: device_put(x, may_alias=False) of a NumPy array whose memory starts at a multiple of 64
# bytes shares that memory all the same, where its documentation says that x is copied. Of a JAX array it is a copy.
# Guess written down before the run: what is written into the NumPy array afterwards does not reach the JAX array.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import jax
import numpy as np

raw = np.zeros(64 * 64 * 4 + 64, np.uint8)
start = -raw.ctypes.data % 64
own = raw[start : start + 64 * 64 * 4].view(np.float32).reshape(64, 64)
put = jax.block_until_ready(jax.device_put(own, may_alias=False))
copied = jax.block_until_ready(jax.numpy.array(own, copy=True))
own[0, 0] = 5.0
print("device_put:", float(put[0, 0]), "jnp.array:", float(copied[0, 0]))
again = jax.device_put(copied, may_alias=False)
print("of a JAX array:", "shared" if again.unsafe_buffer_pointer() == copied.unsafe_buffer_pointer() else "copied")
PY
echo "version: jax 0.10.2, CPU"
echo "expected: 0.0 of both"
seen=$("$folder/env/bin/python" "$folder/run.py")
echo "seen: $seen"
[ "$seen" = $'device_put: 5.0 jnp.array: 0.0\nof a JAX array: copied' ]
