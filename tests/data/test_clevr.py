"""CLEVR from small folders and archives of the official layout, and through TFDS."""

import io
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from merge_jax.data import load_clevr
from tests.data.common import exactly, serve

URL = "https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip"
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
# Of each split, the questions by the number of their image.
ASKED = {
    "train": {
        0: [("How big is it?", "small", "query_size"), ("Are there spheres?", "yes", "exist")],
        2: [("How many?", "0", "count"), ("Are there more cubes?", "no", "greater_than")],
        1: [("Is it as big?", "yes", "equal_size"), ("What is new?", "all", "other")],
    },
    "val": {0: [("How many?", "3", "count")]},
    "test": {1: [("Is it red?", None, None)]},
}
KINDS = ["query attribute", "exist", "count", "compare integer", "compare attribute", "other"]


def file_name(split, number):
    return f"CLEVR_{split}_{number:06d}.png"


def png(colour):
    """An image as CLEVR has them, with an opaque alpha channel, and wider than high."""
    content = io.BytesIO()
    Image.new("RGBA", (12, 8), (*colour, 255)).save(content, "PNG")
    return content.getvalue()


def questions(split):
    entries = []
    for number, asked in ASKED[split].items():
        for question, answer, function in asked:
            entry = {
                "image_index": number,
                "question_index": len(entries),
                "image_filename": file_name(split, number),
                "split": split,
                "question": question,
            }
            if answer is not None:
                steps = [{"inputs": [], "function": "scene", "value_inputs": []}]
                steps.append({"inputs": [0], "function": function, "value_inputs": []})
                entry |= {"program": steps, "question_family_index": 7, "answer": answer}
            entries.append(entry)
    return {"info": {"license": "CC"}, "questions": entries}


def scenes(split):
    found = {
        "color": "cyan",
        "material": "metal",
        "shape": "cube",
        "size": "large",
        "rotation": 45.5,
        "3d_coords": [0.5, -1.0, 0.7],
        "pixel_coords": [100, 90, 9.5],
    }
    entries = [
        {
            "image_index": number,
            "objects": [found | {"rotation": float(number)}],
            "relationships": {"left": [[]]},
            "image_filename": file_name(split, number),
            "split": split,
        }
        for number in (2, 1, 0)
    ]
    return {"info": {}, "scenes": entries}


def members():
    """The files of the official archive: in each split there are three images, and the test has no scenes."""
    files = {"README.txt": b"CLEVR"}
    for split in ASKED:
        files |= {f"images/{split}/{file_name(split, n)}": png(colour) for n, colour in enumerate(COLOURS)}
        files[f"questions/CLEVR_{split}_questions.json"] = json.dumps(questions(split)).encode()
        if split != "test":
            files[f"scenes/CLEVR_{split}_scenes.json"] = json.dumps(scenes(split)).encode()
    return files


def put_folder(root, files=None):
    for name, content in (files or members()).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def put_archive(data_dir, files=None):
    path = data_dir / "downloads" / "manual" / "CLEVR_v1.0.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("CLEVR_v1.0/images/train/", b"")
        for name, content in (files or members()).items():
            archive.writestr(f"CLEVR_v1.0/{name}", content)
    return path


def by_question(part):
    """Answers and image of each question, in any order."""
    numbers = [int(np.argmax(pixels[4, 4])) for pixels in part.images[part.image]]
    return sorted(zip(part.questions, part.answers, numbers, strict=True))


def expected(split):
    return sorted((text, (answer,), n) for n, asked in ASKED[split].items() for text, answer, _ in asked)


@pytest.mark.parametrize("place", [".", "CLEVR_v1.0"])
def test_the_folder_is_read_with_kinds(place, tmp_path, capsys):
    put_folder(tmp_path / place)
    loaded = load_clevr(tmp_path, image_size=8)
    assert loaded.name == "clevr"
    assert by_question(loaded.train) == expected("train")
    assert by_question(loaded.test) == expected("val")
    assert loaded.train.kinds == KINDS
    assert loaded.test.kinds == ["count"]
    assert loaded.train.image.dtype == np.int32
    assert (loaded.train.images.shape, loaded.test.images.shape) == ((3, 8, 8, 3), (1, 8, 8, 3))
    assert capsys.readouterr() == ("", "")


def without(content, *keys):
    entries = [{key: value for key, value in entry.items() if key not in keys} for entry in content["questions"]]
    return content | {"questions": entries}


