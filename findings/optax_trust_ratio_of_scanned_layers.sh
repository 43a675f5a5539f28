#!/usr/bin/env bash
# optax 0.2.8 and flax 0.12.8: LAMB, LARS and Adafactor scale the update of a leaf by the size of the leaf. nn.scan keeps one weight of all
# layers in one leaf, so all layers share a ratio, which the largest determines. LAMB moves three layers with weights of 0.02, 1 and 5 by a
# tenth of their norms where they stand in a Python loop; scanned, it moves the smallest by 15 times its norm, the largest by 6 percent.
# Guess written down before the run: the same layers with the same gradients have the same updates, scanned or in a loop.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/run.py" <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

SIZES = (0.02, 1, 5)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(nn.Dense(32, use_bias=False, name="dense")(x)), None


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(len(SIZES)):
            x, _ = Layer(name=f"layer_{i}")(x)
        return x


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=len(SIZES))
        return layers(name="layers")(x, None)[0]


x = jax.random.normal(jax.random.key(0), (16, 32))
kernels = jax.vmap(lambda key, size: size * nn.initializers.lecun_normal()(key, (32, 32)))(
    jax.random.split(jax.random.key(1), len(SIZES)), jnp.array(SIZES)
)
trees = {
    Loop(): {f"layer_{i}": {"dense": {"kernel": kernel}} for i, kernel in enumerate(kernels)},
    Scanned(): {"layers": {"dense": {"kernel": kernels}}},
}
outputs = [model.apply({"params": params}, x) for model, params in trees.items()]
print("same outputs" if jnp.allclose(*outputs, atol=1e-6) else "other outputs")
optimizers = {"adam": optax.adam(0.1), "lamb": optax.lamb(0.1), "lars": optax.lars(0.1, trust_coefficient=1)}
for name, optimizer in {**optimizers, "adafactor": optax.adafactor(0.1)}.items():
    for model, params in trees.items():
        gradient = jax.grad(lambda params: jnp.mean(model.apply({"params": params}, x) ** 2))(params)
        update, _ = optimizer.update(gradient, optimizer.init(params), params)
        updates = jnp.concatenate([leaf.reshape(-1, 32, 32) for leaf in jax.tree.leaves(update)])
        moved = jnp.linalg.norm(updates, axis=(1, 2)) / jnp.linalg.norm(kernels, axis=(1, 2))
        print(f"{name}, {type(model).__name__}:", *(f"{float(one):.2f}" for one in moved))
PY
echo "version: optax 0.2.8, flax 0.12.8"
echo "expected: each optimizer moves the layers by the same shares of their norms, in a loop and scanned"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
for name in lamb lars adafactor; do grep -q "^$name, Loop: 0.10 0.10 0.10$" <<<"$seen" || exit 1; done
[[ $(grep -c "^adam, .*: 28.20 0.56 0.12$" <<<"$seen") == 2 ]]
grep -q "^lamb, Scanned: 14.80 0.29 0.06$" <<<"$seen" && grep -q "^lars, Scanned: 24.88 0.01 0.00$" <<<"$seen" && grep -q "^adafactor, Scanned: 14.37 0.29 0.06$" <<<"$seen"
