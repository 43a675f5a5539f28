"""Exact match and F1 of answers to questions, as SQuAD v2 counts them.

Source: the official script, evaluate-v2.0.py, of Rajpurkar et al., arXiv:1806.03822. It gives percentages.
"""

import collections
import re
import string
from collections.abc import Sequence

__all__ = ["exact_match", "f1", "normalize_answer", "squad_scores"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Returns the text in lower case without ASCII punctuation, English articles and superfluous white space.

    >>> normalize_answer("The  U.S. Army")
    'us army'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if the normalised prediction is one of the normalised answers, else 0.

    A question without an answer has no `answers`; the prediction that is right is then empty. Answers that are empty
    once normalised do not count.

    Raises:
      ValueError: `answers` is a single text.
    """
    return float(normalize_answer(prediction) in _counted(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the largest F1 of the prediction's words against those of an answer, in [0, 1].

    `2 p r / (p + r)`, with the number of words in common over that of the prediction, `p`, and over that of the
    answer, `r`; words that stand twice count twice. Where either has no words it is 1 if both have none, else 0. For a
    question without an answer see `exact_match`.

    Raises:
      ValueError: `answers` is a single text.
    """
    return max(_f1(normalize_answer(prediction).split(), answer.split()) for answer in _counted(answers))


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns `{"exact_match", "f1"}`, the means over all questions, fractions in [0, 1].

    Args:
      predictions: one of each question, empty for "no answer".
      answers: of each question every text that counts as right; none for a question without an answer.

    Raises:
      ValueError: there are no questions, or not as many predictions as questions, or answers are a single text.
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


def _counted(answers: Sequence[str]) -> list[str]:
    if isinstance(answers, str):
        raise ValueError(f"answers must be a sequence of texts, got the text {answers!r}")
    return [normalized for answer in answers if (normalized := normalize_answer(answer))] or [""]


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = (collections.Counter(prediction) & collections.Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer))
