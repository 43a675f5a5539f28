"""Loss function, evaluation, vocabularies and scores of models that answer questions on images.

Accuracy follows the official script, vqaEval.py of GT-Vision-Lab/VQA since 2021, of Antol et al., arXiv:1505.00468,
which reports percentages.
"""

import collections
import functools
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checks import check_at_least_one, count_examples
from merge_jax.objectives.evaluation import apply_in_batches, example_numbers
from merge_jax.objectives.losses import model_loss
from merge_jax.objectives.precision import at_least_float32
from merge_jax.types import Batch, LossFn, ModelApply, ModelState, Params

__all__ = [
    "Coverage",
    "answer_accuracy",
    "answer_coverage",
    "answer_indices",
    "answer_vocabulary",
    "evaluate_vqa",
    "normalize_answer",
    "predict_answers",
    "vqa_loss",
    "vqa_scores",
]

_MARKS = frozenset(';/[]"{}()=+\\_-><@`,?!')
_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")
_MAX_PERIODS = 32  # The script passes re.UNICODE, which is 32, to re.sub as the count.
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = frozenset(("a", "an", "the"))

_WORDS_BEFORE = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}


def _contractions() -> dict[str, str]:
    """Returns the contractions by their spellings with one apostrophe missing.

    The official table has four more entries with a capital I, which never match lower-case text, and two that change
    nothing. Its entry for "somebody'd" is reversed.
    """
    table = {"somebody'd": "somebodyd"}
    for ending, words in _WORDS_BEFORE.items():
        for whole in (word + ending for word in words.split()):
            table.update({whole[:i] + whole[i + 1 :]: whole for i, letter in enumerate(whole) if letter == "'"})
    return table


_CONTRACTIONS = _contractions()


