"""Texts and questions from your own files."""

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from merge_jax.data.text.text_set import LabelledTexts, Question, TextSet
from merge_jax.paths import natural_order, near_misses

__all__ = ["load_questions", "load_text_set", "load_texts"]

Column = str | int
"""A column by its name in the header, or by its position, from 0, in a file without a header."""

_SUFFIXES = (".csv", ".jsonl", ".tsv")
# The length of 64-bit integers.
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


class _Row(NamedTuple):
    line: int
    text: str
    label: str


def load_texts(
    path: Path | str,
    *,
    text: Column | Sequence[Column] = "text",
    label: Column = "label",
    classes: Sequence[str] | None = None,
    first_label: int | None = None,
) -> tuple[LabelledTexts, tuple[str, ...]]:
    """Returns the texts of a UTF-8 `.tsv`, `.csv` or `.jsonl` file, and their class names.

    Columns are named by the header or the keys of a JSON line, or, in a file without a header, numbered from 0:
    `text=(1, 2), label=0`. Several text columns are joined by a space. Quotes are literal in a `.tsv`, as in GLUE, and
    enclose fields in a `.csv`.

    Labels are one of

    - integers, from `first_label` on, by default the smallest one: 1 to 4 become 0 to 3. Each between the smallest and
      the largest must occur, unless `classes` and `first_label` are given. They name the classes by default;
    - names, numbered in natural order, or in the order of `classes` if given. Integers count as names if all of
      `classes` are integers, such as those that this function returns for integers.

    Raises:
      ValueError: the file is missing, has another suffix, is not UTF-8, or has no rows; a line is broken or has another
        number of columns than the first; a column is missing; a text is empty; labels do not fit each other or the
        classes, or are all the same.
    """
    columns = _columns(text, label)
    return _labelled(Path(path), _rows(Path(path), *columns), classes, first_label)


def load_text_set(
    train_path: Path | str,
    test_path: Path | str,
    *,
    name: str | None = None,
    text: Column | Sequence[Column] = "text",
    label: Column = "label",
    classes: Sequence[str] | None = None,
    first_label: int | None = None,
) -> TextSet:
    """Returns a set from two files as `load_texts`, with the first's classes; `name` defaults to its folder.

    Raises:
      ValueError: as `load_texts`; the test file has a label that the training file lacks.
    """
    columns = _columns(text, label)
    train_path, test_path = Path(train_path), Path(test_path)
    train_rows, test_rows = _rows(train_path, *columns), _rows(test_path, *columns)
    train, names = _labelled(train_path, train_rows, classes, first_label)
    if classes is not None and first_label is None and _are_whole(row.label for row in train_rows):
        first_label = min(int(row.label) for row in train_rows)
    test, _ = _labelled(test_path, test_rows, names, first_label)
    return TextSet(train_path.resolve().parent.name if name is None else name, train, test, names)


def load_questions(path: Path | str) -> tuple[Question, ...]:
    """Returns the questions of a file in SQuAD's official layout, 1.1 or 2.0.

    That is `{"data": [{"paragraphs": [{"context": ..., "qas": [{"question": ..., "answers": [{"text": ...,
    "answer_start": ...}], "is_impossible": ...}]}]}]}`; the last key is absent if every question has an answer.
    Repeated answers are kept once.

    Raises:
      ValueError: the file is missing, not JSON, in another layout, or without questions; an answer is not at its
        position in the passage.
    """
    path = Path(path)
    text = _content(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    questions = []
    for article, in_article in _items(content, "data", str(path)):
        for paragraph, in_paragraph in _items(article, "paragraphs", in_article):
            passage = _entry(paragraph, "context", str, in_paragraph)
            questions.extend(_question(passage, entry, at) for entry, at in _items(paragraph, "qas", in_paragraph))
    if not questions:
        raise ValueError(f"{path} has no questions")
    return tuple(questions)


def _columns(text: Column | Sequence[Column], label: Column) -> tuple[list[Column], Column]:
    texts: list[Column] = [text] if isinstance(text, (str, int)) else list(text)
    if not texts:
        raise ValueError("text must name at least one column")
    if len({type(column) for column in (*texts, label)}) > 1:
        raise ValueError(f"columns must be all names or all numbers, got text {text!r} and label {label!r}")
    if len({*texts, label}) < len(texts) + 1:
        raise ValueError(f"columns must differ, got text {text!r} and label {label!r}")
    return texts, label


def _rows(path: Path, texts: list[Column], label: Column) -> list[_Row]:
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(_SUFFIXES)}")
    read = _json_rows if path.suffix.lower() == ".jsonl" else _table_rows
    rows = read(path, texts, label)
    if not rows:
        raise ValueError(f"{path} has no rows")
    for row in rows:
        if not row.text.strip():
            raise ValueError(f"{path}, line {row.line}: the text is empty")
        if not row.label:
            raise ValueError(f"{path}, line {row.line}: the label is empty")
    return rows