def test_without_programs_there_are_no_kinds(tmp_path):
    files = members() | {
        "questions/CLEVR_val_questions.json": json.dumps(without(questions("val"), "program")).encode()
    }
    loaded = load_clevr(put_folder(tmp_path, files), image_size=8)
    assert loaded.test.kinds is None
    assert loaded.train.kinds == KINDS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: {"scenes": []}, ": no entry 'questions', found ['scenes']"),
        (lambda q: {"questions": []}, " has no questions"),
        # As in the file of the test split.
        (
            lambda q: without(q, "answer", "program", "question_family_index"),
            ", questions 0: no entry 'answer', found ['image_index', 'question_index', 'image_filename', 'split',"
            " 'question']",
        ),
        (
            lambda q: {"questions": [q["questions"][0] | {"answer": 3}]},
            ", questions 0: the entry 'answer' must be str, got int",
        ),
        (
            lambda q: {"questions": [q["questions"][0] | {"question": " "}]},
            ", questions 0: the entry 'question' is empty",
        ),
    ],
)
def test_a_wrong_file_of_a_folder_is_named(change, message, tmp_path):
    file = put_folder(tmp_path) / "questions" / "CLEVR_train_questions.json"
    file.write_text(json.dumps(change(questions("train"))))
    with pytest.raises(ValueError, match=exactly(f"{file}{message}")):
        load_clevr(tmp_path, image_size=8)


def test_a_folder_without_a_file_or_a_whole_image_says_so(tmp_path, capsys):
    image = put_folder(tmp_path) / "images" / "train" / file_name("train", 2)
    image.write_text("not an image")
    with pytest.raises(ValueError, match=rf"\Athe image {image} cannot be read: .* \(1 of 3 images cannot be used; "):
        load_clevr(tmp_path, image_size=8)
    assert len(load_clevr(tmp_path, image_size=8, unreadable="skip").train.questions) == 4
    assert capsys.readouterr().err.startswith(f"{tmp_path}/images/train: left out 1 of 3 images: the image {image} ")
    image.unlink()
    with pytest.raises(ValueError, match=rf"\Athe image {image} is missing; did you mean .* \(1 of 3 images cannot"):
        load_clevr(tmp_path, image_size=8)
    (tmp_path / "questions" / "CLEVR_val_questions.json").unlink()
    with pytest.raises(ValueError, match=rf"\A{tmp_path} lacks questions/CLEVR_val_questions.json; expected are ques"):
        load_clevr(tmp_path, image_size=8)


def test_nothing_leads_out_of_the_folder(tmp_path):
    root = put_folder(tmp_path / "root")
    file = root / "questions" / "CLEVR_train_questions.json"
    whole = file.read_text()
    file.write_text(whole.replace(file_name("train", 2), f"../val/{file_name('val', 0)}"))
    with pytest.raises(ValueError, match=r"\Athe image '../val/CLEVR_val_000000.png' must be named by a path relative"):
        load_clevr(root, image_size=8, unreadable="skip")
    file.write_text(whole)
    (root / "images").rename(tmp_path / "outside")
    (root / "images").symlink_to(tmp_path / "outside")
    with pytest.raises(
        ValueError, match=rf"\A{root}/images/train leads to {tmp_path}/outside/train, outside of {root};"
    ):
        load_clevr(root, image_size=8, unreadable="skip")


def test_the_archive_is_read_and_official_tfds_reads_what_was_prepared(tmp_path, capsys):
    put_archive(tmp_path)
    loaded = load_clevr(tmp_path, image_size=8)
    assert capsys.readouterr().out == ""
    assert by_question(loaded.train) == expected("train")
    assert by_question(loaded.test) == expected("val")
    assert (loaded.train.kinds, loaded.test.kinds) == (None, None)
    # Images without a question are in the records too.
    assert (loaded.train.images.shape, loaded.test.images.shape) == ((3, 8, 8, 3), (3, 8, 8, 3))
    assert (loaded.train.images.dtype, loaded.train.image.dtype) == (np.uint8, np.int32)

    splits = tfds.data_source("clevr", data_dir=tmp_path)
    assert set(splits) == {"train", "validation", "test"}
    records = {record["file_name"].decode(): record for record in splits["train"]}
    for number, colour in enumerate(COLOURS):
        record = records[file_name("train", number)]
        np.testing.assert_array_equal(record["image"][..., :3], np.broadcast_to(colour, (8, 12, 3)))
        pairs = zip(record["question_answer"]["question"], record["question_answer"]["answer"], strict=True)
        assert [(q.decode(), a.decode()) for q, a in pairs] == [entry[:2] for entry in ASKED["train"][number]]
        assert list(record["objects"]["rotation"]) == [number]
        np.testing.assert_allclose(record["objects"]["pixel_coords"], [[100, 90, 9.5]])
        assert (
            tfds.builder("clevr", data_dir=tmp_path)
            .info.features["objects"]["color"]
            .int2str(record["objects"]["color"][0])
            == "cyan"
        )
    test = {record["file_name"].decode(): record["question_answer"] for record in splits["test"]}
    assert list(test[file_name("test", 1)]["question"]) == [b"Is it red?"]
    assert list(test[file_name("test", 1)]["answer"]) == [b""]


