"""Loss functions, teachers and evaluation for classifiers written in Linen."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.losses import cross_entropy
from merge_jax.metrics import accuracy
from merge_jax.paths import near_misses
from merge_jax.types import Batch, LossFn, ModelState, Params, TeacherFn

__all__ = [
    "ClassificationLoss",
    "classification_loss",
    "evaluate_classifier",
    "logits_teacher",
]

ModelApply = Callable[..., Any]
"""`model.apply` of a Linen module whose `__call__` takes `(inputs, train=...)` and returns logits `[B, C]`."""

ClassificationLoss = Callable[[jax.Array, Batch], jax.Array]
"""Logits `[B, C]` and their batch to losses `[B]`."""


def _entry(batch: Batch, name: str) -> jax.Array:
    if name not in batch:
        raise ValueError(f"the batch has no {name!r}; {near_misses(name, batch)} (see the option `inputs`)")
    return batch[name]


def classification_loss(
    apply_fn: ModelApply, loss: ClassificationLoss | None = None, *, inputs: str = "image"
) -> LossFn:
    """Returns the loss function of a classifier: the mean of `loss` over the batch, in nats; metric `accuracy`.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(inputs, train=True)`, with logits `[B, C]`; its
        collections (BatchNorm statistics) update, and dropout draws from the step's key.
      loss: `(logits [B, C], batch) -> [B]`; cross entropy with `batch["label"]` by default.
      inputs: the entry of the batch that is the model's input.
    """

    def label_loss(logits: jax.Array, batch: Batch) -> jax.Array:
        return cross_entropy(logits, batch["label"])

    per_example = loss or label_loss

    def loss_fn(
        params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, dict[str, jax.Array]]]:
        logits, new_state = apply_fn(
            {"params": params, **model_state},
            _entry(batch, inputs),
            train=True,
            mutable=list(model_state),
            rngs={"dropout": key},
        )
        return per_example(logits, batch).mean(), (
            new_state,
            {"accuracy": accuracy(logits, batch["label"])},
        )

    return loss_fn


def logits_teacher(apply_fn: ModelApply, *, inputs: str = "image") -> TeacherFn:
    """Returns a teacher for `make_joint_step`: it adds the source's logits `[B, C]` as `batch["teacher_logits"]`.

    The source runs in evaluation mode (BatchNorm with its running statistics, no dropout).

    Args:
      apply_fn: `model.apply` of a Linen module called as `(inputs, train=False)`; for any other model, a teacher is
        a function `(params, model_state, batch) -> batch` of a line or two.
      inputs: the entry of the target's batch that is the source's input.
    """

    def teacher(params: Params, model_state: ModelState, batch: Batch) -> Batch:
        logits = apply_fn({"params": params, **model_state}, _entry(batch, inputs), train=False)
        return {**batch, "teacher_logits": logits}

    return teacher


def evaluate_classifier(
    apply_fn: ModelApply, *, inputs: str = "image", batch_size: int = 512
) -> Callable[[Params, ModelState, Mapping[str, np.ndarray]], dict[str, float]]:
    """Returns a function `(params, model_state, arrays) -> {"loss", "accuracy"}` over exactly all examples.

    The last batch is padded and its padding weighted 0, so that one compilation serves all. The loss is in
    nats, the accuracy a fraction in [0, 1].

    Raises:
      ValueError: the arrays hold no example.
    """

    @jax.jit
    def sums(params: Params, model_state: ModelState, batch: Batch, weights: jax.Array) -> Any:
        logits = apply_fn({"params": params, **model_state}, _entry(batch, inputs), train=False)
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        return (cross_entropy(logits, batch["label"]) * weights).sum(), (correct * weights).sum()

    def evaluate(params: Params, model_state: ModelState, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        size = len(arrays["label"])
        if size == 0:
            raise ValueError("cannot evaluate on no examples")
        width = min(batch_size, size)
        loss = correct = 0.0
        for start in range(0, size, width):
            indices = np.arange(start, start + width)
            batch = {name: array[np.minimum(indices, size - 1)] for name, array in arrays.items()}
            weights = (indices < size).astype(np.float32)
            batch_loss, batch_correct = sums(params, model_state, batch, weights)
            loss += float(batch_loss)
            correct += float(batch_correct)
        return {"loss": loss / size, "accuracy": correct / size}

    return evaluate
