#!/usr/bin/env bash
# mlx 0.32.4: by default, group g of GroupNorm has the channels g, g + groups, g + 2 groups and so on; in PyTorch, Flax, Equinox and
# Keras it has neighbours. Gains and biases have the same names and shapes, so a network moved between them computes something else. With
# pytorch_compatible=True groups are neighbours.
# Guess written down before the run: the same numbers as of PyTorch for the same weights, as of mlx's LayerNorm and BatchNorm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat >"$folder/run.py" <<'PY'
import flax.linen
import jax
import mlx.core as mx
import mlx.nn
import numpy as np

mx.set_default_device(mx.cpu)
x = np.random.default_rng(0).normal(size=(2, 5, 5, 8)).astype(np.float32) * np.arange(1, 9, dtype=np.float32)
norm = flax.linen.GroupNorm(num_groups=4, epsilon=1e-5)
expected = np.asarray(norm.apply(norm.init(jax.random.key(0), x), x))
order = np.arange(8).reshape(2, 4).T.reshape(-1)
every_fourth = np.asarray(norm.apply(norm.init(jax.random.key(0), x), x[..., order]))[..., np.argsort(order)]
for name, options in {"by default": {}, "pytorch_compatible": {"pytorch_compatible": True}}.items():
    found = np.array(mlx.nn.GroupNorm(4, 8, **options)(mx.array(x)))
    close = {"as Flax": expected, "every fourth channel": every_fourth}
    print(name, *(how for how, values in close.items() if np.abs(found - values).max() < 1e-4), end="; ")
PY
echo "version: mlx 0.32.4"
echo "expected: by default as Flax; pytorch_compatible as Flax;"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "by default every fourth channel; pytorch_compatible as Flax; " ]]
