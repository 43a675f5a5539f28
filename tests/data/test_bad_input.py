"""Files, labels, pixels and numbers of examples that are no data are refused by one line."""

import gzip
import io
import re
import tarfile

import numpy as np
from PIL import Image

from merge_jax.data import (
    ImageSet,
    LabelledTexts,
    Streamed,
    TextSet,
    WordPiece,
    batches_of,
    class_balanced,
    indices_of,
    load_coco_captions,
    load_image_folder,
    load_questions,
    load_texts,
    load_vqa,
    split,
)
from merge_jax.data.images.image_files import check_image_files
from merge_jax.data.tfds import archive_members
from tests.bad_input import on_file, raises, refusals, refused


def image_set(images=None, labels=(0, 1, 2, 1), classes=("a", "b", "c")):
    images = np.zeros((4, 2, 2, 3), np.uint8) if images is None else images
    good = {"image": np.zeros((3, 2, 2, 3), np.uint8), "label": np.arange(3) % len(classes)}
    return raises(lambda _: ImageSet("mine", {"image": images, "label": np.array(labels)}, good, tuple(classes)))


def with_pixel(value):
    images = np.zeros((4, 2, 2, 3), np.float32)
    images[2, 0, 1, 2] = value
    return images


def text_set(labels):
    texts = LabelledTexts(("a", "b", "c"), np.array(labels))
    return raises(lambda _: TextSet("mine", texts, LabelledTexts(("a",), np.array([0])), ("no", "yes")))


def png(size=8, mode="RGB"):
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(content, "PNG")
    return content.getvalue()


IMAGES = {f"{part}/{name}/1.png": png() for part in ("train", "test") for name in ("cat", "dog")}


def image_folder(changes, **options):
    """A folder of images with files added, replaced, or left out (None)."""

    def load(folder):
        for name, content in {**IMAGES, **changes}.items():
            if content is not None:
                path = folder / "images" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        load_image_folder(folder / "images", **options)

    return raises(load)


