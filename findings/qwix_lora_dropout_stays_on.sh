#!/usr/bin/env bash
# qwix 0.1.8: `LoraProvider(dropout=...)` adds factors of LoRA to a model of Flax. Their dropout has no evaluation mode: an NNX module
# after `.eval()`, and a Linen module called with its own dropout off, draw new masks at each call. Linen's asks for a dropout key in
# evaluation; NNX's draws from its own stream, so two calls of one module on one input differ.
# Guess written down before the run: `.eval()` and the module's own switch turn it off, as in flax.nnx.Dropout.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet qwix==0.1.8 flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import qwix
from flax import linen, nnx

x = jax.random.normal(jax.random.key(0), (8, 16))
lora = qwix.LoraProvider(module_path=".*fc", rank=4, alpha=8.0, dropout=0.5)


class OfNNX(nnx.Module):
    def __init__(self, rngs):
        self.fc, self.dropout = nnx.Linear(16, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.fc(x))


class OfLinen(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.Dropout(0.5, deterministic=not train)(linen.Dense(4, name="fc")(x))


plain = OfNNX(nnx.Rngs(0))
plain.eval()
model = qwix.apply_lora_to_model(OfNNX(nnx.Rngs(0)), lora, x, rngs=nnx.Rngs(1))
model.fc.kernel_lora_b[...] = jnp.ones((4, 4))
model.set_attributes(qwix_rngs=nnx.Rngs(2))
model.eval()
print("NNX:", *("the same" if jnp.allclose(one(x), one(x)) else "other outputs" for one in (plain, model)), end="; ")

model = qwix.apply_lora_to_model(OfLinen(), lora)
variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, train=False)
variables["params"]["fc"]["kernel_lora_b"] = jnp.ones((4, 4))
try:
    model.apply(variables, x, train=False)
    print("Linen: no key needed", end="; ")
except Exception as error:
    print("Linen:", type(error).__name__, end="; ")
one, other = (model.apply(variables, x, train=False, rngs={"dropout": jax.random.key(seed)}) for seed in (2, 3))
print("the same" if jnp.allclose(one, other) else "other outputs")
PY
echo "version: qwix 0.1.8, flax 0.12.8"
echo "expected: NNX: the same the same; Linen: no key needed; the same"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "NNX: the same other outputs; Linen: InvalidRngError; other outputs" ]]
