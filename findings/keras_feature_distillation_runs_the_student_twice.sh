#!/usr/bin/env bash
# keras 3.15.1: with FeatureDistillation of a named layer, a Distiller computes the student twice in each step, both times in training
# mode. So BatchNorm's statistics move twice: with a momentum of 0.5, three quarters of the way and not half. With LogitsDistillation,
# and in fit without a Distiller, they move once. The features come from the second pass, and its dropout is not that of the logits.
# Guess written down before the run: one pass gives the logits and the features; the statistics move once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import keras
import numpy as np
from keras.distillation import Distiller, FeatureDistillation, LogitsDistillation


def network():
    layers = [keras.layers.BatchNormalization(momentum=0.5, name="norm"), keras.layers.Dense(3, name="fc")]
    return keras.Sequential([keras.Input((4,)), *layers])


images = np.random.default_rng(0).normal(5, 1, (16, 4)).astype(np.float32)
ways = {
    "alone": None,
    "logits": LogitsDistillation(),
    "features": FeatureDistillation(teacher_layer_name="norm", student_layer_name="norm"),
}
for way, loss in ways.items():
    student = network()
    model = Distiller(network(), student, loss) if loss else student
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images, np.zeros(16), batch_size=16, epochs=1, verbose=0)
    moved = np.mean(student.get_layer("norm").moving_mean.numpy() / images.mean(0))
    print(f"{way} {moved:.2f}", end=" ")
PY
echo "version: keras 3.15.1, jax 0.10.2"
echo "expected: alone 0.50 logits 0.50 features 0.50"
seen=$(KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "alone 0.50 logits 0.50 features 0.75 " ]]
