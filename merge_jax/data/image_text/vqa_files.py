"""VQA v2.0, open questions about MSCOCO photos, from its official files."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from merge_jax.checks import check_at_least_one
from merge_jax.data.image_text.image_text_set import VisualQuestions, VisualQuestionSet
from merge_jax.data.image_text.json_files import check_once, columns, entry, files_in, read_json
from merge_jax.data.images.image_files import check_inside, check_unreadable, image_table

__all__ = ["AskedOfFiles", "load_vqa"]

_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
_ANNOTATIONS = "v2_mscoco_{}_annotations.json"
_IMAGE = "COCO_{}_{:012d}.jpg"


class AskedOfFiles(NamedTuple):
    """N questions on images, named as in an annotation file."""

    images: list[str]
    questions: list[str]
    answers: list[tuple[str, ...]]
    kinds: list[str] | None

    def on_images(self, folder: Path, image_size: int, unreadable: str) -> VisualQuestions:
        """Returns the questions with usable images; raises ValueError as `image_table`."""
        table, image = image_table(folder, self.images, image_size, unreadable)
        kept = np.flatnonzero(image >= 0).tolist()
        return VisualQuestions(
            table,
            image[kept],
            [self.questions[i] for i in kept],
            [self.answers[i] for i in kept],
            None if self.kinds is None else [self.kinds[i] for i in kept],
        )


def load_vqa(
    folder: Path | str,
    *,
    image_size: int,
    split_names: Sequence[str] = ("train2014", "val2014"),
    unreadable: str = "error",
) -> VisualQuestionSet:
    """Returns VQA v2.0 (Goyal et al. 2017) from a folder of official files.

    For each split these are `v2_OpenEnded_mscoco_<split>_questions.json`, `v2_mscoco_<split>_annotations.json`, and the
    images of MSCOCO, `<split>/COCO_<split>_<12 digits>.jpg`. Each question's ten answers are unchanged, and its kind is
    `"yes/no"`, `"number"` or `"other"`. Images are read on access.

    Args:
      folder: the folder of the files; no link may lead out of it.
      image_size: S; the central square of every image is scaled to S x S pixels (bilinear).
      split_names: the training and test splits; answers of the official test splits are not public.
      unreadable: "error" stops at a missing or unreadable image. "skip" reads every image once, and drops unreadable
        ones with their questions.

    Raises:
      ValueError: a file is missing, broken or has another layout; questions and annotations do not match, an id appears
        twice, or a question is empty or without an answer; an image is missing or unreadable.
    """
    check_at_least_one(image_size=image_size)
    check_unreadable(unreadable)
    if isinstance(split_names, str) or len(split_names) != 2 or len(set(split_names)) != 2:
        raise ValueError(f"split_names must be two different names, for training and testing, got {split_names!r}")
    names = [kind.format(split) for split in split_names for kind in (_QUESTIONS, _ANNOTATIONS)]
    root, files = files_in(folder, names)
    for split in split_names:
        check_inside(root, root / split)
    # All annotations before the first image, since they are fast to read and most likely wrong.
    read = [_read(split, *pair) for split, pair in zip(split_names, (files[:2], files[2:]), strict=True)]
    train, test = (
        part.on_images(root / split, image_size, unreadable) for split, part in zip(split_names, read, strict=True)
    )
    return VisualQuestionSet("vqa_v2", train, test)


def _read(split: str, questions_file: Path, annotations_file: Path) -> AskedOfFiles:
    kinds = {"question_id": int, "image_id": int, "question": str}
    asked = columns(read_json(questions_file), "questions", kinds, questions_file)
    kinds = {"question_id": int, "image_id": int, "answer_type": str, "answers": list}
    given = columns(read_json(annotations_file, _answer_alone), "annotations", kinds, annotations_file)
    check_once(asked["question_id"], "question ids", questions_file)
    check_once(given["question_id"], "question ids", annotations_file)
    row_of = {question: row for row, question in enumerate(given["question_id"])}
    _check_ids(asked["question_id"], row_of, "annotation", questions_file, annotations_file)
    _check_ids(row_of, set(asked["question_id"]), "question", annotations_file, questions_file)
    rows = [row_of[question] for question in asked["question_id"]]
    for position, (question, image, row) in enumerate(zip(asked["question_id"], asked["image_id"], rows, strict=True)):
        if image != given["image_id"][row]:
            raise ValueError(
                f"question {question} is on image {image} in {questions_file}, but on {given['image_id'][row]} in"
                f" {annotations_file}"
            )
        if not asked["question"][position].strip():
            raise ValueError(f"{questions_file}, questions {position}: the question is empty")
        _check_answers(given["answers"][row], row, annotations_file)
    return AskedOfFiles(
        [_IMAGE.format(split, image) for image in asked["image_id"]],
        [question.strip() for question in asked["question"]],
        [tuple(given["answers"][row]) for row in rows],
        [sys.intern(given["answer_type"][row]) for row in rows],
    )


def _answer_alone(entries: dict[str, Any]) -> Any:
    """Replaces an answer object by its text: there are 6.6 million, with few different texts."""
    answer = entries.get("answer")
    return sys.intern(answer) if isinstance(answer, str) and "question_id" not in entries else entries


def _check_ids(ids: Any, others: Any, noun: str, file: Path, other_file: Path) -> None:
    alone = [id_ for id_ in ids if id_ not in others]
    if alone:
        raise ValueError(
            f"question {alone[0]} of {file} has no {noun} in {other_file} ({len(alone)} of {len(ids)} have none)"
        )


def _check_answers(answers: list[Any], row: int, file: Path) -> None:
    if not answers:
        raise ValueError(f"{file}, annotations {row}: there are no answers")
    for position, answer in enumerate(answers):
        if not isinstance(answer, str):
            entry(answer, "answer", str, file, ("annotations", row), ("answers", position))
