import csv
import json
import re

import numpy as np
import pytest

from merge_jax.data.text.text_files import load_questions, load_text_set, load_texts

TEXTS = ['a "good" film', "café, and more", "the third", '"un closed', "a fifth"]


def write_table(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows(rows)
        else:
            file.writelines("\t".join(map(str, row)) + "\n" for row in rows)
    return path


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def write(path, columns, rows):
    if path.suffix == ".jsonl":
        return write_lines(path, [dict(zip(columns, row, strict=True)) for row in rows])
    return write_table(path, [columns, *rows])


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".CSV"])
def test_texts_and_names_are_read(suffix, tmp_path):
    labels = ["pos", "neg", "neg", "so so", "pos"]
    path = tmp_path / f"train{suffix.lower()}"
    write(path, ["label", "id", "text"], [[labels[i], i, TEXTS[i]] for i in range(5)])
    path = path.rename(path.with_suffix(suffix))
    texts, classes = load_texts(str(path))
    assert tuple(texts.texts) == tuple(TEXTS)
    assert classes == ("neg", "pos", "so so")
    assert texts.labels.dtype == np.int32
    np.testing.assert_array_equal(texts.labels, [1, 0, 0, 2, 1])

    ordered, classes = load_texts(path, classes=["so so", "neg", "pos", "unseen"])
    assert classes == ("so so", "neg", "pos", "unseen")
    np.testing.assert_array_equal(ordered.labels, [2, 1, 1, 0, 2])


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
@pytest.mark.parametrize("first", [0, 1, -1])
def test_whole_numbers_count_from_the_smallest(suffix, first, tmp_path):
    numbers = np.array([2, 0, 1, 1, 2])
    path = tmp_path / f"a{suffix}"
    write(path, ["sentence", "score"], [[text, int(n) + first] for text, n in zip(TEXTS, numbers, strict=True)])
    texts, classes = load_texts(path, text="sentence", label="score")
    np.testing.assert_array_equal(texts.labels, numbers)
    assert classes == tuple(str(first + i) for i in range(3))
    # Whole numbers are names once they are given as such.
    texts, _ = load_texts(path, text="sentence", label="score", classes=classes[::-1])
    np.testing.assert_array_equal(texts.labels, 2 - numbers)
    texts, classes = load_texts(path, text="sentence", label="score", classes=("bad", "fair", "good"))
    np.testing.assert_array_equal(texts.labels, numbers)
    assert classes == ("bad", "fair", "good")


def test_classes_are_in_natural_order(tmp_path):
    path = write(tmp_path / "a.csv", ["text", "label"], [["x", "topic 10"], ["y", "topic 9"]])
    assert load_texts(path)[1] == ("topic 9", "topic 10")


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_columns_of_a_file_without_a_header_go_by_number_and_are_joined(suffix, tmp_path):
    path = write_table(tmp_path / f"a{suffix}", [[3, " Title ", "One."], [4, "Other", ""], [3, "", "Two\\n."]])
    texts, classes = load_texts(path, text=(1, 2), label=0)
    assert [text.split() for text in texts.texts] == [["Title", "One."], ["Other"], ["Two\\n."]]
    assert texts.texts[0] == "Title One."
    assert classes == ("3", "4")
    assert load_texts(path, text=[2, 1], label=0)[0].texts[0] == "One. Title"


def test_columns_of_json_lines_are_joined_too(tmp_path):
    lines = [{"title": "Title", "body": "One.", "label": 0}, {"label": 1, "body": "Two.", "title": "Next"}]
    texts, _ = load_texts(write_lines(tmp_path / "a.jsonl", lines), text=("title", "body"))
    assert tuple(texts.texts) == ("Title One.", "Next Two.")


