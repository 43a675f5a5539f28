"""CIFAR: it is read from its official archive, prepared once, and a wrong or broken archive is named."""

import gzip
import io
import shutil
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from merge_jax.data import load_tfds_images
from merge_jax.study.models.images import load_images
from tests.data.common import by_content, pixels, serve

PREFIX = {"cifar10": "cifar-10-batches-bin/", "cifar100": "cifar-100-binary/"}
ARCHIVE = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}
TEST_FILE = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}
NAMES = [f"class_{i}" for i in range(100)]


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
