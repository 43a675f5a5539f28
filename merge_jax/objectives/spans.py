"""Loss function, evaluation and scores of models that answer a question by a span of its passage.

Exact match and F1 follow the official script, evaluate-v2.0.py, of Rajpurkar et al., arXiv:1806.03822, which reports
percentages.
"""

import collections
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checks import check_at_least_one, count_examples
from merge_jax.objectives.distillation import cross_entropy
from merge_jax.objectives.evaluation import apply_in_batches, example_numbers
from merge_jax.objectives.losses import model_loss
from merge_jax.types import Batch, LossFn, ModelApply, ModelState, Params

__all__ = ["Decode", "evaluate_spans", "exact_match", "f1", "normalize_answer", "span_loss", "squad_scores"]

Decode = Callable[[np.ndarray, Mapping[str, np.ndarray]], Sequence[str]]
"""Maps logits `[N, L, 2]` and their arrays to N answers, empty for "no answer"."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def span_loss(apply_fn: ModelApply, *, inputs: str = "tokens") -> LossFn:
    """Returns the loss function of a span extractor: the mean over the batch, in nats; metric `accuracy`.

    `(CE(z[:, 0], start) + CE(z[:, 1], end)) / 2` for each example, with logits `z [L, 2]`: softmaxes over the L tokens
    for the start and the end of the answer. The accuracy is the fraction in [0, 1] of examples with both ends correct.
    Source: Devlin et al., arXiv:1810.04805, section 4.2; the mean of both ends is from its code.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(inputs, train=True)`, with logits `[B, L, 2]`; its
        collections are updated, and dropout draws from the step's key.
      inputs: name of the batch entry that is the model's input; `start` and `end`, `[B]` in [0, L), are the others.

    Raises:
      ValueError: while tracing, for a batch that lacks an entry or logits of another shape.
    """

    def per_example(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses, right = _losses_and_right(logits, batch)
        return losses, {"accuracy": right.mean()}

    return model_loss(apply_fn, (inputs,), per_example, needs=("start", "end"))


def evaluate_spans(
    apply_fn: ModelApply,
    decode: Decode,
    answers: Sequence[Sequence[str]],
    *,
    inputs: str = "tokens",
    batch_size: int = 128,
) -> Callable[[Params, ModelState, Mapping[str, np.ndarray]], dict[str, float]]:
    """Returns a function `(params, model_state, arrays) -> {"loss", "exact_match", "f1"}` over exactly all examples.

    The arrays hold the model's input, `start` and `end`, as for `span_loss`, `example [N]`, and what `decode` needs.
    The last batch is padded and its padding discarded, so one compilation suffices. The loss is in nats; the scores of
    `squad_scores` are fractions in [0, 1]. All logits, `[N, L, 2]`, are on the host at once.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(inputs, train=False)`, with logits `[B, L, 2]`.
      decode: maps all logits and the arrays to N predicted answers.
      answers: all correct answers, by question number `arrays["example"][i]`.
      inputs: name of the array that is the model's input.
      batch_size: number of examples per batch.

    Raises:
      ValueError: a batch size below 1; arrays without an example or an entry, or with a question missing from
        `answers`; or `decode` returns a different number of answers.
    """
    check_at_least_one(batch_size=batch_size)

    @jax.jit
    def losses_and_logits(params: Params, model_state: ModelState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = apply_fn({"params": params, **model_state}, batch[inputs], train=False)
        return _losses_and_right(logits, batch)[0], logits

    def evaluate(params: Params, model_state: ModelState, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        size = count_examples(arrays, inputs, "example", "start", "end")
        example = example_numbers(arrays, len(answers))
        used = {name: arrays[name] for name in (inputs, "start", "end")}
        run = functools.partial(losses_and_logits, params, model_state)
        losses, logits = apply_in_batches(run, used, np.arange(size), batch_size)
        predictions = decode(logits.astype(np.float32), arrays)
        if len(predictions) != size:
            raise ValueError(f"decode must give an answer to each of {size} examples, got {len(predictions)}")
        loss = float(losses.astype(np.float32).mean(dtype=np.float64))
        return {"loss": loss, **squad_scores(predictions, [answers[int(index)] for index in example])}

    return evaluate


def normalize_answer(text: str) -> str:
    """Returns the text in lower case without ASCII punctuation, English articles and extra white space.

    >>> normalize_answer("The  U.S. Army")
    'us army'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if the normalised prediction is one of the normalised answers, else 0.

    A question without an answer has no `answers`; the correct prediction is then empty. Answers that are empty after
    normalisation do not count.

    Raises:
      ValueError: `answers` is a single text.
    """
    return float(normalize_answer(prediction) in _counted(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the largest F1 of the prediction's words against those of an answer, in [0, 1].

    `2 p r / (p + r)`, with `p` the number of shared words over that of the prediction, and `r` over that of the answer.
    Words that appear twice count twice. If either has no words, F1 is 1 if both have none, else 0. For a question
    without an answer see `exact_match`.

    Raises:
      ValueError: `answers` is a single text.
    """
    return max(_f1(normalize_answer(prediction).split(), answer.split()) for answer in _counted(answers))


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns `{"exact_match", "f1"}`, the means over all questions, fractions in [0, 1].

    Args:
      predictions: one per question, empty for "no answer".
      answers: all correct texts of each question; none for a question without an answer.

    Raises:
      ValueError: no questions, different numbers of predictions and questions, or answers that are a single text.
    """
    if len(predictions) != len(answers):
        raise ValueError(f"every question needs one prediction, got {len(predictions)} for {len(answers)} questions")
    if not predictions:
        raise ValueError("cannot score no predictions")
    pairs = list(zip(predictions, answers, strict=True))
    return {
        "exact_match": sum(exact_match(prediction, right) for prediction, right in pairs) / len(pairs),
        "f1": sum(f1(prediction, right) for prediction, right in pairs) / len(pairs),
    }


def _losses_and_right(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the losses `[B]`, and whether both ends are correct, `[B]`."""
    shape, starts = jnp.shape(logits), jnp.shape(batch["start"])
    if len(shape) != 3 or shape[-1] != 2 or shape[:1] != starts:
        raise ValueError(f"logits must be [B, L, 2] and 'start' [B], got shapes {shape} and {starts}")
    losses, right = [], []
    for column, name in enumerate(("start", "end")):
        losses.append(cross_entropy(logits[..., column], batch[name]))
        right.append(jnp.argmax(logits[..., column], axis=-1) == batch[name])
    return (losses[0] + losses[1]) / 2, right[0] & right[1]


def _counted(answers: Sequence[str]) -> list[str]:
    if isinstance(answers, str):
        raise ValueError(f"answers must be a sequence of texts, got the text {answers!r}")
    return [normalized for answer in answers if (normalized := normalize_answer(answer))] or [""]


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = (collections.Counter(prediction) & collections.Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer))
