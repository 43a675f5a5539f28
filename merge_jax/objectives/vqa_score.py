"""Accuracy of answers to questions on images, as VQA counts it, and vocabularies of answers.

Source: the official script, vqaEval.py of GT-Vision-Lab/VQA as it stands since 2021, of Antol et al.,
arXiv:1505.00468. It gives percentages.
"""

import collections
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merge_jax.checks import check_at_least_one

__all__ = [
    "Coverage",
    "answer_accuracy",
    "answer_coverage",
    "answer_indices",
    "answer_vocabulary",
    "normalize_answer",
    "vqa_scores",
]

_MARKS = frozenset(';/[]"{}()=+\\_-><@`,?!')
_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")
_MAX_PERIODS = 32  # The script hands re.UNICODE, which is 32, to re.sub in the place of a count.
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
    """Returns the contractions by what lacks one of their apostrophes.

    The official table has four entries more, with a capital I, that no text in lower case meets, and two that change
    nothing. "somebody'd" stands the wrong way round in it.
    """
    table = {"somebody'd": "somebodyd"}
    for ending, words in _WORDS_BEFORE.items():
        for whole in (word + ending for word in words.split()):
            table.update({whole[:i] + whole[i + 1 :]: whole for i, letter in enumerate(whole) if letter == "'"})
    return table


_CONTRACTIONS = _contractions()


def normalize_answer(text: str) -> str:
    """Returns the text as the official script compares it with others.

    Each of `; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? !` becomes a space; it goes without one if it stands next to a
    space anywhere in the text, and all do if there is a comma between digits. Periods that no digit follows go, the
    first 32 of them. Then, in lower case, the words "none" and "zero" to "ten" become digits, English articles go, and
    contractions get an apostrophe back. Digits are ASCII's.

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
    """Returns the accuracy in [0, 1] of an answer that `count` of n annotators gave.

    `mean_a min(1, o_a / 3)`, with `o_a` the number of annotators other than a who gave it, so that an answer of 4 is
    right and one of 1, 2 or 3 of 10 counts 0.3, 0.6 or 0.9. As the official script does, it wants three others of few
    annotators too: nobody gets more than 1/3 of two, 2/3 of three. Of a single one, where that would be 0, it is
    `count`, an exact match: our choice, for sets with one answer to a question.
    """
    if annotators == 1:
        return float(count)
    givers, rest = count * min(1, (count - 1) / 3), (annotators - count) * min(1, count / 3)
    return (givers + rest) / annotators


def vqa_scores(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], kinds: Sequence[str] | None = None
) -> dict[str, float]:
    """Returns `{"accuracy"}`, the mean of `answer_accuracy` over all questions, a fraction in [0, 1].

    As in the official script, prediction and answers are compared once normalised where the answers to a question
    differ, and as they are where all are the same text: there "Yes" is not "yes", and a prediction from a vocabulary
    of normalised answers is wrong where all say "none". The only answer to a question is normalised, our choice, since
    nobody has agreed on how it is written.

    Args:
      predictions: one of each question.
      answers: of each question, what each annotator answered, the same answer as often as it was given.
      kinds: the kind of each question; adds `accuracy_<kind>`, the mean over its questions, of each kind.

    Raises:
      ValueError: there are no questions, or not as many predictions or kinds as questions, or a question has no
        answers, or its answers are a single text.
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
    """Returns the `size` most frequent normalised answers, or all where there are fewer, the commonest first.

    Every answer of every annotator counts, but those that are empty once normalised. Equally frequent ones stand in
    alphabetical order.

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
    """Returns the place in the vocabulary of every answer, `[N, A]`, int32, and the fraction of questions with one.

    A is the largest number of answers to a question. It is -1 where an annotator's answer is not in the vocabulary,
    and where there is no annotator. Answers and vocabulary are compared once normalised. `answer_coverage` tells what
    a vocabulary lacks.

    Raises:
      ValueError: answers that are a single text, or a vocabulary that is empty or has one answer twice.
    """
    places = _places(vocabulary)
    _check_texts(answers)
    indices = np.full((len(answers), max(map(len, answers), default=0) or 1), -1, np.int32)
    for row, given in zip(indices, answers, strict=True):
        row[: len(given)] = [places.get(normalize_answer(answer), -1) for answer in given]
    return indices, float((indices >= 0).any(axis=1).mean()) if len(answers) else 0.0


@dataclass(frozen=True)
class Coverage:
    """What a vocabulary has of the answers to questions; `str()` of it is a sentence for a report or an error.

    Attributes:
      size: of the vocabulary.
      questions: how many there are.
      uncovered: how many of them have no answer in the vocabulary.
      missing: the normalised answers to those, the commonest first.
    """

    size: int
    questions: int
    uncovered: int
    missing: tuple[str, ...]

    def __str__(self) -> str:
        """Returns the sentence, with the five commonest of the missing."""
        subject = f"the vocabulary of {self.size} answers covers"
        if not self.uncovered:
            return f"{subject} an answer of each of {self.questions} questions"
        shown = f"; the commonest missing are {', '.join(map(repr, self.missing[:5]))}" if self.missing else ""
        return f"{subject} none of the answers of {self.uncovered} of {self.questions} questions{shown}"


def answer_coverage(answers: Sequence[Sequence[str]], vocabulary: Sequence[str]) -> Coverage:
    """Returns what the vocabulary has of the answers.

    Raises:
      ValueError: as `answer_indices`.
    """
    indices, _ = answer_indices(answers, vocabulary)
    uncovered = np.flatnonzero((indices < 0).all(axis=1))
    missing = _commonest(answer for question in uncovered.tolist() for answer in answers[question])
    return Coverage(len(vocabulary), len(answers), len(uncovered), missing)


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _accuracy(prediction: str, answers: Sequence[str]) -> float:
    prediction, given = _plain(prediction), [_plain(answer) for answer in answers]
    if len(given) == 1 or len(set(given)) > 1:
        prediction, given = normalize_answer(prediction), [normalize_answer(answer) for answer in given]
    return answer_accuracy(given.count(prediction), len(given))


def _commonest(answers: Iterable[str]) -> tuple[str, ...]:
    """Returns the normalised answers that are not empty, the commonest first, then in alphabetical order."""
    counts = collections.Counter(map(normalize_answer, answers))
    return tuple(sorted(filter(None, counts), key=lambda answer: (-counts[answer], answer)))


def _places(vocabulary: Sequence[str]) -> Mapping[str, int]:
    """Returns the place of every normalised answer of the vocabulary."""
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
