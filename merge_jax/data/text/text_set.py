"""Labelled texts, and questions on passages, before tokenisation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge_jax.data.labels import check_labels

__all__ = ["LabelledTexts", "Question", "QuestionSet", "TextSet"]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with class labels.

    Attributes:
      texts: N texts.
      labels: `[N]`, int32, in `[0, classes)`.
    """

    texts: Sequence[str]
    labels: np.ndarray


@dataclass(frozen=True)
class TextSet:
    """A set of texts to classify.

    Attributes:
      name: the name of the set.
      train: the training examples.
      test: the test examples, read once at the end.
      classes: the class names, in label order.
    """

    name: str
    train: LabelledTexts
    test: LabelledTexts
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises ValueError as `check_labels`: an index out of range would be clipped or NaN in a compiled loss."""
        for split, part in (("train", self.train), ("test", self.test)):
            check_labels(f"{self.name} {split}", part.labels, len(part.texts), len(self.classes))


@dataclass(frozen=True)
class Question:
    """A question on a passage.

    Attributes:
      question: the question.
      passage: the text that contains its answer, if any.
      answers: all correct answers; training uses the first. Empty for a question without an answer.
      start: the position of the first character of `answers[0]` in the passage; -1 without an answer.
    """

    question: str
    passage: str
    answers: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class QuestionSet:
    """A set of questions on passages.

    Attributes:
      name: the name of the set.
      train: the training examples.
      test: the test examples, read once at the end.
    """

    name: str
    train: Sequence[Question]
    test: Sequence[Question]
