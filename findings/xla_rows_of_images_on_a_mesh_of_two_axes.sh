#!/usr/bin/env bash
# jax 0.10.2: if images are split by rows (height) over one axis of a mesh that has a second axis, jit computes other numbers for a plain 3x3
# convolution. With two by two devices the gradient of the kernel is doubled, to the last digit, while the loss is right. If the kernel is
# split too, the loss is wrong as well. Split by examples, or by rows over a mesh of one axis, or over both axes, all is right. No error, no
# warning. 0.12.0.1 does the same.
# Guess written down before the run: where arrays lie changes the speed and the last digit, not the numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

keys = jax.random.split(jax.random.key(0), 3)
images, kernel = jax.random.normal(keys[0], (8, 8, 8, 4)), jax.random.normal(keys[1], (3, 3, 4, 8))
wanted = jax.random.normal(keys[2], (8, 8, 8, 8))


@jax.jit
@jax.value_and_grad
def step(kernel, images):
    outputs = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean((outputs - wanted) ** 2)


loss, gradient = step(kernel, images)
line, square = Mesh(np.array(jax.devices()), ("a",)), Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
whole = P()
for name, mesh, of_images, of_kernel in (
    ("examples, 4", line, P("a"), whole),
    ("rows, 4", line, P(None, "a"), whole),
    ("examples, 2x2", square, P("a"), whole),
    ("rows, 2x2", square, P(None, "a"), whole),
    ("rows by both, 2x2", square, P(None, ("a", "b")), whole),
    ("examples and kernel, 2x2", square, P("a"), P(None, None, None, "b")),
    ("rows and kernel, 2x2", square, P(None, "a"), P(None, None, None, "b")),
):
    placed = [jax.device_put(*pair) for pair in ((kernel, NamedSharding(mesh, of_kernel)), (images, NamedSharding(mesh, of_images)))]
    found_loss, found = step(*placed)
    share = float(jnp.vdot(np.asarray(found), gradient) / jnp.vdot(gradient, gradient))
    print(f"{name}: loss {float(found_loss) / float(loss):.2f}, gradient {share:.2f}")
PY
echo "version: jax 0.10.2, four devices of a CPU"
echo "expected: loss 1.00, gradient 1.00 of one device's, seven times"
seen=$(JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
for name in "examples, 4" "rows, 4" "examples, 2x2" "rows by both, 2x2" "examples and kernel, 2x2"; do
  grep -q "^$name: loss 1.00, gradient 1.00$" <<<"$seen" || exit 1
done
grep -q "^rows, 2x2: loss 1.00, gradient 2.00$" <<<"$seen"
grep "^rows and kernel, 2x2: " <<<"$seen" | grep -qv "loss 1.00"