def test_texts_of_several_lines_and_other_line_ends_are_whole(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefftext,label\r\n"one\r\ntwo",0\r\n\r\nthree\u2028four,1\r\n'.encode())
    assert tuple(load_texts(path)[0].texts) == ("one\r\ntwo", "three\u2028four")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "three\u2028four", "label": 0}\r\n\n{"text": "b", "label": 1}', encoding="utf-8")
    assert tuple(load_texts(path)[0].texts) == ("three\u2028four", "b")


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        (
            {},
            [1, 2, 4],
            ": the labels 1, 2, 4 leave out some of 4 classes; if that is meant, give classes and first_label",
        ),
        ({}, [0, 1, "two"], ", line 4: the label 'two' must be a whole number, as in line 2"),
        ({}, ["0.5", 1, 2], ", line 2: the label '0.5' must be a whole number, as in line 3"),
        ({}, [1, 1, 1], " has one class alone, '1'"),
        ({}, ["a", "a", "a"], " has one class alone, 'a'"),
        ({}, ["a", " ", "b"], ", line 3: the label is empty"),
        ({"classes": ("a", "b")}, [1, 2, 3], ", line 4: the label 3 must lie in 1 to 2, for 2 classes"),
        ({"classes": ("a", "b", "c")}, [0, 1, 1], ": the labels 0, 1 leave out some of 3 classes; if that is meant"),
        (
            {"classes": ("a", "b"), "first_label": 0},
            [0, 1, 2],
            ", line 4: the label 2 must lie in 0 to 1, for 2 classes",
        ),
        ({"first_label": 1}, [0, 1, 2], ", line 2: the label 0 must lie in 1 to 2"),
        ({"classes": ("0", "1")}, [0, 1, 2], ", line 4: the label '2' is none of the classes; there is '0', '1'"),
        ({"classes": ("bad", "good")}, ["bad", "good", "god"], ", line 4: the label 'god' is .*; did you mean 'good'"),
        ({"classes": ("bad", "bad")}, [0, 1, 1], r"classes must be two or more different names, got \('bad', 'bad'\)"),
        ({"classes": ("bad",)}, [0, 0, 0], r"classes must be two or more different names, got \('bad',\)"),
        ({"classes": "ab"}, ["a", "b", "b"], "classes must be two or more different names, got 'ab'"),
    ],
)
def test_labels_that_do_not_fit_are_named(options, labels, message, tmp_path):
    path = write(tmp_path / "a.tsv", ["text", "label"], [["x", label] for label in labels])
    with pytest.raises(ValueError, match=message):
        load_texts(path, **options)


