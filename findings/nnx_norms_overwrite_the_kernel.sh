#!/usr/bin/env bash
# flax 0.12.8, jax 0.10.2: SpectralNorm and WeightNorm of NNX write the kernel that they compute with into the layer that they wrap, at every
# call, in evaluation (update_stats=False) too. So a model that was called once has other parameters than those that were loaded into it, and
# a kernel under WeightNorm has its scale already, which is stored beside it. The wrappers of Linen, which have the same names, leave the
# kernel as it is. The same with flax 0.12.12 and jax 0.12.
# Guess written down before the run: both keep the kernel, and divide where it is used.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

kernel, x = 5 * jax.random.normal(jax.random.key(0), (3, 4)), jnp.ones((2, 3))
for name, options in (("SpectralNorm", {"update_stats": False}), ("WeightNorm", {})):
    module = getattr(nn, name)(nn.Dense(4, use_bias=False))
    variables = module.init(jax.random.key(1), x, **options)
    variables["params"]["layer_instance"]["kernel"] = kernel
    _, changed = module.apply(variables, x, mutable=["batch_stats"], **options)
    of_linen = {**variables, **changed}["params"]["layer_instance"]["kernel"]
    layer = nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = kernel
    getattr(nnx, name)(layer, rngs=nnx.Rngs(1))(x, **options)
    for library, found in (("Linen", of_linen), ("NNX", layer.kernel[...])):
        print(f"{name} of {library}: kernel {'as loaded' if jnp.allclose(found, kernel) else 'overwritten'}", end="; ")
PY
echo "version: flax 0.12.8, jax 0.10.2"
echo "expected: SpectralNorm of Linen: kernel as loaded; SpectralNorm of NNX: kernel as loaded;" \
  "WeightNorm of Linen: kernel as loaded; WeightNorm of NNX: kernel as loaded;"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "SpectralNorm of Linen: kernel as loaded; SpectralNorm of NNX: kernel overwritten; \
WeightNorm of Linen: kernel as loaded; WeightNorm of NNX: kernel overwritten; " ]]
