"""Loss functions, teachers and evaluation for classifiers written in Linen."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeCollectionNotFound

from merge_jax.checks import check_entries
from merge_jax.objectives.distillation import cross_entropy
from merge_jax.objectives.features import Agreeing
from merge_jax.objectives.metrics import accuracy
from merge_jax.types import Batch, LossFn, ModelApply, ModelState, Params, TeacherFn

__all__ = [
    "ClassificationLoss",
    "Outputs",
    "classification_loss",
    "evaluate_classifier",
    "logits_teacher",
    "model_loss",
    "on_pixels",
    "with_features",
]

ClassificationLoss = Callable[[Any, Batch], jax.Array]
"""Logits `[B, C]`, or `Outputs` of a model `with_features`, and their batch to losses `[B]`."""


class Outputs(NamedTuple):
    """What a classifier gives: its logits `[B, C]` and the features `[B, D]` that its last layer has them from."""

    logits: jax.Array
    features: jax.Array


def with_features(apply_fn: ModelApply) -> ModelApply:
    """Returns the apply function with `Outputs` in the place of logits, for losses that compare features.

    The model sows its features as `intermediates/features`, as those of `merge_jax.models` do.

    Raises:
      ValueError: while tracing, for a model that sows none.
    """

    def apply(variables: Any, inputs: jax.Array, *, mutable: Any = False, **options: Any) -> Any:
        asked = (mutable,) if isinstance(mutable, str) else mutable or ()
        collections = [*asked, "intermediates"]
        logits, updates = apply_fn(variables, inputs, mutable=collections, **options)
        sown = dict(updates).pop("intermediates", {})
        if "features" not in sown:
            raise ValueError('the model sows no features: call self.sow("intermediates", "features", x) in it')
        outputs = Outputs(logits, sown["features"][-1])
        kept = {name: collection for name, collection in updates.items() if name != "intermediates"}
        return outputs if mutable is False else (outputs, kept)

    return apply


def on_pixels(apply_fn: ModelApply, mean: Sequence[float], std: Sequence[float]) -> ModelApply:
    """Returns the apply function for uint8 images `[B, H, W, C]`: `(x / 255 - mean) / std`, channel by channel.

    Other inputs go on as they are.

    Args:
      apply_fn: `model.apply` of a model of float images.
      mean: of each channel, of pixels in [0, 1].
      std: their standard deviation.

    Raises:
      ValueError: a standard deviation that is not above 0.
    """
    if not all(one > 0 for one in std):
        raise ValueError(f"std must be above 0, got {list(std)}")
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)

    def apply(variables: Any, images: jax.Array, *others: Any, **options: Any) -> Any:
        return apply_fn(variables, images * scale[None, None, None] - shift[None, None, None], *others, **options)

    return apply


def _logits(outputs: Any) -> jax.Array:
    return outputs.logits if isinstance(outputs, Outputs) else outputs


_HINT = " (see the option `inputs`)"


@contextlib.contextmanager
def _told_of_collections(model_state: ModelState, role: str = "target") -> Iterator[None]:
    """Says what a state lacks that a Linen model reads, where Flax says where it reads it."""
    try:
        yield
    except ScopeCollectionNotFound as error:
        given = ", ".join(map(repr, sorted(model_state))) or "nothing"
        raise ValueError(
            f"the model reads a collection that is not in its state, which has {given}: give all that model.init made "
            f'beside "params", such as {role}_state={{"batch_stats": ...}} of init_joint_state ({error})'
        ) from None


def model_loss(
    apply_fn: ModelApply,
    inputs: Sequence[str],
    of: Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]],
    *,
    needs: Sequence[str] = (),
    hint: str = "",
) -> LossFn:
    """Returns the loss function of a Linen model: the mean over the batch of the losses that `of` makes of its outputs.

    A model that is `agreeing` has its disagreement with the source added, and the metric `agreement`.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(*inputs, train=True)`; its collections (BatchNorm
        statistics) update, and dropout draws from the step's key.
      inputs: the entries of the batch that are the model's inputs, in order.
      of: `(outputs, batch) -> (losses [B], metrics)`.
      needs: the other entries that `of` reads.
      hint: the end of the message on an input that is missing.

    Raises:
      ValueError: while tracing, for a batch that lacks an entry, or a model state that lacks a collection.
    """

    def loss_fn(
        params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, dict[str, jax.Array]]]:
        check_entries(batch, *inputs, hint=hint)
        check_entries(batch, *needs)
        with _told_of_collections(model_state):
            outputs, new_state = apply_fn(
                {"params": params, **model_state},
                *(batch[name] for name in inputs),
                train=True,
                mutable=list(model_state),
                rngs={"dropout": key},
            )
        if not isinstance(outputs, Agreeing):
            losses, metrics = of(outputs, batch)
            return losses.mean(), (new_state, metrics)
        losses, metrics = of(outputs.outputs, batch)
        disagreement = outputs.disagreement(batch)
        return losses.mean() + outputs.weight * disagreement, (new_state, {**metrics, "agreement": 1 - disagreement})

    return loss_fn


def classification_loss(
    apply_fn: ModelApply, loss: ClassificationLoss | None = None, *, inputs: str = "image"
) -> LossFn:
    """Returns the loss function of a classifier: the mean of `loss` over the batch, in nats; metric `accuracy`.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(inputs, train=True)`, with logits `[B, C]`; its
        collections (BatchNorm statistics) update, and dropout draws from the step's key.
      loss: `(logits [B, C], batch) -> [B]`; cross entropy with `batch["label"]` by default. It gets `Outputs` where
        `apply_fn` is a model's `with_features`.
      inputs: the entry of the batch that is the model's input.
    """

    def label_loss(logits: jax.Array, batch: Batch) -> jax.Array:
        return cross_entropy(logits, batch["label"])

    per_example = loss or label_loss

    def of(outputs: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return per_example(outputs, batch), {"accuracy": accuracy(_logits(outputs), batch["label"])}

    return model_loss(apply_fn, (inputs,), of, needs=("label",), hint=_HINT)


def logits_teacher(apply_fn: ModelApply, *, inputs: str = "image") -> TeacherFn:
    """Returns a teacher for `make_joint_step`: it adds the source's logits `[B, C]` as `batch["teacher_logits"]`.

    A model `with_features` adds its features `[B, D]` too, as `batch["teacher_features"]`. The source runs in
    evaluation mode (BatchNorm with its running statistics, no dropout).

    Args:
      apply_fn: `model.apply` of a Linen module called as `(inputs, train=False)`; for any other model, a teacher is
        a function `(params, model_state, batch) -> batch` of a line or two.
      inputs: the entry of the target's batch that is the source's input.
    """

    def teacher(params: Params, model_state: ModelState, batch: Batch) -> Batch:
        check_entries(batch, inputs, hint=_HINT)
        with _told_of_collections(model_state, "source"):
            outputs = apply_fn({"params": params, **model_state}, batch[inputs], train=False)
        if isinstance(outputs, Outputs):
            return {**batch, "teacher_logits": outputs.logits, "teacher_features": outputs.features}
        return {**batch, "teacher_logits": outputs}

    return teacher


def evaluate_classifier(
    apply_fn: ModelApply, *, inputs: str = "image", batch_size: int = 512
) -> Callable[[Params, ModelState, Mapping[str, np.ndarray]], dict[str, float]]:
    """Returns a function `(params, model_state, arrays) -> {"loss", "accuracy"}` over exactly all examples.

    The last batch is padded and its padding weighted 0, so that one compilation serves all. The loss is in
    nats, the accuracy a fraction in [0, 1].

    Raises:
      ValueError: the arrays hold no example, or lack an entry, or the model state lacks a collection.
    """

    @jax.jit
    def sums(params: Params, model_state: ModelState, batch: Batch, weights: jax.Array) -> Any:
        with _told_of_collections(model_state):
            logits = apply_fn({"params": params, **model_state}, batch[inputs], train=False)
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        return (cross_entropy(logits, batch["label"]) * weights).sum(), (correct * weights).sum()

    def evaluate(params: Params, model_state: ModelState, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        check_entries(arrays, inputs, hint=_HINT)
        check_entries(arrays, "label")
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