def vqa_loss(apply_fn: ModelApply) -> LossFn:
    """Returns the loss function of a visual answerer: the mean over the batch, in nats; metric `accuracy`.

    `-sum_c q_c log softmax(z)_c` for each example, with logits `z [C]` and `q` the fractions of the annotators'
    answers that are in the vocabulary; 0 for an example without any. A softmax over answers, instead of a sigmoid for
    each as in Teney et al., arXiv:1708.02711, is our choice: one formula serves for ten annotators and for one, where
    it is the usual cross entropy.

    The accuracy, in [0, 1], is the mean of `answer_accuracy` of the largest logit; the A columns of `answers` are the
    annotators. It equals that of `vqa_scores` if all questions have A annotators and all texts are compared normalised.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(images, tokens, train=True)`, with logits `[B, C]`; its
        collections are updated, and dropout draws from the step's key. The batch has the entries `image`, `tokens` and
        `answers`, int `[B, A]` in [0, C), or -1 for none, as returned by `answer_indices`. The loss is NaN for an
        answer of C or above.

    Raises:
      ValueError: while tracing, for a batch that lacks an entry or logits of another shape.
    """

    def per_example(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        answers = jnp.asarray(batch["answers"])
        losses = _losses(logits, answers)
        counts = (answers == jnp.argmax(logits, axis=-1)[:, None]).sum(axis=-1)
        annotators = answers.shape[-1]
        table = jnp.array([answer_accuracy(count, annotators) for count in range(annotators + 1)], jnp.float32)
        return losses, {"accuracy": table[counts].mean()}

    return model_loss(apply_fn, ("image", "tokens"), per_example, needs=("answers",))


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
    The last batch is padded and its padding discarded, so one compilation suffices. The loss is that of `vqa_loss`, in
    nats; the scores are those of `vqa_scores`, including `accuracy_<kind>` if there are kinds.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(images, tokens, train=False)`, with logits `[B, C]`.
      vocabulary: the C answers.
      answers: each annotator's answer, by question number `arrays["example"][i]`.
      kinds: kinds of questions, by the same number.
      batch_size: number of examples per batch.

    Raises:
      ValueError: a batch size below 1, or different numbers of kinds and answers; arrays without an example or an
        entry, or with a question missing from `answers`; or, while tracing, logits of another shape.
    """
    check_at_least_one(batch_size=batch_size)
    if kinds is not None and len(kinds) != len(answers):
        raise ValueError(f"every question needs one kind, got {len(kinds)} for {len(answers)} questions")

    @jax.jit
    def losses_and_best(params: Params, model_state: ModelState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = _logits(apply_fn, len(vocabulary), params, model_state, batch)
        return _losses(logits, batch["answers"]), jnp.argmax(logits, axis=-1)

    def evaluate(params: Params, model_state: ModelState, arrays: Mapping[str, Any]) -> dict[str, float]:
        size = count_examples(arrays, "image", "tokens", "answers", "example")
        example = example_numbers(arrays, len(answers))
        used = {name: arrays[name] for name in ("image", "tokens", "answers")}
        run = functools.partial(losses_and_best, params, model_state)
        losses, best = apply_in_batches(run, used, np.arange(size), batch_size)
        scores = vqa_scores(
            [vocabulary[int(place)] for place in best],
            [answers[int(number)] for number in example],
            None if kinds is None else [kinds[int(number)] for number in example],
        )
        return {"loss": float(losses.astype(np.float32).mean(dtype=np.float64)), **scores}

    return evaluate


def predict_answers(
    apply_fn: ModelApply, vocabulary: Sequence[str], *, batch_size: int = 128
) -> Callable[[Params, ModelState, Mapping[str, Any]], list[str]]:
    """Returns a function `(params, model_state, arrays) -> answers`: each example's answer with the largest logit.

    The arrays hold `image`, in memory or `Streamed`, and `tokens`.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(images, tokens, train=False)`, with logits `[B, C]`.
      vocabulary: the C answers.
      batch_size: number of examples per batch.

    Raises:
      ValueError: a batch size below 1; arrays without an example or an entry; or, while tracing, logits of another
        shape.
    """
    check_at_least_one(batch_size=batch_size)

    @jax.jit
    def largest(params: Params, model_state: ModelState, batch: Batch) -> jax.Array:
        return jnp.argmax(_logits(apply_fn, len(vocabulary), params, model_state, batch), axis=-1)

    def predict(params: Params, model_state: ModelState, arrays: Mapping[str, Any]) -> list[str]:
        size = count_examples(arrays, "image", "tokens")
        used = {name: arrays[name] for name in ("image", "tokens")}
        best = apply_in_batches(functools.partial(largest, params, model_state), used, np.arange(size), batch_size)
        return [vocabulary[int(place)] for place in best]

    return predict


def normalize_answer(text: str) -> str:
    """Returns the text normalised as in the official script.

    Each of `; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? !` becomes a space. It is removed instead if it is next to a space
    anywhere in the text, and all are removed if there is a comma between digits. The first 32 periods not followed by a
    digit are removed. Then, in lower case, the words "none" and "zero" to "ten" become digits, English articles are
    removed, and missing apostrophes of contractions are restored. Digits are ASCII.

    >>> normalize_answer("Two T-shirts, and a dog. It isnt raining!")
    "2 t shirts and dog it isn't raining"
    """
    text = _plain(text)
    all_go = _COMMA_IN_NUMBER.search(text) is not None
    found = _MARKS.intersection(text)
    changes = {ord(mark): "" if all_go or f"{mark} " in text or f" {mark}" in text else " " for mark in found}
    text = _PERIOD.sub("", text.translate(changes), count=_MAX_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def answer_accuracy(count: int, annotators: int) -> float:
    """Returns the accuracy in [0, 1] of an answer that `count` of the annotators gave.

    `mean_a min(1, o_a / 3)`, with `o_a` the number of annotators other than a who gave it. So with 10 annotators, an
    answer scores 0.3 for each who gave it, and 1 from 4 on. Like the official script, it requires three others even
    with few annotators: the maximum is 1/3 with two and 2/3 with three. With a single annotator, for whom it would be
    0, it is `count`, an exact match: our choice, for sets with one answer per question.
    """
    if annotators == 1:
        return float(count)
    givers, rest = count * min(1, (count - 1) / 3), (annotators - count) * min(1, count / 3)
    return (givers + rest) / annotators


def vqa_scores(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], kinds: Sequence[str] | None = None
) -> dict[str, float]:
    """Returns `{"accuracy"}`, the mean of `answer_accuracy` over all questions, a fraction in [0, 1].

    As in the official script, prediction and answers are normalised if the answers to a question differ, and compared
    unchanged if all are the same text. Then "Yes" does not match "yes", and a prediction from a vocabulary of
    normalised answers is wrong if all answers are "none". A single answer to a question is normalised (our choice),
    since there is no agreement on its spelling.

    Args:
      predictions: one per question.
      answers: for each question, the answers of all annotators, with repetitions.
      kinds: the kind of each question; adds `accuracy_<kind>`, the mean over its questions, for each kind.

    Raises:
      ValueError: no questions, different numbers of predictions, kinds and questions, or a question without answers or
        with a single text as its answers.
    """
    if len(predictions) != len(answers):
        raise ValueError(f"every question needs one prediction, got {len(predictions)} for {len(answers)} questions")
    if kinds is not None and len(kinds) != len(answers):
        raise ValueError(f"every question needs one kind, got {len(kinds)} for {len(answers)} questions")
    if not predictions:
        raise ValueError("cannot score no predictions")
    _check_answers(answers)
    accuracies = [_accuracy(*pair) for pair in zip(predictions, answers, strict=True)]
    scores = {"accuracy": statistics.fmean(accuracies)}
    by_kind = collections.defaultdict(list)
    if kinds is not None:
        for kind, accuracy in zip(kinds, accuracies, strict=True):
            by_kind[kind].append(accuracy)
    return scores | {f"accuracy_{kind}": statistics.fmean(by_kind[kind]) for kind in sorted(by_kind)}


def answer_vocabulary(answers: Sequence[Sequence[str]], size: int) -> tuple[str, ...]:
    """Returns the `size` most frequent normalised answers, or all if there are fewer, the most frequent first.

    Every answer of every annotator counts, except those that are empty after normalisation. Equally frequent answers
    are in alphabetical order.

    Raises:
      ValueError: a size below 1, answers that are a single text, or no answer at all.
    """
    check_at_least_one(size=size)
    _check_texts(answers)
    vocabulary = _commonest(answer for given in answers for answer in given)[:size]
    if not vocabulary:
        raise ValueError(f"there are no answers to {len(answers)} questions to make a vocabulary of")
    return vocabulary


def answer_indices(answers: Sequence[Sequence[str]], vocabulary: Sequence[str]) -> tuple[np.ndarray, float]:
    """Returns each answer's index in the vocabulary, `[N, A]`, int32, and the fraction of questions with one.

    A is the largest number of answers to a question. The index is -1 for an answer outside the vocabulary and for a
    missing annotator. Answers and vocabulary are normalised before the comparison. `answer_coverage` lists the missing
    answers.

    Raises:
      ValueError: answers that are a single text, or a vocabulary that is empty or contains an answer twice.
    """
    places = _places(vocabulary)
    _check_texts(answers)
    indices = np.full((len(answers), max(map(len, answers), default=0) or 1), -1, np.int32)
    for row, given in zip(indices, answers, strict=True):
        row[: len(given)] = [places.get(normalize_answer(answer), -1) for answer in given]
    return indices, float((indices >= 0).any(axis=1).mean()) if len(answers) else 0.0


@dataclass(frozen=True)
class Coverage:
    """How many questions a vocabulary covers; `str()` returns a sentence for a report or an error.

    Attributes:
      size: size of the vocabulary.
      questions: number of questions.
      uncovered: number of questions without an answer in the vocabulary.
      missing: the normalised answers to those, the most frequent first.
    """

    size: int
    questions: int
    uncovered: int
    missing: tuple[str, ...]

    def __str__(self) -> str:
        """Returns the sentence, with the five most frequent missing answers."""
        subject = f"the vocabulary of {self.size} answers covers"
        if not self.uncovered:
            return f"{subject} an answer of each of {self.questions} questions"
        shown = f"; the commonest missing are {', '.join(map(repr, self.missing[:5]))}" if self.missing else ""
        return f"{subject} none of the answers of {self.uncovered} of {self.questions} questions{shown}"


def answer_coverage(answers: Sequence[Sequence[str]], vocabulary: Sequence[str]) -> Coverage:
    """Returns how many questions the vocabulary covers.

    Raises:
      ValueError: as `answer_indices`.
    """
    indices, _ = answer_indices(answers, vocabulary)
    uncovered = np.flatnonzero((indices < 0).all(axis=1))
    missing = _commonest(answer for question in uncovered.tolist() for answer in answers[question])
    return Coverage(len(vocabulary), len(answers), len(uncovered), missing)


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
    log_p = jnp.take_along_axis(jax.nn.log_softmax(at_least_float32(logits)), jnp.where(given, answers, 0), axis=-1)
    return -jnp.where(given, log_p, 0).sum(axis=-1) / jnp.maximum(given.sum(axis=-1), 1)


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _accuracy(prediction: str, answers: Sequence[str]) -> float:
    prediction, given = _plain(prediction), [_plain(answer) for answer in answers]
    if len(given) == 1 or len(set(given)) > 1:
        prediction, given = normalize_answer(prediction), [normalize_answer(answer) for answer in given]
    return answer_accuracy(given.count(prediction), len(given))


def _commonest(answers: Iterable[str]) -> tuple[str, ...]:
    """Returns the non-empty normalised answers, the most frequent first, then in alphabetical order."""
    counts = collections.Counter(map(normalize_answer, answers))
    return tuple(sorted(filter(None, counts), key=lambda answer: (-counts[answer], answer)))


def _places(vocabulary: Sequence[str]) -> Mapping[str, int]:
    """Returns the index of each normalised answer in the vocabulary."""
    if isinstance(vocabulary, str) or not vocabulary:
        raise ValueError(f"the vocabulary must be a sequence of at least one answer, got {vocabulary!r}")
    places: dict[str, int] = {}
    for place, answer in enumerate(vocabulary):
        first = places.setdefault(normalize_answer(answer), place)
        if first != place:
            raise ValueError(f"the answers {vocabulary[first]!r} and {answer!r} of the vocabulary are the same")
    return places


def _check_texts(answers: Sequence[Sequence[str]]) -> None:
    for question, given in enumerate(answers):
        if isinstance(given, str):
            raise ValueError(f"the answers to question {question} must be a sequence of texts, got the text {given!r}")


def _check_answers(answers: Sequence[Sequence[str]]) -> None:
    _check_texts(answers)
    for question, given in enumerate(answers):
        if not given:
            raise ValueError(f"question {question} has no answers to score its prediction by")
