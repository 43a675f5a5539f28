"""Folders of images: classes, formats and sizes, and files that are refused."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from merge_jax.data import load_image_folder
from tests.data.common import as_file, pixels


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


def test_an_image_set_cannot_be_changed(tmp_path):
    write_folder(tmp_path, size=8)
    loaded = load_image_folder(tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.name = "other"
