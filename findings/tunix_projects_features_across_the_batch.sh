#!/usr/bin/env bash
# google-tunix 0.1.7: the feature projection of its distillation maps a student's layers to a teacher's. Its one matrix maps all of
# the stacked features `[layers, batch, ...]` to all of the teacher's, the batch included: a changed example changes the projection of
# every other, the size grows with the square of the batch, and a batch of another size, such as a last one, fails.
# Guess written down before the run: a dense layer on the channels, `[4, 8]`, one example at a time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet google-tunix==0.1.7 qwix==0.1.8 flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
from flax import nnx
from tunix.distillation import feature_extraction


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.fc = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.fc(x))


class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.first, self.block, self.last = nnx.Linear(5, width, rngs=rngs), Block(width, rngs), nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.block(self.first(x)))


x = jax.random.normal(jax.random.key(0), (6, 5))
student, teacher = Net(4, nnx.Rngs(0)), Net(8, nnx.Rngs(1))
both, _ = feature_extraction.setup_models_with_feature_projection(
    student, teacher, Block, Block, {"x": x}, {"x": x}, rngs=nnx.Rngs(2)
)
print("kernel", list(both.projection_layer.kernel.shape), end="; ")
(_, projected), (_, changed) = both(x), both(x.at[0].add(1.0))
print("examples that change with the first:", int((jnp.abs(projected - changed).max((0, 2)) > 1e-6).sum()), end="; ")
try:
    both(x[:3])
    print("half a batch: projected")
except TypeError:
    print("half a batch: TypeError")
PY
echo "version: google-tunix 0.1.7, flax 0.12.8"
echo "expected: kernel [4, 8]; examples that change with the first: 1; half a batch: projected"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "kernel [1, 6, 4, 1, 6, 8]; examples that change with the first: 6; half a batch: TypeError" ]]