def _table_rows(path: Path, texts: list[Column], label: Column) -> list[_Row]:
    by_name = isinstance(label, str)
    lines = _table(path)
    if not lines:
        return []
    first_line, first = lines[0]
    positions = [_position(path, column, first) for column in (*texts, label)]
    rows = []
    for line, fields in lines[by_name:]:
        if len(fields) != len(first):
            raise ValueError(
                f"{path}, line {line}: {len(fields)} columns, expected {len(first)} as in line {first_line}"
            )
        *found, found_label = (fields[position].strip() for position in positions)
        rows.append(_Row(line, " ".join(found), found_label))
    return rows


def _table(path: Path) -> list[tuple[int, list[str]]]:
    """Returns the fields of each non-empty row, with its (first) line."""
    content = io.StringIO(_content(path), newline="")
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(content, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(content, strict=True)
    lines, line = [], 1
    try:
        for fields in reader:
            if fields:
                lines.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
    return lines


def _position(path: Path, column: Column, first: list[str]) -> int:
    if isinstance(column, int):
        if not 0 <= column < len(first):
            raise ValueError(f"{path} has no column {column}, only 0 to {len(first) - 1}")
        return column
    names = [name.strip() for name in first]
    if names.count(column) != 1:
        found = "twice the" if column in names else "no"
        # The supposed header may be a long text.
        hint = near_misses(column, [name if len(name) <= 40 else f"{name[:37]}..." for name in names])
        raise ValueError(
            f"{path} has {found} column {column!r}; {hint} (without a header, columns go by number from 0)"
        )
    return names.index(column)


def _json_rows(path: Path, texts: list[Column], label: Column) -> list[_Row]:
    if isinstance(label, int):
        raise ValueError(f"{path}: columns of JSON lines have names, got numbers {[*texts, label]}")
    rows = []
    # Not splitlines, which also splits at characters that JSON allows inside strings.
    for line, content in enumerate(_content(path).split("\n"), start=1):
        if not content.strip():
            continue
        at = f"{path}, line {line}"
        try:
            entries = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{at}: no JSON: {error}") from error
        found = [_entry(entries, str(column), str, at).strip() for column in texts]
        value = _entry(entries, label, (str, int), at)
        rows.append(_Row(line, " ".join(found), str(value).strip()))
    return rows


def _labelled(
    path: Path, rows: list[_Row], classes: Sequence[str] | None, first_label: int | None
) -> tuple[LabelledTexts, tuple[str, ...]]:
    if classes is not None and (isinstance(classes, str) or len(set(classes)) < max(len(classes), 2)):
        raise ValueError(f"classes must be two or more different names, got {classes!r}")
    whole = _are_whole(row.label for row in rows)
    if classes is not None and (not whole or _are_whole(classes)):
        labels, names = _by_name(path, rows, tuple(classes)), tuple(classes)
    elif whole:
        labels, names = _by_number(path, rows, classes, first_label)
    else:
        _check_all_names(path, rows)
        names = tuple(sorted({row.label for row in rows}, key=natural_order))
        labels = _by_name(path, rows, names)
    if len(names) == 1:
        raise ValueError(f"{path} has one class alone, {names[0]!r}")
    return LabelledTexts(tuple(row.text for row in rows), np.array(labels, np.int32)), names


def _are_whole(labels: Iterable[str]) -> bool:
    return all(_WHOLE.fullmatch(label) for label in labels)


def _check_all_names(path: Path, rows: list[_Row]) -> None:
    """Raises ValueError if only some labels are numbers: the others are probably mistakes, not names."""
    number = next((row for row in rows if _are_whole([row.label])), None)
    if number is not None:
        other = next(row for row in rows if not _are_whole([row.label]))
        raise ValueError(
            f"{path}, line {other.line}: the label {other.label!r} must be a whole number, as in line {number.line}"
        )


def _by_name(path: Path, rows: list[_Row], names: tuple[str, ...]) -> list[int]:
    number = {name: i for i, name in enumerate(names)}
    for row in rows:
        if row.label not in number:
            hint = near_misses(row.label, names)
            raise ValueError(f"{path}, line {row.line}: the label {row.label!r} is none of the classes; {hint}")
    return [number[row.label] for row in rows]


def _by_number(
    path: Path, rows: list[_Row], classes: Sequence[str] | None, first_label: int | None
) -> tuple[list[int], tuple[str, ...]]:
    found = [int(row.label) for row in rows]
    present = sorted(set(found))
    first = present[0] if first_label is None else first_label
    count = present[-1] - first + 1 if classes is None else len(classes)
    for row, label in zip(rows, found, strict=True):
        if not first <= label < first + count:
            raise ValueError(
                f"{path}, line {row.line}: the label {label} must lie in {first} to {first + count - 1}, for"
                f" {count} classes"
            )
    if len(present) < count and (classes is None or first_label is None):
        # If a label is missing at either end, the first class is unknown.
        shown = ", ".join(map(str, present[:20])) + (", ..." if len(present) > 20 else "")
        raise ValueError(
            f"{path}: the labels {shown} leave out some of {count} classes; if that is meant, give classes and"
            " first_label"
        )
    names = tuple(map(str, range(first, first + count))) if classes is None else tuple(classes)
    return [label - first for label in found], names


def _content(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing or not a file")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8, at the byte {content[error.start]:#04x}") from error


def _question(passage: str, entry: Any, at: str) -> Question:
    question = _entry(entry, "question", str, at)
    answers, starts = [], []
    for answer, place in _items(entry, "answers", at):
        text, start = _entry(answer, "text", str, place), _entry(answer, "answer_start", int, place)
        found = passage[start : start + len(text)] if start >= 0 else ""
        if not text or found != text:
            raise ValueError(f"{place}: the answer {text!r} is not in its passage at {start}, where {found!r} stands")
        answers.append(text)
        starts.append(start)
    impossible = _entry(entry, "is_impossible", bool, at) if "is_impossible" in entry else False
    if impossible == bool(answers):
        raise ValueError(f"{at}: {len(answers)} answers to a question with is_impossible {impossible}")
    return Question(question, passage, tuple(dict.fromkeys(answers)), starts[0] if starts else -1)


def _items(entries: Any, key: str, at: str) -> list[tuple[Any, str]]:
    """Returns the items of a JSON list, each with its position."""
    return [(item, f"{at}, {key} {i}") for i, item in enumerate(_entry(entries, key, list, at))]


def _entry(entries: Any, key: str, kind: Any, at: str) -> Any:
    if not isinstance(entries, dict):
        raise ValueError(f"{at}: expected a JSON object, got {type(entries).__name__}")
    if key not in entries:
        raise ValueError(f"{at}: no entry {key!r}; {near_misses(key, entries)}")
    value = entries[key]
    # JSON's booleans are integers in Python.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{at}: the entry {key!r} must be {kinds}, got {type(value).__name__}")
    return value
