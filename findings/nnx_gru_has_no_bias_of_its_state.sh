#!/usr/bin/env bash
# flax 0.12.8: GRUCell of NNX has no bias on the side of its state. That of Linen has one in its candidate (hn), which the reset gate
# multiplies, as PyTorch's has. So weights of these do not fit a cell of NNX: without that bias, or with it added to the other one, it computes
# something else. All other leaves have a counterpart. 0.12.12 does the same.
# Guess written down before the run: the cell of NNX has the parameters of Linen's, joined, and computes the same from them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

state, x = jax.random.normal(jax.random.key(0), (1, 4)), jax.random.normal(jax.random.key(1), (1, 3))
linen = nn.GRUCell(4)
params = linen.init(jax.random.key(2), state, x)["params"]
ours = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
shapes = {name: layer["bias"].shape for name, layer in params.items() if "bias" in layer}
print("biases of Linen:", *(f"{name} {shape[0]}" for name, shape in sorted(shapes.items())))
biases = [path for path, _ in nnx.to_flat_state(nnx.state(ours, nnx.Param)) if path[-1] == "bias"]
print("biases of NNX:", *("/".join(path) for path in biases))
for side in ("i", "h"):
    layer = getattr(ours, f"dense_{side}")
    layer.kernel[...] = jnp.concatenate([params[f"{side}{gate}"]["kernel"] for gate in "rzn"], axis=1)
for value in (0.0, 0.5):
    params["hn"]["bias"] = jnp.full(4, value)
    expected = linen.apply({"params": params}, state, x)[1]
    for name, added in (("left out", 0.0), ("added to the other bias", value)):
        others = [params[f"i{gate}"]["bias"] for gate in "rzn"]
        others[2] = others[2] + added
        ours.dense_i.bias[...] = jnp.concatenate(others)
        print(f"hn bias {value}, {name}: difference {float(jnp.abs(ours(state, x)[1] - expected).max()):.2f}")
PY
echo "version: flax 0.12.8, jax 0.10.2"
echo "expected: the same biases, difference 0.00"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q "^biases of Linen: hn 4 in 4 ir 4 iz 4$" <<<"$seen" && grep -q "^biases of NNX: dense_i/bias$" <<<"$seen"
grep -q "^hn bias 0.0, left out: difference 0.00$" <<<"$seen"
grep -q "^hn bias 0.5, left out: difference 0.12$" <<<"$seen" && grep -q "^hn bias 0.5, added to the other bias: difference 0.31$" <<<"$seen"
