#!/usr/bin/env bash
# jax 0.10.2: jax.scipy.linalg.polar says that its first factor has orthonormal columns. With its default method, qdwh, a column of zeros in
# the matrix stays a column of zeros. The rotation that fits one layer's features to another's (Procrustes) is this factor of their product,
# which has such columns where a ReLU of the second layer is dead. So it deletes directions of the first layer. A row of zeros does no harm,
# nor does method="svd", and SciPy's factor is orthogonal in each case. 0.12.0.1 does the same.
# Guess written down before the run: all singular values of the factor are 1, whichever channels are dead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5 scipy==1.16.3
cat >"$folder/run.py" <<'PY'
import jax.scipy.linalg
import numpy as np
import scipy.linalg

random = np.random.default_rng(0)
first = random.standard_normal((500, 8), np.float32)
second = np.maximum(first @ np.linalg.qr(random.standard_normal((8, 8)))[0].astype(np.float32), 0)
for dead, features, others in (
    ("none", first, second),
    ("two of the first", first * (np.arange(8) > 1), second),
    ("two of the second", first, second * (np.arange(8) > 1)),
):
    product = features.T @ others
    for name, factor in (
        ("jax", jax.scipy.linalg.polar(product)[0]),
        ("jax, svd", jax.scipy.linalg.polar(product, method="svd")[0]),
        ("scipy", scipy.linalg.polar(product)[0]),
    ):
        sizes = np.linalg.svd(np.asarray(factor), compute_uv=False)
        print(f"dead: {dead}; {name}:", *(f"{one:.0f}" for one in sizes))
PY
echo "version: jax 0.10.2, scipy 1.16.3"
echo "expected: 1 1 1 1 1 1 1 1 in all nine"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
[[ $(grep -c ": 1 1 1 1 1 1 1 1$" <<<"$seen") == 8 ]]
grep -q "^dead: two of the second; jax: 1 1 1 1 1 1 0 0$" <<<"$seen"
