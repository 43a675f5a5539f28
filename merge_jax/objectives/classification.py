"""Accuracy, loss function, teacher and evaluation of classifiers written in Linen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checks import check_at_least_one, check_entries, count_examples, name_missing_collections
from merge_jax.objectives.distillation import check_labels, cross_entropy
from merge_jax.objectives.evaluation import padded_batches
from merge_jax.objectives.losses import model_loss
from merge_jax.types import Batch, LossFn, ModelApply, ModelState, Params, TeacherFn

__all__ = [
    "ClassificationLoss",
    "accuracy",
    "classification_loss",
    "evaluate_classifier",
    "logits_teacher",
    "on_pixels",
]

ClassificationLoss = Callable[[jax.Array, Batch], jax.Array]
"""Logits `[B, C]` and their batch to losses `[B]`."""


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the fraction in [0, 1] of logits `[..., C]` whose largest entry is the label `[...]`; a scalar.

    Raises:
      ValueError: the shape of the labels is not that of the logits without the last axis.
    """
    check_labels(logits, labels)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def on_pixels(apply_fn: ModelApply, mean: Sequence[float], std: Sequence[float]) -> ModelApply:
    """Returns the apply function for uint8 images `[B, H, W, C]`: `(x / 255 - mean) / std`, channel by channel.

    Float images are taken as pixels in [0, 255], such as the means of two; other arguments are passed on unchanged.

    Args:
      apply_fn: `model.apply` of a model for float images.
      mean: mean of each channel, for pixels in [0, 1].
      std: standard deviation of each channel.

    Raises:
      ValueError: a standard deviation not above 0.
    """
    if not all(one > 0 for one in std):
        raise ValueError(f"std must be above 0, got {list(std)}")
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)

    def apply(variables: Any, images: jax.Array, *others: Any, **options: Any) -> Any:
        return apply_fn(variables, images * scale[None, None, None] - shift[None, None, None], *others, **options)

    return apply


_HINT = " (see the option `inputs`)"


def classification_loss(
    apply_fn: ModelApply, loss: ClassificationLoss | None = None, *, inputs: str = "image"
) -> LossFn:
    """Returns the loss function of a classifier: the mean of `loss` over the batch, in nats; metric `accuracy`.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(inputs, train=True)`, with logits `[B, C]`; its
        collections (BatchNorm statistics) are updated, and dropout draws from the step's key.
      loss: `(logits [B, C], batch) -> [B]`; cross entropy with `batch["label"]` by default.
      inputs: name of the batch entry that is the model's input.
    """

    def label_loss(logits: jax.Array, batch: Batch) -> jax.Array:
        return cross_entropy(logits, batch["label"])

    logits_loss = loss or label_loss

    def per_example(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return logits_loss(logits, batch), {"accuracy": accuracy(logits, batch["label"])}

    return model_loss(apply_fn, (inputs,), per_example, needs=("label",), hint=_HINT)


def logits_teacher(apply_fn: ModelApply, *, inputs: str = "image") -> TeacherFn:
    """Returns a teacher for `make_joint_step`: it adds the source's logits `[B, C]` as `batch["teacher_logits"]`.

    The source runs in evaluation mode (BatchNorm with its running statistics, no dropout).

    Args:
      apply_fn: `model.apply` of a Linen module called as `(inputs, train=False)`; for any other model, write the
        teacher as a function `(params, model_state, batch) -> batch`.
      inputs: name of the target's batch entry that is the source's input.
    """

    def teacher(params: Params, model_state: ModelState, batch: Batch) -> Batch:
        check_entries(batch, inputs, hint=_HINT)
        with name_missing_collections(model_state, "source"):
            logits = apply_fn({"params": params, **model_state}, batch[inputs], train=False)
        return {**batch, "teacher_logits": logits}

    return teacher


def evaluate_classifier(
    apply_fn: ModelApply, *, inputs: str = "image", batch_size: int = 512
) -> Callable[[Params, ModelState, Mapping[str, np.ndarray]], dict[str, float]]:
    """Returns a function `(params, model_state, arrays) -> {"loss", "accuracy"}` over exactly all examples.

    The last batch is padded, and its padding has weight 0, so the function compiles once. The loss is in nats, the
    accuracy a fraction in [0, 1].

    Raises:
      ValueError: a batch size below 1; arrays without an example or an entry; a model state that lacks a collection.
    """
    check_at_least_one(batch_size=batch_size)

    @jax.jit
    def sums(params: Params, model_state: ModelState, batch: Batch, weights: jax.Array) -> Any:
        with name_missing_collections(["params", *model_state]):
            logits = apply_fn({"params": params, **model_state}, batch[inputs], train=False)
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        return (cross_entropy(logits, batch["label"]) * weights).sum(), (correct * weights).sum()

    def evaluate(params: Params, model_state: ModelState, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        check_entries(arrays, inputs, hint=_HINT)
        size = count_examples(arrays, inputs, "label")
        used = {name: arrays[name] for name in (inputs, "label")}
        loss = correct = 0.0
        for kept, batch in padded_batches(used, np.arange(size), batch_size):
            weights = (np.arange(len(batch["label"])) < kept).astype(np.float32)
            batch_loss, batch_correct = sums(params, model_state, batch, weights)
            loss += float(batch_loss)
            correct += float(batch_correct)
        return {"loss": loss / size, "accuracy": correct / size}

    return evaluate
