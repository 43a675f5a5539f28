"""Loss function and evaluation of models that answer questions on images from a vocabulary of answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checks import check_at_least_one, check_entries
from merge_jax.objectives.classification import model_loss
from merge_jax.objectives.vqa_score import answer_accuracy, vqa_scores
from merge_jax.types import Batch, LossFn, ModelApply, ModelState, Params

__all__ = ["evaluate_vqa", "predict_answers", "vqa_loss"]


def vqa_loss(apply_fn: ModelApply) -> LossFn:
    """Returns the loss function of a model of answers: the mean over the batch, in nats; metric `accuracy`.

    `-sum_c q_c log softmax(z)_c` of each example, with logits `z [C]` and `q` the fractions of the annotators'
    answers that are in the vocabulary; 0 for an example without any. A softmax over answers, and not a sigmoid for
    each as in Teney et al., arXiv:1708.02711, is our choice: it is one formula for one annotator, where it is the
    usual cross entropy, and for ten.

    The accuracy, in [0, 1], is the mean of `answer_accuracy` of the largest logit, with the A columns of `answers` for
    annotators. So it is that of `vqa_scores` where all questions have as many and no text is compared unnormalised.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(images, tokens, train=True)`, with logits `[B, C]`; its
        collections update, and dropout draws from the step's key. The batch has the entries `image`, `tokens` and
        `answers`, int `[B, A]` in [0, C), or -1 for none, as `answer_indices` gives them. The loss is NaN for an
        answer of C or above.

    Raises:
      ValueError: while tracing, for a batch that lacks an entry or logits of another shape.
    """

    def of(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        answers = jnp.asarray(batch["answers"])
        losses = _losses(logits, answers)
        counts = (answers == jnp.argmax(logits, axis=-1)[:, None]).sum(axis=-1)
        annotators = answers.shape[-1]
        table = jnp.array([answer_accuracy(count, annotators) for count in range(annotators + 1)], jnp.float32)
        return losses, {"accuracy": table[counts].mean()}

    return model_loss(apply_fn, ("image", "tokens"), of, needs=("answers",))


def evaluate_vqa(
    apply_fn: ModelApply,
    vocabulary: Sequence[str],
    answers: Sequence[Sequence[str]],
    kinds: Sequence[str] | None = None,
    *,
    batch_size: int = 128,
) -> Callable[[Params, ModelState, Mapping[str, Any]], dict[str, float]]:
    """Returns a function `(params, model_state, arrays) -> {"loss", "accuracy", ...}` over exactly all examples.

    The arrays hold `image`, in memory or `Streamed`, `tokens` and `answers`, as for `vqa_loss`, and `example [N]`.
    The last batch is padded and its padding left out, so that one compilation serves all. The loss is that of
    `vqa_loss`, in nats; the scores are those of `vqa_scores`, `accuracy_<kind>` among them where there are kinds.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(images, tokens, train=False)`, with logits `[B, C]`.
      vocabulary: the C answers.
      answers: of the question with number `arrays["example"][i]`, what each annotator answered.
      kinds: of the questions by the same number.
      batch_size: the number of examples at a time.

    Raises:
      ValueError: a batch size below 1, or kinds in another number than answers; the arrays hold no example, lack an
        entry, or name a question that `answers` has not; or, while tracing, logits of another shape.
    """
    check_at_least_one(batch_size=batch_size)
    if kinds is not None and len(kinds) != len(answers):
        raise ValueError(f"every question needs one kind, got {len(kinds)} for {len(answers)} questions")

    @jax.jit
    def losses_and_best(params: Params, model_state: ModelState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = _logits(apply_fn, len(vocabulary), params, model_state, batch)
        return _losses(logits, batch["answers"]), jnp.argmax(logits, axis=-1)

    def evaluate(params: Params, model_state: ModelState, arrays: Mapping[str, Any]) -> dict[str, float]:
        check_entries(arrays, "image", "tokens", "answers", "example")
        example = np.asarray(arrays["example"])
        if example.size and not 0 <= example.min() <= example.max() < len(answers):
            raise ValueError(
                f"arrays['example'] must lie in [0, {len(answers)}), the number of answers, found"
                f" {example.min()} to {example.max()}"
            )
        losses, best = [], []
        for kept, batch in _batches(arrays, ("image", "tokens", "answers"), batch_size):
            batch_losses, batch_best = losses_and_best(params, model_state, batch)
            losses.append(np.asarray(batch_losses, np.float32)[:kept])
            best.append(np.asarray(batch_best)[:kept])
        scores = vqa_scores(
            [vocabulary[int(place)] for place in np.concatenate(best)],
            [answers[int(number)] for number in example],
            None if kinds is None else [kinds[int(number)] for number in example],
        )
        return {"loss": float(np.concatenate(losses).mean(dtype=np.float64)), **scores}

    return evaluate


def predict_answers(
    apply_fn: ModelApply, vocabulary: Sequence[str], *, batch_size: int = 128
) -> Callable[[Params, ModelState, Mapping[str, Any]], list[str]]:
    """Returns a function `(params, model_state, arrays) -> answers`, the one with the largest logit of each example.

    The arrays hold `image`, in memory or `Streamed`, and `tokens`.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(images, tokens, train=False)`, with logits `[B, C]`.
      vocabulary: the C answers.
      batch_size: the number of examples at a time.

    Raises:
      ValueError: a batch size below 1; the arrays hold no example or lack an entry; or, while tracing, logits of
        another shape.
    """
    check_at_least_one(batch_size=batch_size)

    @jax.jit
    def best_of(params: Params, model_state: ModelState, batch: Batch) -> jax.Array:
        return jnp.argmax(_logits(apply_fn, len(vocabulary), params, model_state, batch), axis=-1)

    def predict(params: Params, model_state: ModelState, arrays: Mapping[str, Any]) -> list[str]:
        check_entries(arrays, "image", "tokens")
        predictions = []
        for kept, batch in _batches(arrays, ("image", "tokens"), batch_size):
            best = np.asarray(best_of(params, model_state, batch))[:kept]
            predictions.extend(vocabulary[int(place)] for place in best)
        return predictions

    return predict


def _logits(apply_fn: ModelApply, size: int, params: Params, model_state: ModelState, batch: Batch) -> jax.Array:
    logits = apply_fn({"params": params, **model_state}, batch["image"], batch["tokens"], train=False)
    if jnp.shape(logits)[-1:] != (size,):
        raise ValueError(f"logits must be [B, {size}], one of each answer, got shape {jnp.shape(logits)}")
    return logits


def _losses(logits: jax.Array, answers: jax.Array) -> jax.Array:
    """Returns the losses `[B]`."""
    shape, answers_shape = jnp.shape(logits), jnp.shape(answers)
    if len(shape) != 2 or len(answers_shape) != 2 or shape[0] != answers_shape[0]:
        raise ValueError(f"logits must be [B, C] and 'answers' [B, A], got shapes {shape} and {answers_shape}")
    given = answers >= 0
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(given, answers, 0), axis=-1)
    return -jnp.where(given, log_p, 0).sum(axis=-1) / jnp.maximum(given.sum(axis=-1), 1)


def _batches(
    arrays: Mapping[str, Any], names: Sequence[str], batch_size: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields batches of one size and how many of their examples count; the last one repeats its last example."""
    size = len(arrays["tokens"])
    if size == 0:
        raise ValueError("cannot evaluate on no examples")
    width = min(batch_size, size)
    for first in range(0, size, width):
        rows = np.arange(first, min(first + width, size))
        # Padded once read, so that no image is read for padding.
        padded = np.minimum(np.arange(width), len(rows) - 1)
        yield len(rows), {name: arrays[name][rows][padded] for name in names}
