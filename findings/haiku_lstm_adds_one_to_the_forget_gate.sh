#!/usr/bin/env bash
# dm-haiku 0.0.17: hk.LSTM adds 1 to the forget gate's input at every step. The documented equations do not have it; the note on them speaks
# of 1 added to the bias "after initialization". But the bias starts at 0, and neither the parameters nor a file of them has this 1. So
# the same four blocks in Flax's cell (or PyTorch's, Keras's) compute something else, until 1 is added to the block of the forget gate.
# The blocks are ordered i, g, f, o.
# Guess written down before the run: no constant, and a bias that starts at 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet dm-haiku==0.0.17 flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import flax.linen as nn
import haiku as hk
import jax
import numpy as np

rng = np.random.default_rng(0)
x, hidden, cell = (rng.normal(size=(5, size)).astype(np.float32) for size in (2, 3, 3))
core = hk.without_apply_rng(hk.transform(lambda x, state: hk.LSTM(3)(x, state)))
state = hk.LSTMState(hidden, cell)
start = core.init(jax.random.key(0), x, state)["lstm/linear"]["b"]
params = {"w": rng.normal(size=(5, 12)).astype(np.float32), "b": rng.normal(size=12).astype(np.float32)}
expected, _ = core.apply({"lstm/linear": params}, x, state)


def flax_cell(added):
    tree = {}
    for name, weight, bias in zip("igfo", np.split(params["w"], 4, axis=1), np.split(params["b"], 4)):
        tree[f"i{name}"] = {"kernel": weight[:2]}
        tree[f"h{name}"] = {"kernel": weight[2:], "bias": bias + (added if name == "f" else 0)}
    _, output = nn.OptimizedLSTMCell(3).apply({"params": tree}, (cell, hidden), x)
    return "same" if np.allclose(output, expected, atol=1e-5) else "different"


print(f"bias starts at {set(np.asarray(start).tolist())}; Flax {flax_cell(0)}, with 1 added {flax_cell(1)}")
PY
echo "version: dm-haiku 0.0.17, flax 0.12.8, jax 0.10.2"
echo "expected: bias starts at {0.0, 1.0}; Flax same, with 1 added different"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "bias starts at {0.0}; Flax different, with 1 added same" ]]
