#!/usr/bin/env bash
# optax 0.2.8: PyTorch's and Hugging Face's label -100 means "not this token". In softmax_cross_entropy_with_integer_labels it is the
# 100th class from the end: with a vocabulary of 300, padding is learned as word 200, with a usual loss. With fewer than 100 classes
# the loss is NaN and the gradient finite: it lowers the logits by their softmax, and a check of gradients alone sees nothing.
# Guess written down before the run: NaN or an error, for any number of classes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
import optax

for classes in (300, 50):
    loss = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, jnp.int32(-100))
    value, gradient = jax.value_and_grad(loss)(jnp.zeros(classes))
    pulled = np.flatnonzero(np.asarray(gradient) < 0)
    print(
        f"{classes} classes: loss {value:.2f}, gradient {'finite' if np.isfinite(gradient).all() else 'not finite'},",
        "toward class" if len(pulled) else "toward none",
        *pulled,
        end="; ",
    )
PY
echo "version: optax 0.2.8, jax 0.10.2"
echo "expected: loss nan for both"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "300 classes: loss 5.70, gradient finite, toward class 200; 50 classes: loss nan, gradient finite, toward none; " ]]
