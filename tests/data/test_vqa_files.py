"""VQA v2.0 from small files of the official layout."""

import copy
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from merge_jax.data import ImageFiles, load_vqa
from tests.data.common import exactly

COLOURS = {9: (250, 0, 0), 25: (0, 250, 0), 30: (0, 0, 250)}
QUESTIONS = {
    "train2014": [(9000, 9, "What colour is it?"), (25000, 25, " Is it green? "), (9001, 9, "How many are there?")],
    "val2014": [(30000, 30, "Où est-ce ?")],
}
# In another order than the questions.
ANSWERS = {
    "train2014": [
        (9001, 9, "number", ["1"] * 9 + ["2"]),
        (9000, 9, "other", ["red"] * 10),
        (25000, 25, "yes/no", ["yes", ""]),
    ],
    "val2014": [(30000, 30, "other", ["là"] * 10)],
}


def questions_of(entries):
    return {
        "info": {"version": "2.0"},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "data_subtype": "train2014",
        "license": {"name": "CC"},
        "questions": [{"image_id": image, "question": text, "question_id": id_} for id_, image, text in entries],
    }


def annotations_of(entries):
    return {
        "info": {"version": "2.0"},
        "license": {"name": "CC"},
        "annotations": [
            {
                "question_type": "what",
                "multiple_choice_answer": answers[0],
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                    for i, answer in enumerate(answers)
                ],
                "image_id": image,
                "answer_type": kind,
                "question_id": id_,
            }
            for id_, image, kind, answers in entries
        ],
    }


def image_file(root, split, image):
    return root / split / f"COCO_{split}_{image:012d}.jpg"


def questions_file(root, split="train2014"):
    return root / f"v2_OpenEnded_mscoco_{split}_questions.json"


def annotations_file(root, split="train2014"):
    return root / f"v2_mscoco_{split}_annotations.json"


@pytest.fixture
def root(tmp_path):
    """The folder, of three questions to learn from and one to test on."""
    for split, questions in QUESTIONS.items():
        questions_file(tmp_path, split).write_text(json.dumps(questions_of(questions)))
        annotations_file(tmp_path, split).write_text(json.dumps(annotations_of(ANSWERS[split])))
        (tmp_path / split).mkdir()
        for _, image, _ in questions:
            Image.new("RGB", (40, 30), COLOURS[image]).save(image_file(tmp_path, split, image))
    return tmp_path


def test_questions_have_their_image_answers_and_kind(root, capsys):
    loaded = load_vqa(root, image_size=8)
    train, test = loaded.train, loaded.test
    assert loaded.name == "vqa_v2"
    assert train.questions == ["What colour is it?", "Is it green?", "How many are there?"]
    assert train.answers == [("red",) * 10, ("yes", ""), ("1",) * 9 + ("2",)]
    assert train.kinds == ["other", "yes/no", "number"]
    assert (test.questions, test.answers, test.kinds) == (["Où est-ce ?"], [("là",) * 10], ["other"])
    assert train.image.dtype == np.int32
    assert (train.images.shape, test.images.shape) == ((2, 8, 8, 3), (1, 8, 8, 3))
    for part, split in ((train, "train2014"), (test, "val2014")):
        for pixels, (_, image, _) in zip(part.images[part.image], QUESTIONS[split], strict=True):
            np.testing.assert_allclose(pixels, np.broadcast_to(COLOURS[image], (8, 8, 3)), atol=3)
    assert capsys.readouterr() == ("", "")


def test_other_splits_may_be_named(root):
    loaded = load_vqa(str(root), image_size=8, split_names=["val2014", "train2014"])
    assert (len(loaded.train.questions), len(loaded.test.questions)) == (1, 3)
    for names in ("train2014", ("val2014",), ("val2014", "val2014")):
        with pytest.raises(ValueError, match=r"^split_names must be two different names, .*, got "):
            load_vqa(root, image_size=8, split_names=names)


