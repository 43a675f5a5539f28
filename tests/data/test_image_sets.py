import dataclasses
import gzip
import io
import os
import shutil
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from merge_jax.data import channel_statistics, check_images, load_image_folder, load_tfds_images
from merge_jax.study.images import load_images
from tests.data.common import serve

PREFIX = {"cifar10": "cifar-10-batches-bin/", "cifar100": "cifar-100-binary/"}
ARCHIVE = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}
TEST_FILE = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}
NAMES = [f"class_{i}" for i in range(100)]


def pixels(seed, count, size=32, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), np.uint8)


def records(labels, images):
    """The official layout: the labels of each image, and its pixels with channels first."""
    columns = np.asarray(labels, np.uint8).reshape(len(images), -1)
    return np.concatenate([columns, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1).tobytes()


def cifar_members(name):
    """Files of the official archive, and the images and labels of both splits; few images, and not of every class."""
    train, test = pixels(0, 10), pixels(1, 4)
    train_labels, test_labels = np.arange(10) % 10, np.array([9, 0, 3, 7])
    if name == "cifar10":
        batches = {
            f"data_batch_{i + 1}.bin": records(train_labels[part], train[part])
            for i, part in enumerate(np.split(np.arange(10), 5))
        }
        files = {**batches, "batches.meta.txt": "\n".join([*NAMES[:10], "", ""]).encode()}
        files["test_batch.bin"] = records(test_labels, test)
    else:
        train_labels, test_labels = 10 * train_labels + 9, 10 * test_labels
        files = {
            "coarse_label_names.txt": "\n".join(f"coarse_{i}" for i in range(20)).encode(),
            "fine_label_names.txt": "\n".join(NAMES).encode(),
            "train.bin": records(np.stack([train_labels // 5, train_labels], 1), train),
            "test.bin": records(np.stack([test_labels // 5, test_labels], 1), test),
        }
    return files, (train, train_labels), (test, test_labels)


def put_archive(data_dir, name, files):
    path = data_dir / "downloads" / "manual" / ARCHIVE[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            info = tarfile.TarInfo(PREFIX[name] + file)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def by_content(images, labels):
    """Examples whatever their order, which TFDS draws."""
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_the_scenarios_of_a_study_share_the_images_of_a_set(tmp_path):
    put_archive(tmp_path, "cifar100", cifar_members("cifar100")[0])
    once, again = (load_images("cifar100", tmp_path, None, 0).splits(0) for _ in range(2))
    assert once.test["image"] is again.test["image"]
    coarse = load_images("cifar100", tmp_path, None, 0, "coarse_label").splits(0)
    assert coarse.test["label"].max() < 20 <= once.test["label"].max()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_archive_and_official_tfds_reads_what_was_prepared(name, tmp_path, capsys):
    files, train, test = cifar_members(name)
    put_archive(tmp_path, name, files)
    loaded = load_tfds_images(name, tmp_path)
    assert capsys.readouterr().out == ""
    assert loaded.name == name
    assert loaded.classes == tuple(NAMES[: loaded.num_classes])
    for arrays, expected in ((loaded.train, train), (loaded.test, test)):
        assert arrays["image"].dtype == np.uint8
        assert arrays["image"].shape == (len(expected[0]), 32, 32, 3)
        assert arrays["label"].dtype == np.int32
        assert by_content(arrays["image"], arrays["label"]) == by_content(*expected)

    source = tfds.data_source(name, split="test", data_dir=tmp_path)
    official = {example["id"].decode(): example for example in source}
    for index, (image, label) in enumerate(zip(*test, strict=True)):
        example = official[f"test_{index:05d}"]
        np.testing.assert_array_equal(example["image"], image)
        assert example["label"] == label
        if name == "cifar100":
            assert example["coarse_label"] == label // 5
    assert tfds.builder(name, data_dir=tmp_path).info.features["label"].int2str(3) == "class_3"


def test_another_feature_may_be_the_label(tmp_path):
    files, train, _ = cifar_members("cifar100")
    put_archive(tmp_path, "cifar100", files)
    loaded = load_tfds_images("cifar100", tmp_path, label="coarse_label")
    assert loaded.classes == tuple(f"coarse_{i}" for i in range(20))
    assert by_content(*loaded.train.values()) == by_content(train[0], [label // 5 for label in train[1]])
    with pytest.raises(ValueError, match=r"cifar100 needs features 'image', an Image, and 'corse', a ClassLabel"):
        load_tfds_images("cifar100", tmp_path, label="corse")


def test_a_prepared_set_is_used_again_and_needs_its_archive_no_more(tmp_path):
    files, *_ = cifar_members("cifar10")
    archive = put_archive(tmp_path, "cifar10", files)
    first = load_tfds_images("cifar10", tmp_path)
    written = next(tmp_path.glob("cifar10/*/*train.array_record*"))
    before = written.stat().st_mtime_ns
    archive.unlink()
    second = load_tfds_images("cifar10", str(tmp_path))
    assert written.stat().st_mtime_ns == before
    for split in ("train", "test"):
        for entry in ("image", "label"):
            np.testing.assert_array_equal(getattr(first, split)[entry], getattr(second, split)[entry])


def test_another_archive_than_the_prepared_one_is_refused(tmp_path):
    files, *_ = cifar_members("cifar10")
    put_archive(tmp_path, "cifar10", files)
    load_tfds_images("cifar10", tmp_path)
    files["test_batch.bin"] = records([0, 1, 2, 3], pixels(7, 4))
    put_archive(tmp_path, "cifar10", files)
    folder = tmp_path / "cifar10" / "3.0.2"
    with pytest.raises(ValueError, match=f"another archive than .*; remove the folder {folder} "):
        load_tfds_images("cifar10", tmp_path)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(np.sort(load_tfds_images("cifar10", tmp_path).test["label"]), [0, 1, 2, 3])

    # TFDS itself leaves no record, and takes the official archive alone, which this one is not.
    (folder / "archive.sha256").unlink()
    with pytest.raises(ValueError, match="another archive"):
        load_tfds_images("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files, file: files | {file: files[file][:-1]}, r"{file} must hold records of {length} bytes, found"),
        (lambda files, file: files | {file: b""}, r"{file} must hold .* found 0 bytes"),
        (
            lambda files, file: {key: files[key] for key in files if key != file},
            r"lacks \['{prefix}{file}'\]: expected",
        ),
        (
            lambda files, file: files | {file: files[file][:-3073] + bytes([200]) + files[file][-3072:]},
            r"label in {file} must lie in \[0, \d+\), found 200 in record 3",
        ),
        (
            lambda files, file: {key: b"a\nb" if key.endswith(".txt") else files[key] for key in files},
            r"\.txt must name \d+ different classes, found 2",
        ),
    ],
    ids=["truncated", "empty", "missing", "label", "names"],
)
def test_a_wrong_archive_is_named_and_leaves_nothing_behind(name, change, message, tmp_path):
    files, *_ = cifar_members(name)
    path = put_archive(tmp_path, name, change(files, TEST_FILE[name]))
    length = {"cifar10": 3073, "cifar100": 3074}[name]
    expected = message.format(file=TEST_FILE[name], prefix=PREFIX[name], length=length)
    with pytest.raises(ValueError, match=f"{path}:? .*{expected}") as caught:
        load_tfds_images(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / name).glob("[0-9]*"))


def test_a_link_in_place_of_a_member_is_not_followed(tmp_path):
    files, *_ = cifar_members("cifar100")
    path = put_archive(tmp_path, "cifar100", {"elsewhere.bin": files.pop("test.bin"), **files})
    content = gzip.decompress(path.read_bytes())
    stream = io.BytesIO(content)
    with tarfile.open(fileobj=stream, mode="a") as archive:
        link = tarfile.TarInfo("cifar-100-binary/test.bin")
        link.type, link.linkname = tarfile.LNKTYPE, "cifar-100-binary/elsewhere.bin"
        archive.addfile(link)
    path.write_bytes(gzip.compress(stream.getvalue()))
    with pytest.raises(ValueError, match=r"lacks \['cifar-100-binary/test.bin'\]"):
        load_tfds_images("cifar100", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "no trailer", "flipped", "no gzip", "no tar"])
def test_a_broken_archive_is_named(damage, tmp_path):
    files, *_ = cifar_members("cifar100")
    path = put_archive(tmp_path, "cifar100", files)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        # The pixels are random, so the compressor stores them as they are, and only the checksum can tell.
        content[len(content) // 2] ^= 1
    damaged = {
        "truncated": content[: len(content) // 2],
        "no trailer": content[:-8],
        "flipped": content,
        "no gzip": b"<html>not found</html>",
        "no tar": gzip.compress(b"not a tar file" * 100),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"the archive {path} is truncated or broken"):
        load_tfds_images("cifar100", tmp_path)


def test_an_archive_is_downloaded_where_there_is_none(tmp_path, monkeypatch):
    files, train, _ = cifar_members("cifar100")
    content = put_archive(tmp_path / "elsewhere", "cifar100", files).read_bytes()
    url = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    ours = url.replace("www.cs.toronto.edu", "localhost")  # TFDS knows no checksum of it.
    asked = serve(monkeypatch, {url: content, ours: content})
    with pytest.raises(ValueError, match=rf"{url} cannot be downloaded \(Artifact .* has wrong checksum"):
        load_tfds_images("cifar100", tmp_path / "official")

    official = tfds.builder_cls("cifar100")._cifar_info.fget
    monkeypatch.setattr(
        tfds.builder_cls("cifar100"), "_cifar_info", property(lambda builder: official(builder)._replace(url=ours))
    )
    loaded = load_tfds_images("cifar100", tmp_path / "own")
    assert by_content(loaded.train["image"], loaded.train["label"]) == by_content(*train)
    assert asked == [url, ours]


def test_without_a_network_the_error_names_url_and_place(tmp_path, monkeypatch):
    serve(monkeypatch, {})
    place = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    with pytest.raises(ValueError, match=rf"/cifar-10-binary.tar.gz cannot .*\(no network\); .* put it at {place}$"):
        load_tfds_images("cifar10", tmp_path)
    with pytest.raises(ValueError, match=rf"mnist cannot be downloaded or prepared in {tmp_path}: no network"):
        load_tfds_images("mnist", tmp_path)


def test_a_set_to_be_downloaded_by_hand_says_so(tmp_path):
    place = tmp_path / "downloads" / "manual"
    with pytest.raises(ValueError, match=rf"imagenet2012 cannot be .* Manual directory {place} does not exist"):
        load_tfds_images("imagenet2012", tmp_path)


def as_file(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format)
    file.seek(0)
    return file


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


def write_folder(root, **options):
    """train/{a2,a10} and test/{a2,a10}, two random images each; returns them by path inside of `root`."""
    written = {}
    for index, folder in enumerate(("train/a2", "train/a10", "test/a2", "test/a10")):
        for position, image in enumerate(pixels(index, 2, **options)):
            path = root / folder / f"{position}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).save(path)
            written[f"{folder}/{position}.png"] = image
    return written


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_read_with_classes_in_natural_order(channels, tmp_path):
    written = write_folder(tmp_path, size=8, channels=channels)
    (tmp_path / "train" / "a2" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    loaded = load_image_folder(tmp_path)
    assert loaded.name == tmp_path.name
    assert loaded.classes == ("a2", "a10")
    for split, arrays in (("train", loaded.train), ("test", loaded.test)):
        np.testing.assert_array_equal(
            arrays["image"], [image for path, image in written.items() if path.startswith(split)]
        )
        np.testing.assert_array_equal(arrays["label"], [0, 0, 1, 1])
        assert arrays["label"].dtype == np.int32


def test_every_format_and_mode_of_a_folder_becomes_rgb(tmp_path):
    write_folder(tmp_path, size=8)
    grey = Image.fromarray(pixels(9, 1, 8, 1)[0].squeeze())
    for name in ("p.PNG", "q.jpg", "r.JPEG", "s.bmp", "t.webp"):
        grey.save(tmp_path / "test" / "a10" / name)
    grey.convert("RGBA").save(tmp_path / "test" / "a10" / "u.png")
    images = load_image_folder(tmp_path).test["image"]
    assert images.shape == (10, 8, 8, 3)
    np.testing.assert_array_equal(images[4], np.asarray(grey)[..., None].repeat(3, axis=-1))
    np.testing.assert_array_equal(images[9], images[4])


def test_files_of_unequal_size_are_named_or_scaled(tmp_path):
    write_folder(tmp_path, size=8)
    odd = tmp_path / "test" / "a2" / "0.png"
    Image.new("RGB", (6, 12)).save(odd)
    with pytest.raises(ValueError, match=f"but {tmp_path}/train/a2/0.png is 8x8 and {odd} is 6x12 .*give image_size"):
        load_image_folder(tmp_path)
    assert load_image_folder(tmp_path, image_size=5).test["image"].shape == (4, 5, 5, 3)
    with pytest.raises(ValueError, match="image_size must be a whole number"):
        load_image_folder(tmp_path, image_size=-1)


def test_missing_folders_and_classes_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"the folder {tmp_path}/train is missing; .*{tmp_path}/train/<class>/"):
        load_image_folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/train has no class folders"):
        load_image_folder(tmp_path)
    write_folder(tmp_path, size=8)
    shutil.move(tmp_path / "test" / "a2", tmp_path / "test" / "b")
    with pytest.raises(ValueError, match=r"only in train \['a2'\], only in test \['b'\]"):
        load_image_folder(tmp_path)
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(ValueError, match=f"the folder {tmp_path}/test is missing"):
        load_image_folder(tmp_path)


def test_an_empty_class_is_named(tmp_path):
    write_folder(tmp_path, size=8)
    for file in (tmp_path / "test" / "a10").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(ValueError, match=f"the class folder {tmp_path}/test/a10 has no image; .*.bmp, .jpeg"):
        load_image_folder(tmp_path)


@pytest.mark.parametrize("damage", ["text", "truncated", "other format"])
def test_an_unreadable_image_is_named(damage, tmp_path):
    write_folder(tmp_path, size=32)
    file = tmp_path / "train" / "a10" / "1.png"
    whole = file.read_bytes()
    other = as_file(Image.open(file), "GIF").getvalue()
    file.write_bytes({"text": b"not an image", "truncated": whole[: len(whole) // 2], "other format": other}[damage])
    with pytest.raises(ValueError, match=f"the image {file} cannot be read: "):
        load_image_folder(tmp_path)


def test_deep_and_enormous_images_are_refused(tmp_path, monkeypatch):
    write_folder(tmp_path, size=8)
    file = tmp_path / "train" / "a2" / "0.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(ValueError, match=rf"the image {file} cannot be read: Image size \(64 pixels\) exceeds limit"):
        load_image_folder(tmp_path)
    Image.fromarray(np.full((5, 5), 1000, np.uint16)).save(file)
    with pytest.raises(ValueError, match=f"the image {file} has pixels of mode 'I;16', expected 8 bits"):
        load_image_folder(tmp_path)


@pytest.mark.parametrize("place", ["train", "train/a2", "train/a2/0.png"])
def test_a_link_that_leaves_the_folder_is_refused(place, tmp_path):
    root = tmp_path / "root"
    write_folder(root, size=8)
    outside = tmp_path / "outside"
    shutil.move(root / place, outside)
    (root / place).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{root / place} leads to {outside}, outside of {root}"):
        load_image_folder(root)


def test_a_link_within_the_folder_and_to_the_folder_is_followed(tmp_path):
    root, link = tmp_path / "root", tmp_path / "link"
    write_folder(root, size=8)
    (root / "train" / "a2" / "2.png").symlink_to(root / "train" / "a2" / "0.png")
    link.symlink_to(root)
    images = load_image_folder(link).train["image"]
    np.testing.assert_array_equal(images[2], images[0])


def test_what_is_not_a_file_is_refused(tmp_path):
    write_folder(tmp_path, size=8)
    pipe = tmp_path / "train" / "a2" / "3.png"
    os.mkfifo(pipe)  # To open it would wait for ever.
    with pytest.raises(ValueError, match=f"{pipe} is not a file"):
        load_image_folder(tmp_path)


def test_statistics_equal_those_of_a_float_copy():
    images = pixels(0, 7, 6)
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-12)
    assert channel_statistics(np.full((2, 4, 4, 1), 255, np.uint8)) == ((1.0,), (0.0,))
    with pytest.raises(ValueError, match=r"channel statistics: images must be uint8 .* got float64 of shape \(7,"):
        channel_statistics(images / 255)
    with pytest.raises(ValueError, match=r"need pixels, got shape \(0, 6, 6, 3\)"):
        channel_statistics(images[:0])


GOOD = {"image": np.zeros((3, 2, 2, 1), np.float32), "label": np.array([0, 1, 1])}
WITH_NAN = GOOD["image"].copy()
WITH_NAN[1, 0, 1, 0], WITH_NAN[2, 0, 0, 0] = np.nan, np.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "entry 'label' is missing; there is 'image'"),
        ({"image": GOOD["image"][0]}, r"images must be \[N, H, W, C\], got shape \(2, 2, 1\)"),
        ({"image": GOOD["image"][:0], "label": GOOD["label"][:0]}, "there are no examples"),
        ({"image": GOOD["image"].astype(int)}, "uint8 or of a float type, got int64"),
        ({"label": GOOD["label"].astype(float)}, "labels must be of an integer type, got float64"),
        ({"label": GOOD["label"][:2]}, r"labels of 3 images must be \[3\], got shape \(2,\)"),
        ({"label": np.array([0, 2, 5])}, r"labels must lie in \[0, 2\), got 2 at index 1 \(2 of 3 are out of range\)"),
        ({"label": np.array([0, 1, -1])}, r"got -1 at index 2"),
        ({"image": WITH_NAN}, r"pixels must be finite, got nan at \(1, 0, 1, 0\) \(2 are not finite\)"),
    ],
)
def test_bad_images_are_named(changes, message):
    arrays = {entry: array for entry, array in {**GOOD, **changes}.items() if array is not None}
    with pytest.raises(ValueError, match=f"^mine: .*{message}"):
        check_images("mine", arrays, 2)


def test_good_images_pass():
    check_images("mine", GOOD, 2)
    check_images("mine", {"image": pixels(0, 3), "label": np.array([0, 1, 1], np.uint8)}, 2)


def test_an_image_set_cannot_be_changed(tmp_path):
    write_folder(tmp_path, size=8)
    loaded = load_image_folder(tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.name = "other"
