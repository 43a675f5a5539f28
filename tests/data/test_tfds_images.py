"""Images of TFDS: any set of labelled images is read, and what cannot be is named."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from merge_jax.data import load_tfds_images
from tests.data.common import as_file, by_content, pixels


def test_a_set_to_be_downloaded_by_hand_says_so(tmp_path):
    place = tmp_path / "downloads" / "manual"
    with pytest.raises(ValueError, match=rf"imagenet2012 cannot be .* Manual directory {place} does not exist"):
        load_tfds_images("imagenet2012", tmp_path)


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """A set with the splits and the images of its class attributes."""

    VERSION = tfds.core.Version("1.0.0")
    features: dict
    splits: dict

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(images) for split, images in self.splits.items()}

    def _generate_examples(self, images):
        for index, image in enumerate(images):
            yield index, {"image": image if isinstance(image, np.ndarray) else as_file(image), "label": index % 2}


@pytest.fixture
def tiny(monkeypatch):
    def set_up(splits, **features):
        default = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
        monkeypatch.setattr(TinyImages, "splits", splits, raising=False)
        monkeypatch.setattr(TinyImages, "features", features or default, raising=False)

    return set_up


def images_of(array):
    return [Image.fromarray(image.squeeze()) for image in array]


@pytest.mark.parametrize("test", ["test", "validation"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_set_of_tfds_is_read(test, channels, tiny, tmp_path):
    splits = {"train": pixels(0, 5, 8, channels), test: pixels(1, 2, 8, channels), "other": pixels(2, 1, 9, channels)}
    tiny(
        {split: images_of(array) for split, array in splits.items()},
        image=tfds.features.Image(shape=(None, None, channels)),
        label=tfds.features.ClassLabel(names=["cat", "dog"]),
    )
    loaded = load_tfds_images("tiny_images", tmp_path)
    assert loaded.classes == ("cat", "dog")
    for arrays, split in ((loaded.train, "train"), (loaded.test, test)):
        expected = splits[split]
        assert by_content(arrays["image"], arrays["label"]) == by_content(expected, np.arange(len(expected)) % 2)
        assert arrays["image"].shape == expected.shape
    again = load_tfds_images("tiny_images", tmp_path)
    np.testing.assert_array_equal(again.train["image"], loaded.train["image"])


def test_an_image_with_a_palette_has_its_colours(tiny, tmp_path):
    colours = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    tiny(
        {"train": [Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE)], "test": images_of([colours])}
    )
    np.testing.assert_array_equal(load_tfds_images("tiny_images", tmp_path).train["image"], [colours])


def test_images_of_unequal_size_are_cut_to_the_central_square(tiny, tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200  # All that a square of its height keeps.
    tiny({"train": images_of([wide, pixels(0, 1, 16)[0]]), "test": images_of(pixels(1, 2, 8))})
    with pytest.raises(ValueError, match=r"tiny_images train must be of one size.*\(4, 8, 3\).*give image_size"):
        load_tfds_images("tiny_images", tmp_path)
    loaded = load_tfds_images("tiny_images", tmp_path, image_size=4)
    assert loaded.train["image"].shape == (2, 4, 4, 3)
    assert loaded.test["image"].shape == (2, 4, 4, 3)
    assert (loaded.train["image"][loaded.train["label"] == 0] == 200).all()
    with pytest.raises(ValueError, match="image_size must be a whole number of at least 1, got 0"):
        load_tfds_images("tiny_images", tmp_path, image_size=0)


def test_a_set_that_is_not_of_labelled_images_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"squad needs features 'image'.* found \{'id': .*'question': 'Text'"):
        load_tfds_images("squad", tmp_path)
    label = tfds.features.ClassLabel(num_classes=2)
    tiny({}, image=tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16), label=label)
    with pytest.raises(
        ValueError, match=r"images of uint8 with \[1, 3, 4\] channels, found uint16 of shape \(8, 8, 1\)"
    ):
        load_tfds_images("tiny_images", tmp_path)


@pytest.mark.parametrize("splits", [{"train": 2}, {"test": 2}, {"train": 2, "dev": 1}])
def test_missing_splits_are_named(splits, tiny, tmp_path):
    tiny({split: images_of(pixels(0, count, 8)) for split, count in splits.items()})
    with pytest.raises(ValueError, match=rf"'train' and one of 'test' and 'validation', found \{list(splits)}"):
        load_tfds_images("tiny_images", tmp_path)


def test_an_unknown_set_is_named_with_near_misses(tmp_path):
    with pytest.raises(ValueError, match=r"^unknown data set 'cifar_100'; did you mean 'cifar100'.*$"):
        load_tfds_images("cifar_100", tmp_path)


def test_a_builder_that_needs_tensorflow_says_what_to_do(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # Also where it is installed.
    tiny({"train": [pixels(0, 1, 8)[0]], "test": [pixels(1, 1, 8)[0]]})  # TFDS encodes arrays by TensorFlow.
    with pytest.raises(ValueError, match=rf"tiny_images needs TensorFlow.* prepare it once where .* into {tmp_path}$"):
        load_tfds_images("tiny_images", tmp_path)
    assert capsys.readouterr().out == ""


def test_a_set_prepared_as_tfrecord_is_refused(tiny, tmp_path, monkeypatch):
    tiny({"train": images_of(pixels(0, 2, 8)), "test": images_of(pixels(1, 2, 8))})
    load_tfds_images("tiny_images", tmp_path)
    info = tmp_path / "tiny_images" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"1.0.0 as tfrecord, which cannot be read without TensorFlow"):
        load_tfds_images("tiny_images", tmp_path)