def test_equal_answers_are_one_text_in_memory(root):
    """Of the six million answers there are few different ones; read as they stand they would fill gigabytes."""
    count = 3000
    entries = [(i, 9, "other", [f"answer {i % 7}"] * 10) for i in range(count)]
    annotations_file(root).write_text(json.dumps(annotations_of(entries)))
    questions_file(root).write_text(json.dumps(questions_of([(i, 9, "Is it?") for i in range(count)])))
    tracemalloc.start()
    train = load_vqa(root, image_size=8).train
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({id(answer) for answers in train.answers for answer in answers}) == 7
    assert len({id(kind) for kind in train.kinds}) == 1
    # Ten pointers, their tuple, a question of 55 bytes, and its place: no object for each of the 30,000 answers.
    assert kept < count * 400
    assert peak < count * 400 + 2 * annotations_file(root).stat().st_size + count * 1000


def test_images_are_not_read_before_they_are_asked_for(root, monkeypatch):
    monkeypatch.setattr(ImageFiles, "__getitem__", None)
    load_vqa(root, image_size=8)
    image_file(root, "train2014", 9).write_bytes(image_file(root, "train2014", 9).read_bytes()[:-12])
    train = load_vqa(root, image_size=8).train
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"COCO_train2014_000000000009.jpg cannot be read: image file is truncated"):
        train.images[train.image[:1]]


def test_missing_and_unreadable_images_stop_or_are_left_out_with_their_questions(root, capsys):
    image = image_file(root, "train2014", 9)
    image.write_text("not an image")
    with pytest.raises(ValueError, match=rf"\Athe image {image} cannot be read: .* \(1 of 2 images cannot be used; "):
        load_vqa(root, image_size=8)
    image.unlink()
    with pytest.raises(ValueError, match=rf"\Athe image {image} is missing; did you mean '.*25.jpg'\? \(1 of 2 images"):
        load_vqa(root, image_size=8)
    train = load_vqa(root, image_size=8, unreadable="skip").train
    assert (train.questions, train.answers, train.kinds) == (["Is it green?"], [("yes", "")], ["yes/no"])
    assert train.images.shape == (1, 8, 8, 3)
    assert train.image.tolist() == [0]
    assert capsys.readouterr().err == (f"{root}/train2014: left out 1 of 2 images: the image {image} is missing\n")
    image_file(root, "train2014", 25).unlink()
    with pytest.raises(ValueError, match=rf"\A{root}/train2014: none of 2 images can be used: the image {image} is "):
        load_vqa(root, image_size=8, unreadable="skip")