def test_a_prepared_set_needs_its_archive_no_more_and_ones_own_no_test_and_no_scenes(tmp_path):
    files = {name: content for name, content in members().items() if "test" not in name and "scenes" not in name}
    path = put_archive(tmp_path, files)
    load_clevr(tmp_path, image_size=8)
    path.write_bytes(b"not looked at any more")
    assert by_question(load_clevr(str(tmp_path), image_size=8).train) == expected("train")
    assert set(tfds.builder("clevr", data_dir=tmp_path).info.splits) == {"train", "validation"}


def replaced(name, content):
    return members() | {name: content if isinstance(content, bytes) else json.dumps(content).encode()}


TRAIN_QUESTIONS, TRAIN_SCENES = "questions/CLEVR_train_questions.json", "scenes/CLEVR_train_scenes.json"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {name: content for name, content in members().items() if "val_q" not in name},
            r"\Athe archive {archive} needs \['CLEVR_v1.0/questions/CLEVR_train_questions.json', 'CLEVR_v1.0/questions/"
            r"CLEVR_val_questions.json'\], found \['CLEVR_v1.0/images/train/', .*\]\Z",
        ),
        (
            {name: content for name, content in members().items() if "train_000002" not in name},
            r"\A{archive}: CLEVR_v1.0/questions/CLEVR_train_questions.json: the image 'CLEVR_train_000002.png' of a"
            r" question is missing; did you mean .*\Z",
        ),
        (
            replaced(TRAIN_QUESTIONS, without(questions("train"), "answer")),
            r"\A{archive}: CLEVR_v1.0/questions/CLEVR_train_questions.json, questions 0: no entry 'answer', found .*\Z",
        ),
        (
            replaced(TRAIN_QUESTIONS, b"{"),
            r"\A{archive}: CLEVR_v1.0/questions/CLEVR_train_questions.json is not JSON, or truncated: .*\Z",
        ),
        (
            replaced(TRAIN_SCENES, {"scenes": [{"image_filename": "a", "objects": [{"color": "red"}]}]}),
            r"\A{archive}: CLEVR_v1.0/scenes/CLEVR_train_scenes.json, scenes 0, objects 0: no entry 'material', found"
            r" \['color'\]\Z",
        ),
        (
            replaced(f"images/train/{file_name('train', 1)}", b"not an image"),
            r"\Athe image {archive}: CLEVR_v1.0/images/train/CLEVR_train_000001.png cannot be read: cannot id.*\Z",
        ),
    ],
    ids=["no file", "no image", "no answer", "no json", "scene", "text"],
)
def test_a_wrong_archive_is_named_and_leaves_nothing_behind(files, message, tmp_path):
    archive = put_archive(tmp_path, files)
    with pytest.raises(ValueError, match=message.replace("{archive}", re.escape(str(archive)))):
        load_clevr(tmp_path, image_size=8)
    assert not list(tmp_path.glob("clevr/[0-9]*"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no zip"])
def test_a_broken_archive_is_named(damage, tmp_path):
    path = put_archive(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 1
    path.write_bytes({"truncated": content[:-100], "flipped": content, "no zip": b"<html></html>"}[damage])
    with pytest.raises(
        ValueError, match=rf"\Athe archive {path} is truncated or broken \(.*\); replace it with a whole one\Z"
    ):
        load_clevr(tmp_path, image_size=8)


def test_a_record_that_is_no_whole_image_is_named_when_it_is_read(tmp_path):
    name = f"images/val/{file_name('val', 0)}"
    put_archive(tmp_path, replaced(name, members()[name][:-30]))
    test = load_clevr(tmp_path, image_size=8).test
    with pytest.raises(ValueError, match=r"\Athe image CLEVR_val_000000.png of clevr validation cannot be read: .*\Z"):
        test.images[test.image]


def test_without_a_network_the_error_names_url_and_place(tmp_path, monkeypatch):
    serve(monkeypatch, {})
    place = tmp_path / "downloads" / "manual" / "CLEVR_v1.0.zip"
    with pytest.raises(ValueError, match=rf"\A{URL} cannot be downloaded \(no network\); .* put it at {place}\Z"):
        load_clevr(tmp_path, image_size=8)


def test_a_set_that_official_tfds_prepared_elsewhere_can_be_moved_here(tmp_path):
    put_archive(tmp_path / "elsewhere")
    load_clevr(tmp_path / "elsewhere", image_size=8)
    shutil.move(tmp_path / "elsewhere" / "clevr", tmp_path / "clevr")
    next(tmp_path.glob("clevr/*/archive.sha256")).unlink()  # TFDS itself leaves no record.
    assert by_question(load_clevr(tmp_path, image_size=8).test) == expected("val")
    info = next(tmp_path.glob("clevr/*/dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"\Aclevr lies in .* as tfrecord, which cannot be read without TensorFlow; "):
        load_clevr(tmp_path, image_size=8)
