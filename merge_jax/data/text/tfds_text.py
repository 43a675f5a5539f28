"""Text sets of TensorFlow Datasets (TFDS), labelled texts and questions, without TensorFlow."""

import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from merge_jax.data.text.imdb import IMDB, prepare_imdb
from merge_jax.data.text.squad import SQUAD, prepare_squad
from merge_jax.data.text.text_set import LabelledTexts, Question, QuestionSet, TextSet
from merge_jax.data.tfds import one_line, open_split, prepare, quiet_tfds, root_folder

__all__ = ["load_tfds_questions", "load_tfds_texts"]

_TEST_SPLITS = ("test", "validation")
_HIDDEN = -1


def load_tfds_texts(
    name: str = IMDB, data_dir: Path | str | None = None, *, text: str | Sequence[str] = "text"
) -> TextSet:
    """Returns the TFDS text classification set `name`, prepared in `data_dir` at the first call.

    The training split is "train"; the test split is "test", or "validation" if "test" has no labels. `data_dir`
    defaults to TFDS's folder, `~/tensorflow_datasets`. Official TFDS reads the prepared set: `tfds.data_source(name)`.

    IMDb, `imdb_reviews`, needs no TensorFlow: its archive, `aclImdb_v1.tar.gz`, is read from
    `<data_dir>/downloads/manual/` if it is there, and downloaded otherwise. Your own archive may hold fewer texts.
    Other sets may need TensorFlow, depending on their TFDS builder. Texts are unchanged, including `<br />` in IMDb.

    Args:
      name: the set's name, with its config if it has several: `glue/sst2`.
      data_dir: the folder of all sets.
      text: the text feature, such as `"sentence"` of `glue/sst2`; or several, joined by a space, such as `("title",
        "description")` of `ag_news_subset`.

    Raises:
      ValueError: the set is unknown, does not consist of texts and labels, cannot be downloaded or prepared, or was
        prepared from another archive than the current one; the archive is broken, or a text is not UTF-8.
    """
    keys = (text,) if isinstance(text, str) else tuple(text)
    check = functools.partial(_check_texts, keys=keys)
    builder = _prepared(name, root_folder(data_dir), prepare_imdb if name == IMDB else prepare, check)
    splits = list(builder.info.splits)
    train_and_test = None
    if "train" in splits:
        # GLUE does not publish its test labels.
        tests = (_read_texts(builder, split, keys) for split in _TEST_SPLITS if split in splits)
        test = next((texts for texts in tests if (texts.labels != _HIDDEN).any()), None)
        train_and_test = None if test is None else (_read_texts(builder, "train", keys), test)
    if train_and_test is None:
        raise ValueError(f"{name} needs a split 'train' and one of 'test' and 'validation' with labels, found {splits}")
    return TextSet(name, *train_and_test, tuple(builder.info.features["label"].names))


