"""Images with questions or captions, before conversion to arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge_jax.data.streams import Table

__all__ = ["CaptionSet", "CaptionedImages", "VisualQuestionSet", "VisualQuestions"]


@dataclass(frozen=True)
class VisualQuestions:
    """Questions on images.

    Attributes:
      images: uint8 `[M, H, W, C]`, in memory or read on access.
      image: `[N]`, int32: the image of each question.
      questions: N questions.
      answers: each question's answers by any number of annotators, repeated as often as given.
      kinds: the kind of each question, for separate scores; None if there is only one.
    """

    images: Table
    image: np.ndarray
    questions: Sequence[str]
    answers: Sequence[Sequence[str]]
    kinds: Sequence[str] | None = None


@dataclass(frozen=True)
class VisualQuestionSet:
    """A set of questions on images.

    Attributes:
      name: the name of the set.
      train: the training examples.
      test: the test examples, read once at the end.
    """

    name: str
    train: VisualQuestions
    test: VisualQuestions


@dataclass(frozen=True)
class CaptionedImages:
    """Images and captions; an image and a caption match if they have the same group.

    With one group per image, each image has its own captions; with one group per class, all its images match its name.

    Attributes:
      images: uint8 `[M, H, W, C]`, in memory or read on access.
      image_group: `[M]`, int32: the group of each image.
      captions: K texts.
      caption_group: `[K]`, int32: the group of each caption.
    """

    images: Table
    image_group: np.ndarray
    captions: Sequence[str]
    caption_group: np.ndarray

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns image and caption indices of all N matching pairs, both `[N]`, int32, image by image."""
        order = np.argsort(self.caption_group, kind="stable")
        groups = self.caption_group[order]
        first, last = (np.searchsorted(groups, self.image_group, side) for side in ("left", "right"))
        counts = last - first
        image = np.repeat(np.arange(len(counts)), counts)
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return image.astype(np.int32), order[np.repeat(first, counts) + offsets].astype(np.int32)


@dataclass(frozen=True)
class CaptionSet:
    """A set of images with captions.

    Attributes:
      name: the name of the set.
      train: the training examples.
      test: the test examples, read once at the end.
    """

    name: str
    train: CaptionedImages
    test: CaptionedImages