def test_a_missing_file_is_named_with_what_is_expected_and_there(root):
    annotations_file(root).unlink()
    message = (
        f"{root} lacks v2_mscoco_train2014_annotations.json; expected are v2_OpenEnded_mscoco_train2014_questions.json,"
        " v2_mscoco_train2014_annotations.json, v2_OpenEnded_mscoco_val2014_questions.json,"
        f" v2_mscoco_val2014_annotations.json, and in {root} there is train2014,"
        " v2_OpenEnded_mscoco_train2014_questions.json, v2_OpenEnded_mscoco_val2014_questions.json,"
        " v2_mscoco_val2014_annotations.json, val2014"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        load_vqa(root, image_size=8)
    with pytest.raises(ValueError, match=rf"\Athe folder {root}/none is missing; expected in it are v2_OpenEnded_"):
        load_vqa(root / "none", image_size=8)


def test_a_missing_folder_of_images_is_named(root):
    (root / "val2014").rename(root / "elsewhere")
    with pytest.raises(ValueError, match=exactly(f"the folder {root}/val2014 is missing; images are looked for there")):
        load_vqa(root, image_size=8)


def without(entries, key):
    return [{name: value for name, value in entry.items() if name != key} for entry in entries]


def with_(entries, index, **changes):
    changed = copy.deepcopy(entries)
    changed[index].update(changes)
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: {"images": [], "annotations": []}, ": no entry 'questions', found ['images', 'annotations']"),
        (lambda q: [], ": expected a JSON object, got list"),
        (lambda q: {"questions": {}}, ": the entry 'questions' must be list, got dict"),
        (lambda q: {"questions": []}, " has no questions"),
        (lambda q: {"questions": [q[0], 1]}, ", questions 1: expected a JSON object, got int"),
        (
            lambda q: {"questions": without(q, "image_id")},
            ", questions 0: no entry 'image_id', found ['question', 'question_id']",
        ),
        (
            lambda q: {"questions": with_(q, 1, image_id="25")},
            ", questions 1: the entry 'image_id' must be int, got str",
        ),
        (
            lambda q: {"questions": with_(q, 1, question_id=True)},
            ", questions 1: the entry 'question_id' must be int, got bool",
        ),
        (lambda q: {"questions": with_(q, 2, question=" \n")}, ", questions 2: the question is empty"),
        (lambda q: {"questions": [*q, q[1]]}, " has 1 question ids that appear twice, such as 25000"),
    ],
)
def test_a_wrong_file_of_questions_is_named(change, message, root):
    file = questions_file(root)
    file.write_text(json.dumps(change(json.loads(file.read_text())["questions"])))
    with pytest.raises(ValueError, match=exactly(f"{file}{message}")):
        load_vqa(root, image_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: [{"image_id": 1, "id": 2, "caption": "A cat."}],  # As in a file of captions.
            ", annotations 0: no entry 'question_id', found ['image_id', 'id', 'caption']",
        ),
        (
            lambda a: without(a, "answer_type"),
            ", annotations 0: no entry 'answer_type', found ['question_type', 'multiple_choice_answer', 'answers',"
            " 'image_id', 'question_id']",
        ),
        (lambda a: with_(a, 1, answers=[]), ", annotations 1: there are no answers"),
        (
            lambda a: with_(a, 1, answers=[{"answer": "red"}, {"text": "red"}]),
            ", annotations 1, answers 1: no entry 'answer', found ['text']",
        ),
        (
            lambda a: with_(a, 1, answers=[{"answer": 3}]),
            ", annotations 1, answers 0: the entry 'answer' must be str, got int",
        ),
        (lambda a: [*a, a[0], a[0]], " has 1 question ids that appear twice, such as 9001"),
    ],
)
def test_a_wrong_file_of_annotations_is_named(change, message, root):
    file = annotations_file(root)
    file.write_text(json.dumps({"annotations": change(json.loads(file.read_text())["annotations"])}))
    with pytest.raises(ValueError, match=exactly(f"{file}{message}")):
        load_vqa(root, image_size=8)


def test_questions_and_annotations_have_to_belong_together(root):
    questions, annotations = questions_file(root), annotations_file(root)
    asked, given = (json.loads(file.read_text()) for file in (questions, annotations))

    annotations.write_text(json.dumps({"annotations": given["annotations"][:1]}))
    message = f"question 9000 of {questions} has no annotation in {annotations} (2 of 3 have none)"
    with pytest.raises(ValueError, match=exactly(message)):
        load_vqa(root, image_size=8)

    annotations.write_text(json.dumps(given))
    questions.write_text(json.dumps({"questions": asked["questions"][:2]}))
    message = f"question 9001 of {annotations} has no question in {questions} (1 of 3 have none)"
    with pytest.raises(ValueError, match=exactly(message)):
        load_vqa(root, image_size=8)

    questions.write_text(json.dumps({"questions": with_(asked["questions"], 1, image_id=9)}))
    message = f"question 25000 is on image 9 in {questions}, but on 25 in {annotations}"
    with pytest.raises(ValueError, match=exactly(message)):
        load_vqa(root, image_size=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"questions": [', " is not JSON, or truncated: Expecting value: line 1 column 16 (char 15)"),
        (b"", " is not JSON, or truncated: Expecting value: line 1 column 1 (char 0)"),
        (b'{"questions": "\xe8"}', " is not UTF-8, at the byte 15"),
    ],
)
def test_broken_json_is_named(content, message, root):
    file = questions_file(root, "val2014")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=exactly(f"{file}{message}")):
        load_vqa(root, image_size=8)


@pytest.mark.parametrize("name", ["v2_mscoco_val2014_annotations.json", "val2014"])
def test_a_link_out_of_the_folder_is_refused(name, root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("other") / "outside"
    (root / name).rename(outside)
    (root / name).symlink_to(outside)
    with pytest.raises(ValueError, match=rf"\A{root / name} leads to {outside}, outside of {root}; move what"):
        load_vqa(root, image_size=8, unreadable="skip")