def load_tfds_questions(name: str = "squad/v2.0", data_dir: Path | str | None = None) -> QuestionSet:
    """Returns the TFDS set `name` of questions on passages, prepared in `data_dir` at the first call.

    The training split is "train"; the test split is "test", or "validation" if there is none. `data_dir` defaults to
    TFDS's folder, `~/tensorflow_datasets`. Official TFDS reads the prepared set: `tfds.data_source(name)`.

    The files of SQuAD, `train-v2.0.json` and `dev-v2.0.json`, are read from `<data_dir>/downloads/manual/` if they are
    there, and downloaded otherwise. Your own files may hold fewer questions. Other sets with SQuAD's features can be
    read too, if their TFDS builder can prepare them.

    If a first answer does not begin at the stated position, the nearest occurrence is used (our choice: a start a few
    characters off would teach another span).

    Raises:
      ValueError: the set is unknown, does not consist of questions on passages, cannot be downloaded or prepared, or
        was prepared from other files than the current ones; a file is broken, or an answer is not in its passage.
    """
    builder = _prepared(name, root_folder(data_dir), prepare_squad if name in SQUAD else prepare, _check_questions)
    splits = list(builder.info.splits)
    test = next((split for split in _TEST_SPLITS if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{name} needs a split 'train' and one of 'test' and 'validation', found {splits}")
    return QuestionSet(name, _read_questions(builder, "train"), _read_questions(builder, test))


def _prepared(name: str, root: Path, prepare_set: Callable[..., Any], check: Callable[[str, Any], None]) -> Any:
    # TFDS would stop searching its older sets, such as GLUE, at the first one that needs a missing package.
    import tensorflow_datasets.question_answering
    import tensorflow_datasets.text  # noqa: F401

    with quiet_tfds():
        return prepare_set(name, root, check)


def _check_texts(name: str, features: Any, keys: Sequence[str]) -> None:
    import tensorflow_datasets as tfds

    found = _found(features)
    label = isinstance(found.get("label"), tfds.features.ClassLabel)
    if not keys or not label or not all(isinstance(found.get(key), tfds.features.Text) for key in keys):
        raise ValueError(
            f"{name} needs features {list(keys)}, which are Text, and 'label', a ClassLabel, found {_types(found)}"
            " (see the option `text`)"
        )


def _check_questions(name: str, features: Any) -> None:
    import tensorflow_datasets as tfds

    found = _found(features)
    answers = found.get("answers")
    parts = _found(answers.feature) if isinstance(answers, tfds.features.Sequence) else {}
    texts = (found.get("question"), found.get("context"), parts.get("text"))
    if not all(isinstance(text, tfds.features.Text) for text in texts) or "answer_start" not in parts:
        raise ValueError(
            f"{name} needs features 'question' and 'context', which are Text, and 'answers', a Sequence of 'text' and"
            f" 'answer_start', found {_types(found)}"
        )


def _found(features: Any) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    return dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}


def _types(features: dict[str, Any]) -> dict[str, str]:
    return {key: type(features[key]).__name__ for key in sorted(features)}


def _examples(builder: Any, split: str, unit: str) -> Iterator[dict[str, Any]]:
    source = open_split(builder, split)
    for index in tqdm(range(len(source)), desc=f"reading {builder.name} {split}", unit=unit, delay=1, leave=False):
        yield source[index]


def _read_texts(builder: Any, split: str, keys: Sequence[str]) -> LabelledTexts:
    texts, labels = [], []
    for example in _examples(builder, split, "text"):
        texts.append(" ".join(_decoded(example[key], f"{builder.name} {split}", len(texts)) for key in keys))
        labels.append(example["label"])
    return LabelledTexts(texts, np.array(labels, np.int32))


def _read_questions(builder: Any, split: str) -> list[Question]:
    where = f"{builder.name} {split}"
    questions: list[Question] = []
    for example in _examples(builder, split, "question"):
        index = len(questions)
        # Questions on a passage share it.
        passage = sys.intern(_decoded(example["context"], where, index))
        answers = tuple(_decoded(answer, where, index) for answer in example["answers"]["text"])
        start = _start(passage, answers[0], int(example["answers"]["answer_start"][0])) if answers else -1
        if answers and start < 0:
            raise ValueError(f"{where}: the answer {answers[0]!r} of question {index} is not in its passage")
        questions.append(Question(_decoded(example["question"], where, index), passage, answers, start))
    return questions


def _start(passage: str, answer: str, start: int) -> int:
    """Returns the start of the answer nearest to `start`; -1 if it is not in the passage."""
    if start >= 0 and passage.startswith(answer, start):
        return start
    found = [match.start() for match in re.finditer(f"(?={re.escape(answer)})", passage)]
    return min(found, key=lambda position: abs(position - start), default=-1)


def _decoded(text: bytes | str, where: str, index: int) -> str:
    try:
        # TFDS's mock data are str.
        return text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the text of example {index} is not UTF-8 ({one_line(error)})") from error
