#!/usr/bin/env bash
# optax 0.2.8 and flax 0.12.8: contrib.muon orthogonalises each leaf with two axes, and leaves all others to Adam. In a transformer of Flax,
# that is the wrong way round. Kernels of attention are [width, heads, size], so Adam gets them. Their biases are [heads, size], and layers
# under nn.scan have biases and norms [layers, width], so Muon gets those. It sets the layers' rows at right angles: a norm whose gradients
# are all positive, a thousandth of those of the layer before it, moves as far, and three of its four gains move uphill. So with 0.12.12.
# Guess written down before the run: Muon gets the kernels, Adam the biases and norms, whether layers are scanned or not.
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


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(8, name="dense")(x), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = Layer(name="single")(x)
        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scanned(name="scanned")(x, None)[0]


params = Net().init(jax.random.key(0), jnp.ones((1, 3, 8)))["params"]
optimizer = optax.contrib.muon(0.1)
state = optimizer.init(params)
for part in ("muon", "adam"):
    moments = state.inner_states[part].inner_state[0].mu
    for path, leaf in jax.tree_util.tree_leaves_with_path(moments):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.split("/")[-2] in ("query", "dense", "norm"):
            print(part, name, *leaf.shape)
scale = {"scale": jnp.ones((2, 4))}
gradient = {"scale": jnp.array([[1, 1, 1, 1], [1e-3, 2e-3, 1e-3, 1e-3]])}
update, _ = optimizer.update(gradient, optimizer.init(scale), scale)
print("norms of two layers:", *(f"{float(one):.2f}" for one in update["scale"].reshape(-1)))
PY
echo "version: optax 0.2.8, flax 0.12.8"
echo "expected: muon has each kernel, adam each bias and scale; both norms move downhill (-), against their gradients"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q "^muon single/attention/query/bias 2 4$" <<<"$seen" && grep -q "^adam single/attention/query/kernel 8 2 4$" <<<"$seen"
grep -q "^muon scanned/norm/scale 2 8$" <<<"$seen" && grep -q "^adam scanned/dense/kernel 2 8 8$" <<<"$seen"
grep -q "^adam single/norm/scale 8$" <<<"$seen" && grep -q "^muon single/dense/kernel 8 8$" <<<"$seen"
grep -q "^norms of two layers: -0.05 -0.05 -0.05 -0.05 0.01 -0.03 0.01 0.01$" <<<"$seen"
