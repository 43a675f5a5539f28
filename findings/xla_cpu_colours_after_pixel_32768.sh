#!/usr/bin/env bash
# jax 0.10.2 on a CPU: a vmap over more than 32,768 rows that multiplies each by a 3x3 (or 2x3) matrix and then reduces the product to one
# number is wrong from row 32,768 on, if it is compiled: a row's maximum, sum of squares or norm is that of another row. A colour matrix over
# the pixels of an image of 200x200 is such a program. With 182x180 pixels it is right, and so are the same values without jit, and two
# programs of 20,000 rows. https://github.com/jax-ml/jax/issues/39103; 0.12.0.1 is right.
# Guess written down before the run: jit changes the last digits at most, at any number of rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp

matrix = jnp.array([[0.4, 0.3, 0.3], [0.2, 0.7, 0.1], [0.0, 0.1, 0.9]])


def brightest(image):
    return jax.vmap(lambda pixel: jnp.max(matrix @ pixel))(image.reshape(-1, 3))


for height, width in ((180, 182), (200, 200)):
    image = jax.random.uniform(jax.random.key(0), (height, width, 3))
    wrong = jnp.abs(jax.jit(brightest)(image) - brightest(image)) > 1e-3
    first = int(jnp.argmax(wrong)) if wrong.any() else "none"
    print(f"{height}x{width}: first wrong pixel {first}, more than 5,000 wrong: {bool(wrong.sum() > 5000)}")
PY
echo "version: jax 0.10.2 on a CPU"
echo "expected: no wrong pixel in either"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q "^180x182: first wrong pixel none, more than 5,000 wrong: False$" <<<"$seen"
grep -q "^200x200: first wrong pixel 32768, more than 5,000 wrong: True$" <<<"$seen"