def tar_gz(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def members(path):
    list(archive_members(path, lambda name: True))


ARCHIVE = tar_gz({"a": bytes(range(256)) * 40})
SMALL = {"label": np.array([0, 1, 2] * 4)}
CSV = "text,label\ngood,1\nbad,0\n"

ROWS = {
    # Files.
    "data: unknown set": (
        refused("cross_structure", "--data", "cifar1000"),
        re.compile(
            r"unknown data set 'cifar1000'; did you mean 'cifar100' or 'cifar10'.* \(a folder is \./cifar1000\)"
        ),
    ),
    "data: no folder": (
        refused("cross_structure", "--data", "TMP/images"),
        "the folder TMP/images/train is missing; images are looked for in TMP/images/train/<class>/",
    ),
    "data: a name that no disk takes": (
        refused("cross_structure", "--data", "TMP/" + "x" * 300),
        re.compile(r"\[Errno 36\] File name too long: 'TMP/x{300}/train'"),
    ),
    "data: no table": (
        refused("cross_task", "--target-data", "TMP/mine.tsv", "--source-task", "sentiment"),
        "TMP/mine.tsv is missing or not a file",
    ),
    "data: no vocabulary": (
        raises(lambda folder: WordPiece.from_vocabulary(folder / "vocab.txt")),
        "the vocabulary TMP/vocab.txt is missing or not a file",
    ),
    "data: no captions": (
        raises(lambda folder: load_coco_captions(folder, image_size=8)),
        "TMP lacks annotations/captions_train2017.json; expected are annotations/captions_train2017.json,"
        " annotations/captions_val2017.json, and in TMP there is nothing",
    ),
    "data: no questions on images": (
        raises(lambda folder: load_vqa(folder / "vqa", image_size=8)),
        "the folder TMP/vqa is missing; expected in it are v2_OpenEnded_mscoco_train2014_questions.json,"
        " v2_mscoco_train2014_annotations.json, v2_OpenEnded_mscoco_val2014_questions.json,"
        " v2_mscoco_val2014_annotations.json",
    ),
    "data: a class without images": (
        image_folder({"train/bird/readme.txt": b"", "test/bird/1.png": png()}),
        "the class folder TMP/images/train/bird has no image; names must end in .bmp, .jpeg, .jpg, .png, .webp",
    ),
    "data: a class without a test": (
        image_folder({"test/dog/1.png": None}),
        "TMP/images must have the same classes in train and test: only in train ['dog'], only in test []",
    ),
    "data: an image of another size": (
        image_folder({"train/dog/1.png": png(9)}),
        "images must be of one size, but TMP/images/train/cat/1.png is 8x8 and TMP/images/train/dog/1.png is 9x9"
        " (width x"
        " height); give image_size to scale them",
    ),
    "data: a cut image": (
        image_folder({"test/cat/1.png": png(64)[:3000]}, image_size=8),
        "the image TMP/images/test/cat/1.png cannot be read: image file is truncated",
    ),
    "data: an empty image": (
        image_folder({"train/cat/1.png": b""}),
        "the image TMP/images/train/cat/1.png cannot be read: cannot identify image file 'TMP/images/train/cat/1.png'",
    ),
    "data: an image size of 0": (
        image_folder({}, image_size=0),
        "image_size must be a whole number of at least 1, got 0",
    ),
    "data: a missing image": (
        raises(lambda folder: check_image_files(folder, ["1.png"])),
        "the image TMP/1.png is missing; there is nothing (1 of 1 images cannot be used; unreadable='skip' leaves such"
        " images"
        " out)",
    ),
    "data: a cut archive": (
        on_file("x.tar.gz", ARCHIVE[:-20], members),
        "the archive TMP/x.tar.gz is truncated or broken (Compressed file ended before the end-of-stream marker was"
        " reached); replace it with a whole one",
    ),
    "data: an archive with a bit turned": (
        on_file("x.tar.gz", ARCHIVE[:-6] + bytes([ARCHIVE[-6] ^ 1]) + ARCHIVE[-5:], members),
        re.compile(
            r"the archive TMP/x\.tar\.gz is truncated or broken \(CRC check failed .*\); replace it with a whole one"
        ),
    ),
    "data: no archive": (
        on_file("x.tar.gz", b"hello", members),
        "the archive TMP/x.tar.gz is truncated or broken (Not a gzipped file (b'he')); replace it with a whole one",
    ),
    "data: no gzip of a tar": (
        on_file("x.tar.gz", gzip.compress(b"hello"), members),
        "the archive TMP/x.tar.gz is truncated or broken (truncated header); replace it with a whole one",
    ),
    "data: a cut table": (
        on_file("x.csv", CSV + "bad\n", load_texts),
        "TMP/x.csv, line 4: 1 columns, expected 2 as in line 1",
    ),
    "data: no UTF-8": (
        on_file("x.csv", b"text,label\n\xff,1\n", load_texts),
        "TMP/x.csv, line 2: not UTF-8, at the byte 0xff",
    ),
    "data: another column": (
        on_file("x.csv", CSV.replace("label", "lable"), load_texts),
        "TMP/x.csv has no column 'label'; did you mean 'lable'? (without a header, columns go by number from 0)",
    ),
    "data: no rows": (on_file("x.csv", "text,label\n", load_texts), "TMP/x.csv has no rows"),
    "data: another suffix": (
        on_file("x.npz", b"PK\3\4", load_texts),
        "TMP/x.npz must end in one of .csv, .jsonl, .tsv",
    ),
    "data: a cut line": (
        on_file("x.jsonl", '{"text": "good", "label": 1}\n{"text": "b', load_texts),
        "TMP/x.jsonl, line 2: no JSON: Unterminated string starting at: line 1 column 10 (char 9)",
    ),
    "data: cut questions": (
        on_file("x.json", '{"data": [', load_questions),
        "TMP/x.json is not JSON: Expecting value: line 1 column 11 (char 10)",
    ),
    # Labels and pixels.
    "label -1": (
        image_set(labels=(0, -1, 1, 2)),
        "mine train: labels must lie in [0, 3), got -1 at index 1 (1 of 4 are out of range)",
    ),
    "label C": (
        image_set(labels=(0, 1, 3, 2)),
        "mine train: labels must lie in [0, 3), got 3 at index 2 (1 of 4 are out of range)",
    ),
    "label 1.5": (
        image_set(labels=(0, 1.5, 1, 2)),
        "mine train: labels must be of an integer type, got float64, such as 1.5 at index 1",
    ),
    "labels of other images": (image_set(labels=(0, 1)), "mine train: labels of 4 images must be [4], got shape (2,)"),
    "label -1 of a text": (
        text_set([0, -1, 1]),
        "mine train: labels must lie in [0, 2), got -1 at index 1 (1 of 3 are out of range)",
    ),
    "label C of a text": (
        text_set([0, 1, 2]),
        "mine train: labels must lie in [0, 2), got 2 at index 2 (1 of 3 are out of range)",
    ),
    "label 1.5 of a text": (
        on_file("x.csv", "text,label\na,0\nb,1.5\n", load_texts),
        "TMP/x.csv, line 3: the label '1.5' must be a whole number, as in line 2",
    ),
    "labels that leave one out": (
        on_file("x.csv", "text,label\na,0\nb,2\n", load_texts),
        "TMP/x.csv: the labels 0, 2 leave out some of 3 classes; if that is meant, give classes and first_label",
    ),
    "pixel nan": (
        image_set(with_pixel(np.nan)),
        "mine train: pixels must be finite, got nan at (2, 0, 1, 2) (1 are not finite)",
    ),
    "pixel inf": (
        image_set(with_pixel(-np.inf)),
        "mine train: pixels must be finite, got -inf at (2, 0, 1, 2) (1 are not finite)",
    ),
    "pixels of another type": (
        image_set(np.zeros((4, 2, 2, 3), np.int64)),
        "mine train: images must be uint8 or of a float type, got int64",
    ),
    "pixels without channels": (
        image_set(np.zeros((4, 2, 2), np.uint8)),
        "mine train: images must be [N, H, W, C], got shape (4, 2, 2)",
    ),
    "rows that are not there": (
        raises(lambda _: Streamed(np.zeros((4, 2)), np.array([0, 4]))),
        "rows must lie in [0, 4), the rows of the table, got 0 to 4",
    ),
    # How much there is.
    "no examples": (
        image_set(np.zeros((0, 2, 2, 3), np.uint8), labels=()),
        "mine train: there are no examples, image has shape (0, 2, 2, 3)",
    ),
    "batches of nothing": (
        raises(lambda _: indices_of(0, 4, 0)),
        "batches need examples and a size of at least 1, got 0 and 4",
    ),
    "batches of a half": (
        raises(lambda _: indices_of(10, 1.5, 0)),
        "batches need examples and a size of at least 1, got 10 and 1.5",
    ),
    "entries of unequal lengths": (
        raises(lambda _: batches_of({"a": np.ones(2), "b": np.ones(3)}, 1, 0)),
        "all entries must have the same number of examples, got {'a': 2, 'b': 3}",
    ),
    "fewer rows than a batch": (
        refused("cross_structure", "--labels", "20", "--batch-size", "32"),
        "batch_size is 32, but the target learns from 20 examples: a batch would repeat some of them",
    ),
    "fewer labels than classes": (
        refused("cross_structure", "--labels", "5"),
        "the number of labels must lie between 10, one of each class, and 1197, the number there is, got 5",
    ),
    "more labels than there are": (
        raises(lambda _: class_balanced(SMALL, 13, 0)),
        "the number of labels must lie between 3, one of each class, and 12, the number there is, got 13",
    ),
    "no labels": (
        raises(lambda _: class_balanced({"text": np.ones(3)}, 2, 0)),
        "entry 'label' is missing; there is 'text'",
    ),
    "a split of none": (raises(lambda _: split(SMALL, 0, 0)), "size must be a whole number of at least 1, got 0"),
    "a split of all": (
        raises(lambda _: split(SMALL, 12, 0)),
        "the size of a split of 12 examples with each of 3 labels on either side must lie in [3, 9], got 12",
    ),
    "a label that cannot be split": (
        raises(lambda _: split({"label": np.array([0, 0, 0, 7])}, 2, 0)),
        "a split needs two examples of each label, there is one of 7",
    ),
    "validation of all": (
        refused("cross_task", "--validation", "4000", "--source-task", "sentiment"),
        "validation must lie in [1, 1999], for 2000 training examples of synthetic_reviews, got 4000",
    ),
    "validation below 0": (refused("cross_structure", "--validation", "-1"), "validation must be 0 or more, got -1"),
    "digits of another size": (
        refused("cross_structure", "--image-size", "4"),
        "shifted_digits are 10x10 images: image_size is for other data, got 4",
    ),
    "scenes too small": (
        refused("cross_modal", "--image-size", "15"),
        "image_size must be a whole number of at least 16 pixels, got 15",
    ),
    "scenes of no size": (
        refused("cross_modal", "--image-size", "None"),
        "vqa needs --image-size, which its images are scaled to",
    ),
}


test_bad_input_is_refused_in_one_line_that_names_it = refusals(ROWS)