def test_classes_and_their_first_number_allow_for_missing_ones(tmp_path):
    path = write(tmp_path / "a.tsv", ["text", "label"], [["x", 2], ["y", 4]])
    texts, classes = load_texts(path, classes=("a", "b", "c", "d"), first_label=1)
    np.testing.assert_array_equal(texts.labels, [1, 3])
    assert classes == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", "text,label\n", {}, r"a.txt must end in one of .csv, .jsonl, .tsv"),
        ("a.csv", "", {}, "a.csv has no rows"),
        ("a.csv", "text,label\n", {}, "a.csv has no rows"),
        ("a.jsonl", "\n \n", {}, "a.jsonl has no rows"),
        ("a.csv", "texts,label\nx,0\n", {}, "no column 'text'; did you mean 'texts'.* by number from 0"),
        ("a.csv", "text,label\nx,0\n", {"label": "lable"}, "no column 'lable'; did you mean 'label'"),
        ("a.csv", "text,text,label\nx,y,0\n", {}, "twice the column 'text'"),
        ("a.tsv", "a long text " * 9 + "\t0\n", {}, r"no column 'text'; there is 'a long .{30}\.\.\.', '0' "),
        ("a.csv", "x,0\n", {"text": 2, "label": 1}, "has no column 2, only 0 to 1"),
        ("a.csv", "x,0\n", {"text": -1, "label": 1}, "has no column -1, only 0 to 1"),
        ("a.csv", "x,0\n", {"text": 0}, "must be all names or all numbers, got text 0 and label 'label'"),
        ("a.csv", "x,0\n", {"text": 0, "label": 0}, "columns must differ, got text 0 and label 0"),
        ("a.csv", "x,0\n", {"text": ()}, "text must name at least one column"),
        ("a.csv", "text,label\nx,0\ny,1\nz,2,3\n", {}, "a.csv, line 4: 3 columns, expected 2 as in line 1"),
        ("a.tsv", "x\t0\n\ny 1\n", {"text": 0, "label": 1}, "a.tsv, line 3: 1 columns, expected 2 as in line 1"),
        ("a.csv", 'text,label\n"x\ny",0\n"z\n",1,2\n', {}, "a.csv, line 4: 3 columns"),
        ("a.csv", 'text,label\nx,0\n"y,1\n', {}, "a.csv, line 3: unexpected end of data"),
        ("a.csv", 'text,label\nx,0\n"y"z,1\n', {}, "a.csv, line 3: ',' expected after '\"'"),
        ("a.csv", f"text,label\nx,0\n{'y' * 200_000},1\n", {}, r"a.csv, line 3: field larger than field limit"),
        ("a.csv", "text,label\nx,0\n ,1\n", {}, "a.csv, line 3: the text is empty"),
        ("a.csv", b"text,label\nx,0\ncaf\xe9,1\n", {}, "a.csv, line 3: not UTF-8, at the byte 0xe9"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": "y",\n', {}, "a.jsonl, line 2: no JSON: "),
        ("a.jsonl", '{"text": "x", "label": 0}\n["y", 1]\n', {}, "line 2: expected a JSON object, got list"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"txt": "y"}\n', {}, "line 2: no entry 'text'; did you mean 'txt'"),
        ("a.jsonl", '{"text": 1, "label": 0}\n', {}, "line 1: the entry 'text' must be str, got int"),
        ("a.jsonl", '{"text": "x", "label": true}\n', {}, "line 1: the entry 'label' must be str or int, got bool"),
        ("a.jsonl", '{"text": "x", "label": 1.0}\n', {}, "line 1: the entry 'label' must be str or int, got float"),
        ("a.jsonl", '{"text": "x", "label": 1}\n', {"text": 0, "label": 1}, r"have names, got numbers \[0, 1\]"),
    ],
)
def test_broken_files_are_named(name, content, options, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_texts(path, **options)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/a.csv is missing or not a file"):
        load_texts(tmp_path / "a.csv")


def test_two_files_share_their_classes(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    train = write(folder / "train.tsv", ["text", "label"], [["a", 1], ["b", 2], ["c", 3]])
    test = write(folder / "test.csv", ["text", "label"], [["d", 3], ["e", 2]])
    for classes in (None, ("x", "y", "z")):
        loaded = load_text_set(train, test, classes=classes)
        assert loaded.name == "mine"
        assert loaded.classes == (classes or ("1", "2", "3"))
        np.testing.assert_array_equal(loaded.train.labels, [0, 1, 2])
        np.testing.assert_array_equal(loaded.test.labels, [2, 1])  # The test has no 1, which is the first one still.
        assert tuple(loaded.test.texts) == ("d", "e")
    assert load_text_set(train, test, name="other").name == "other"

    write(folder / "test.csv", ["text", "label"], [["d", 3], ["e", 4]])
    with pytest.raises(ValueError, match=r"test.csv, line 3: the label '4' is none of the classes"):
        load_text_set(train, test)
    with pytest.raises(ValueError, match=r"test.csv, line 3: the label 4 must lie in 1 to 3"):
        load_text_set(train, test, classes=("x", "y", "z"))


def test_names_of_two_files_are_those_of_the_first(tmp_path):
    train = write(tmp_path / "a.jsonl", ["text", "label"], [["a", "no"], ["b", "yes"]])
    test = write(tmp_path / "b.jsonl", ["text", "label"], [["c", "yes"]])
    loaded = load_text_set(train, test)
    np.testing.assert_array_equal(loaded.test.labels, [1])
    write(tmp_path / "b.jsonl", ["text", "label"], [["c", "yet"]])
    with pytest.raises(
        ValueError, match=r"b.jsonl, line 1: the label 'yet' is none of the classes; did you mean 'yes'"
    ):
        load_text_set(train, test)


PASSAGE = "Größe: the café is in Zürich, in Zürich."


def squad(**changes):
    """One question of SQuAD 2.0 with an answer, one without; changes are to the first."""
    answers = [{"text": "Zürich", "answer_start": 22}, {"text": "in Zürich", "answer_start": 30}]
    answers.append({"text": "Zürich", "answer_start": 33})
    first = {"id": "a", "question": "Where?", "answers": answers, "is_impossible": False, **changes}
    second = {"id": "b", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": answers}
    first = {key: value for key, value in first.items() if value is not None}
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": PASSAGE, "qas": [first, second]}]}]}


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_questions_of_squad_are_read(tmp_path):
    first, second = load_questions(write_json(tmp_path / "dev.json", squad()))
    assert (first.question, first.passage, first.answers) == ("Where?", PASSAGE, ("Zürich", "in Zürich"))
    assert first.start == 22
    assert first.passage[first.start :].startswith(first.answers[0])
    assert (second.question, second.passage, second.answers, second.start) == ("Why?", PASSAGE, (), -1)


def test_questions_of_the_first_squad_say_nothing_of_impossible(tmp_path):
    content = squad(is_impossible=None)
    del content["data"][0]["paragraphs"][0]["qas"][1]
    (question,) = load_questions(str(write_json(tmp_path / "dev.json", content)))
    assert question.start == 22


AT = ", data 0, paragraphs 0, qas 0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], ": expected a JSON object, got list"),
        ({"date": []}, ": no entry 'data'; did you mean 'date'?"),
        ({"data": {}}, ": the entry 'data' must be list, got dict"),
        ({"data": []}, " has no questions"),
        ({"data": [{"paragraphs": [{"context": "x", "qas": []}]}]}, " has no questions"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, ", data 0, paragraphs 0: no entry 'context'; there is 'qas'"),
        (squad(question=None), f"{AT}: no entry 'question'"),
        (squad(question=["Why?"]), f"{AT}: the entry 'question' must be str, got list"),
        (squad(answers=None), f"{AT}: no entry 'answers'"),
        (squad(answers=["Zürich"]), f"{AT}, answers 0: expected a JSON object, got str"),
        (squad(answers=[{"text": "Zürich"}]), f"{AT}, answers 0: no entry 'answer_start'"),
        (
            squad(answers=[{"text": "Zürich", "answer_start": "22"}]),
            f"{AT}, answers 0: the entry 'answer_start' must be",
        ),
        (
            squad(answers=[{"text": "Zürich", "answer_start": 22}, {"text": "Zürich", "answer_start": 21}]),
            f"{AT}, answers 1: the answer 'Zürich' is not in its passage at 21, where ' Züric' stands",
        ),
        (squad(answers=[{"text": "ch", "answer_start": -3}]), "the answer 'ch' is not in its passage at -3, where ''"),
        (squad(answers=[{"text": "", "answer_start": 3}]), "the answer '' is not in its passage at 3"),
        (squad(answers=[]), f"{AT}: 0 answers to a question with is_impossible False"),
        (squad(is_impossible=True), f"{AT}: 3 answers to a question with is_impossible True"),
        (squad(is_impossible="no"), f"{AT}: the entry 'is_impossible' must be bool, got str"),
    ],
)
def test_questions_of_another_layout_are_named(content, message, tmp_path):
    path = write_json(tmp_path / "dev.json", content)
    with pytest.raises(ValueError, match=f"{path}{re.escape(message)}" if message[0] in ",: " else re.escape(message)):
        load_questions(path)


def test_a_broken_file_of_questions_is_named(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(squad())[:-3])
    with pytest.raises(ValueError, match=f"{path} is not JSON: "):
        load_questions(path)
    path.write_bytes(b'{"data":\n"\xff"}')
    with pytest.raises(ValueError, match=f"{path}, line 2: not UTF-8, at the byte 0xff"):
        load_questions(path)
    with pytest.raises(ValueError, match=f"{tmp_path} is missing or not a file"):
        load_questions(tmp_path)
