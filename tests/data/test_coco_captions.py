"""Captions of MSCOCO from small files of the official layout, and those of classes."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from merge_jax.data import load_coco_captions
from merge_jax.data.image_text.class_captions import class_captions
from merge_jax.data.images.image_set import ImageSet
from tests.data.common import exactly

COLOURS = {9: (250, 0, 0), 25: (0, 250, 0), 30: (0, 0, 250), 42: (250, 250, 0)}
# Of each split, the captions of each image.
CAPTIONS = {
    "train": {25: ["Green.", "All is green \n"], 9: ["Red."], 30: ["Blue, très bleu."]},
    "val": {42: ["Yellow."]},
}


def contents(split):
    """The official layout; captions are in another order than their images."""
    images = [{"license": 1, "file_name": f"{id_:012d}.jpg", "height": 30, "id": id_} for id_ in CAPTIONS[split]]
    pairs = sorted((i, id_, text) for id_, texts in CAPTIONS[split].items() for i, text in enumerate(texts))
    annotations = [{"image_id": id_, "id": 7 * n, "caption": text} for n, (_, id_, text) in enumerate(pairs)]
    return {"info": {"year": 2017}, "images": images, "licenses": [], "annotations": annotations}


def write(root, year="2017"):
    (root / "annotations").mkdir(exist_ok=True)
    for split, captions in CAPTIONS.items():
        captions_file(root, split, year).write_text(json.dumps(contents(split)))
        (root / f"{split}{year}").mkdir()
        for image in captions:
            Image.new("RGB", (30, 40), COLOURS[image]).save(root / f"{split}{year}" / f"{image:012d}.jpg")
    return root


def captions_file(root, split="train", year="2017"):
    return root / "annotations" / f"captions_{split}{year}.json"


@pytest.fixture
def root(tmp_path):
    return write(tmp_path)


def by_colour(part):
    """The captions of each image, known by its colour."""
    found = {}
    for image, caption in zip(*part.pairs(), strict=True):
        colour = part.images[np.array([image])][0, 4, 4]
        [id_] = [id_ for id_, expected in COLOURS.items() if np.abs(colour.astype(int) - expected).max() < 5]
        found.setdefault(id_, []).append(part.captions[caption])
    return found


@pytest.mark.parametrize("year", ["2017", "2014"])
def test_images_have_their_captions(year, tmp_path, capsys):
    loaded = load_coco_captions(write(tmp_path, year), image_size=8)
    assert loaded.name == "coco_captions"
    for part, split in ((loaded.train, "train"), (loaded.test, "val")):
        expected = {id_: [text.strip() for text in texts] for id_, texts in CAPTIONS[split].items()}
        assert by_colour(part) == expected
        assert part.images.shape == (len(expected), 8, 8, 3)
        assert part.image_group.tolist() == list(range(len(expected)))
        assert (part.image_group.dtype, part.caption_group.dtype) == (np.int32, np.int32)
    assert capsys.readouterr() == ("", "")


def test_the_year_is_the_one_that_is_there_or_chosen(root):
    with pytest.raises(
        ValueError, match=rf"\A{root} lacks annotations/captions_train2014.json; expected are .*, and in"
    ):
        load_coco_captions(root, image_size=8, year="2014")
    write(root, "2014")
    with pytest.raises(ValueError, match=exactly(f"{root} has captions of 2017 and 2014; give the year")):
        load_coco_captions(root, image_size=8)
    (root / "train2014" / "000000000009.jpg").unlink()
    with pytest.raises(ValueError, match=r"train2014/000000000009.jpg is missing"):
        load_coco_captions(root, image_size=8, year="2014")
    assert len(load_coco_captions(root, image_size=8, year="2017").train.captions) == 4
    with pytest.raises(ValueError, match=r"\Aunknown year '2015'; did you mean '2017' or '2014'\?\Z"):
        load_coco_captions(root, image_size=8, year="2015")


def test_unreadable_images_stop_or_are_left_out_with_their_captions(root, capsys):
    image = root / "train2017" / "000000000025.jpg"
    image.write_bytes(image.read_bytes()[:-12])
    load_coco_captions(root, image_size=8)  # The header is whole.
    train = load_coco_captions(root, image_size=8, unreadable="skip").train
    assert by_colour(train) == {9: ["Red."], 30: ["Blue, très bleu."]}
    assert train.image_group.tolist() == [0, 1]
    said = (
        rf"\A{root}/train2017: left out 1 of 3 images: the image {image} cannot be read: image file is truncated .*\n\Z"
    )
    assert re.match(said, capsys.readouterr().err)
    image.write_text("not an image")
    with pytest.raises(ValueError, match=rf"\Athe image {image} cannot be read: .* \(1 of 3 images cannot be used; "):
        load_coco_captions(root, image_size=8)
    image.unlink()
    with pytest.raises(ValueError, match=rf"\Athe image {image} is missing; did you mean .* \(1 of 3 images cannot"):
        load_coco_captions(root, image_size=8)


def changed(key, index, **changes):
    def change(content):
        content[key][index].update(changes)
        return content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"questions": []}, ": no entry 'images', found ['questions']"),
        (lambda c: c | {"images": []}, " has no images"),
        (lambda c: c | {"annotations": []}, " has no annotations"),
        # As in the file of instances.
        (
            lambda c: c | {"annotations": [{"image_id": 9, "id": 1, "bbox": [], "category_id": 3}]},
            ", annotations 0: no entry 'caption', found ['image_id', 'id', 'bbox', 'category_id']",
        ),
        (changed("images", 1, id="9"), ", images 1: the entry 'id' must be int, got str"),
        (changed("images", 1, id=25), " has 1 image ids that appear twice, such as 25"),
        (
            changed("images", 1, file_name="000000000025.jpg"),
            " has 1 file names that appear twice, such as '000000000025.jpg'",
        ),
        (changed("annotations", 1, id=0), " has 1 caption ids that appear twice, such as 0"),
        (changed("annotations", 2, image_id=10), ", annotations 2: there is no image 10"),
        (changed("annotations", 2, caption=" \n"), ", annotations 2: the caption is empty"),
        (
            lambda c: c | {"annotations": c["annotations"][:1]},
            ": the image '000000000025.jpg' has no caption (2 of 3 have none)",
        ),
    ],
)
def test_a_wrong_file_is_named(change, message, root):
    file = captions_file(root)
    file.write_text(json.dumps(change(contents("train"))))
    with pytest.raises(ValueError, match=exactly(f"{file}{message}")):
        load_coco_captions(root, image_size=8)


def test_a_broken_or_missing_file_is_named(root):
    file = captions_file(root, "val")
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=rf"\A{file} is not JSON, or truncated: .*\Z"):
        load_coco_captions(root, image_size=8)
    file.unlink()
    message = (
        f"{root} lacks annotations/captions_val2017.json; expected are annotations/captions_train2017.json,"
        f" annotations/captions_val2017.json, and in {root}/annotations there is captions_train2017.json"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        load_coco_captions(root, image_size=8)


@pytest.mark.parametrize("place", ["annotations", "train2017", "train2017/000000000009.jpg"])
def test_a_link_out_of_the_folder_is_refused(place, root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("other") / "outside"
    (root / place).rename(outside)
    (root / place).symlink_to(outside)
    with pytest.raises(ValueError, match=rf" leads to {outside}\S*, outside of {root}"):
        load_coco_captions(root, image_size=8, unreadable="skip")


def image_set(classes=("oak_tree", "bear", "unicorn"), dtype=np.uint8):
    images = np.arange(5 * 12).reshape(5, 2, 2, 3).astype(dtype)
    test = {"image": images[:1], "label": np.array([2])}
    return ImageSet("mine", {"image": images, "label": np.array([1, 0, 2, 1, 1])}, test, classes)


def test_a_class_is_one_caption_of_all_its_images():
    images = image_set()
    captioned = class_captions(images)
    assert captioned.name == "mine"
    for part, arrays in ((captioned.train, images.train), (captioned.test, images.test)):
        np.testing.assert_array_equal(part.images[:], arrays["image"])
        assert part.captions == ["a picture of an oak tree", "a picture of a bear", "a picture of a unicorn"]
        assert part.image_group.dtype == np.int32
        np.testing.assert_array_equal(part.pairs(), [np.arange(len(arrays["label"])), arrays["label"]])


@pytest.mark.parametrize(
    ("name", "template", "expected"),
    [
        ("Apple", "A {}, on a table", "An Apple, on a table"),
        ("hour_hand", "a photo of a {}.", "a photo of an hour hand."),
        ("one-way_street", "a {}", "a one-way street"),
        ("orange", "many of {}", "many of orange"),
        ("owl", "a {} and a dog", "an owl and a dog"),
        ("  __egg ", "panda {}", "panda egg"),
        (r"x\1", "a {}", r"a x\1"),
    ],
)
def test_names_become_words_with_the_right_article(name, template, expected):
    assert class_captions(image_set((name, "b", "c")), template).train.captions[0] == expected


@pytest.mark.parametrize("template", ["a picture", "a {} or a {}", "a {} of {0}", "a {:>9}", ""])
def test_a_template_without_one_place_is_refused(template):
    message = f"the template must have one {{}}, where the name of the class goes, got {template!r}"
    with pytest.raises(ValueError, match=exactly(message)):
        class_captions(image_set(), template)


def test_classes_of_one_caption_and_images_of_another_type_are_refused():
    with pytest.raises(ValueError, match=exactly("the classes 'a_b' and 'a b' are both 'a picture of an a b'")):
        class_captions(image_set(("a_b", "c", "a b")))
    with pytest.raises(ValueError, match=exactly("mine train: images must be uint8, got float32")):
        class_captions(image_set(dtype=np.float32))
    with pytest.raises(ValueError, match=r"\Amine train: labels must lie in \[0, 2\), got 2 at index 2"):
        class_captions(image_set(("a", "b")))
