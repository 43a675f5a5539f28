#!/usr/bin/env bash
# keras 3.15.1: LogitsDistillation() says that its loss is "kl_divergence" of softened probabilities. Softmax and the factor T^2 are there
# for an instance of KLDivergence alone; the name, which is the default, gives a function. So the loss compares logits clipped to
# [1e-7, 1], and a constant added to the teacher's logits changes it. CategoricalCrossentropy(from_logits=True), an example of its
# documentation, takes the teacher's logits as probabilities, and is below 0 for a student that agrees.
# Guess written down before the run: T^2 KL of the two softmaxes, whichever way the loss is named; cross entropy at least 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import keras
import numpy as np
from keras.distillation import LogitsDistillation


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


teacher = np.array([[3, -2, -1], [0, 1, -4]], np.float32)
student = np.array([[-3, 2, 1], [-1, -1, 4]], np.float32)
first, second = softmax(teacher / 3), softmax(student / 3)
print(f"by hand {9 * np.mean((first * np.log(first / second)).sum(-1)):.2f}")
losses = {
    "default": LogitsDistillation(temperature=3.0),
    "KLDivergence()": LogitsDistillation(3.0, keras.losses.KLDivergence()),
    "cross entropy": LogitsDistillation(3.0, keras.losses.CategoricalCrossentropy(from_logits=True)),
}
for name, loss in losses.items():
    pairs = {"": (teacher, student), "teacher + 5": (teacher + 5, student), "student = teacher": (teacher, teacher)}
    print(f"{name}:", ", ".join(f"{pair} {float(loss.compute_loss(*both)):.2f}".strip() for pair, both in pairs.items()))
PY
echo "version: keras 3.15.1"
echo "expected: by hand, default and KLDivergence() are 8.58, also for teacher + 5; cross entropy is above 0"
seen=$(KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
[[ $seen == "by hand 8.58
default: 10.56, teacher + 5 24.75, student = teacher 0.00
KLDivergence(): 8.58, teacher + 5 8.58, student = teacher 0.00
cross entropy: 0.90, teacher + 5 7.75, student = teacher -2.21" ]]
