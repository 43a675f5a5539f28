#!/usr/bin/env bash
# optax 0.2.8: adaptive_grad_clip compares norms of gradient and weights per unit. For leaves with three axes, the documentation of its
# unitwise_norm says axes (0, 1, 2); it takes axis 0 alone. So for Flax's output kernel of attention, [heads, size, width], a unit is as
# many numbers as there are heads, not heads * size, and the same layer as a dense kernel is clipped otherwise. For scanned layers
# [layers, in, out], a unit has one number of each layer, and a large gradient in one layer scales down all others.
# Guess written down before the run: the kernel of attention is clipped as the dense kernel with the same numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import numpy as np
import optax

random = np.random.default_rng(0)


def factors(kernel, gradient, **options):
    clip = optax.adaptive_grad_clip(0.01, **options)
    return np.asarray(clip.update(gradient, clip.init(kernel), kernel)[0]) / gradient


kernel, gradient = random.standard_normal((2, 32, 64)).astype(np.float32)
dense = factors(kernel, gradient)
for options in ({}, {"axis": (0, 1)}):
    attention = factors(kernel.reshape(4, 8, 64), gradient.reshape(4, 8, 64), **options).reshape(32, 64)
    print(*options, "as dense" if np.allclose(attention, dense, rtol=1e-3) else "other", end="; ")
layers, gradients = random.standard_normal((2, 6, 64, 32)).astype(np.float32)
gradients *= 1e-4
before = factors(layers, gradients)[1].mean()
gradients[0] *= 1e6
print(f"layer 1 of a scan: {before:.0e}, beside a large gradient of layer 0 {factors(layers, gradients)[1].mean():.0e}")
PY
echo "version: optax 0.2.8, jax 0.10.2"
echo "expected: as dense; axis as dense; layer 1 of a scan: 1e+00, beside a large gradient of layer 0 1e+00"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "other; axis as dense; layer 1 of a scan: 1e+00, beside a large gradient of layer 0 "*e-0* ]]
