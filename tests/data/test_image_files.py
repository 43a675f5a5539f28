"""Images that are read when they are asked for, and the files that annotations name."""

import io
import os
import re
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from merge_jax.data import load_clevr, load_coco_captions, load_vqa
from merge_jax.data.images import image_files
from merge_jax.data.images.image_files import ImageFiles, check_image_files, image_table, read_rows
from merge_jax.data.images.image_set import as_pixels
from tests.data.common import exactly


def write(path, seed=0, size=(12, 8), mode="RGB"):
    """An image of random pixels, `size` is width x height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def truncate(path):
    """Cuts the end of the pixels off; the header stays whole."""
    path.write_bytes(path.read_bytes()[:-60])


def png_of(width, height):
    """A small PNG whose header claims any size."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 64))]
    framed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*chunks, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.fixture
def three(tmp_path):
    return [write(tmp_path / "a.png", 1), write(tmp_path / "b.jpg", 2, (8, 20)), write(tmp_path / "c.png", 3, mode="L")]


def test_rows_are_the_central_squares_of_the_files(three):
    table = ImageFiles(three, 4)
    assert (table.shape, table.dtype) == ((3, 4, 4, 3), np.uint8)
    squares = [(2, 0, 10, 8), (0, 6, 8, 14), (2, 0, 10, 8)]
    expected = []
    for file, box in zip(three, squares, strict=True):
        with Image.open(file) as image:
            square = image.convert("RGB").resize((4, 4), Image.Resampling.BILINEAR, box=box)
            expected.append(np.asarray(square))
    np.testing.assert_array_equal(table[np.array([2, 0, 1, 0])], np.array(expected)[[2, 0, 1, 0]])
    assert table[np.array([], np.int32)].shape == (0, 4, 4, 3)
    np.testing.assert_array_equal(table[np.array([[1], [2]])], np.array(expected)[[[1], [2]]])


def test_an_image_set_in_memory_has_the_same_pixels(three):
    for file, pixels in zip(three, ImageFiles(three, 5)[np.arange(3)], strict=True):
        with Image.open(file) as image:
            np.testing.assert_array_equal(pixels, as_pixels(image, "RGB", 5))


def test_a_file_is_read_once_a_call_however_often_it_is_asked_for(three, monkeypatch):
    opened = []
    monkeypatch.setattr(image_files, "open_image", lambda file, name: opened.append(file) or Image.open(file))
    ImageFiles(three, 4)[np.array([2, 0, 2, 2])]
    assert sorted(opened) == [three[0], three[2]]


def test_rows_are_read_at_the_same_time():
    together = threading.Barrier(4, timeout=10)

    def read(row):
        together.wait()  # Raises, and so fails the test, unless four come.
        return np.full((2,), row, np.uint8)

    np.testing.assert_array_equal(read_rows((9, 2), np.array([3, 5, 7, 0]), read)[:, 0], [3, 5, 7, 0])


def test_many_threads_may_read_the_same_table(three):
    table = ImageFiles(three, 4)
    expected, found = table[np.arange(3)], []
    threads = [threading.Thread(target=lambda: found.append(table[np.arange(3)])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for images in found:
        np.testing.assert_array_equal(images, expected)


def test_a_file_that_broke_since_is_named(three):
    table = ImageFiles(three, 4)
    truncate(three[1])
    with pytest.raises(ValueError, match=rf"^the image {three[1]} cannot be read: image file is truncated \("):
        table[np.arange(3)]
    three[2].unlink()
    with pytest.raises(ValueError, match=rf"^the image {three[2]} cannot be read: \[Errno 2\] No such file"):
        table[np.array([0, 2])]
    assert table[np.array([0])].shape == (1, 4, 4, 3)


def test_a_size_or_a_row_that_is_none_is_refused(three):
    with pytest.raises(ValueError, match=r"^image_size must be a whole number of at least 1, got 0$"):
        ImageFiles(three, 0)
    with pytest.raises(IndexError, match="3 is out of bounds"):
        ImageFiles(three, 4)[np.array([3])]


def test_good_files_are_found_and_nothing_is_said(three, tmp_path, capsys):
    names = ["c.png", "a.png", "sub/d.bmp"]
    write(tmp_path / "sub" / "d.bmp")
    for unreadable in ("error", "skip"):
        files, usable = check_image_files(tmp_path, names, unreadable)
        assert files == [tmp_path / name for name in names]
        assert usable.tolist() == [True] * 3
    assert capsys.readouterr() == ("", "")


def test_missing_files_are_named_with_near_misses(three, tmp_path):
    message = (
        f"the image {tmp_path}/a.jpg is missing; did you mean 'b.jpg' or 'a.png' or 'c.png'? (2 of 3 images cannot be"
        " used; unreadable='skip' leaves such images out)"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        check_image_files(tmp_path, ["a.png", "a.jpg", "x/y.png"])
    with pytest.raises(
        ValueError, match=rf"^the image {tmp_path}/x/y.png is missing: there is no folder {tmp_path}/x \(1 of 1 "
    ):
        check_image_files(tmp_path, ["x/y.png"])
    for unreadable in ("error", "skip"):
        with pytest.raises(ValueError, match=rf"^the folder {tmp_path}/none is missing; images are looked for there$"):
            check_image_files(tmp_path / "none", ["a.png"], unreadable)


def test_a_header_is_all_that_is_read_unless_what_is_broken_shall_be_skipped(three, tmp_path, capsys):
    truncate(three[1])
    _, usable = check_image_files(tmp_path, ["a.png", "b.jpg"])
    assert usable.all()
    _, usable = check_image_files(tmp_path, ["a.png", "b.jpg"], "skip")
    assert usable.tolist() == [True, False]
    assert re.fullmatch(
        rf"{tmp_path}: left out 1 of 2 images: the image {three[1]} cannot be read: image file is truncated \(.*\)\n",
        capsys.readouterr().err,
    )


def test_text_bombs_deep_pixels_and_pipes_are_no_images(three, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "bomb.png").write_bytes(png_of(60_000, 60_000))
    Image.fromarray(np.full((5, 5), 1000, np.uint16)).save(tmp_path / "deep.png")
    os.mkfifo(tmp_path / "pipe.png")  # To open it would wait for ever.
    messages = {
        "text.jpg": "cannot be read: cannot identify image file",
        "bomb.png": r"cannot be read: Image size \(3600000000 pixels\) exceeds limit",
        "deep.png": "has pixels of mode 'I;16', expected 8 bits a channel",
        "pipe.png": "is not a file",
    }
    for name, message in messages.items():
        with pytest.raises(
            ValueError, match=rf"^the image {tmp_path}/{name} {message}.*\(1 of 2 images cannot"
        ) as error:
            check_image_files(tmp_path, ["a.png", name])
        assert "\n" not in str(error.value)
    _, usable = check_image_files(tmp_path, [*messages, "a.png"], "skip")
    assert usable.tolist() == [False] * 4 + [True]
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: left out 4 of 5 images: the image {tmp_path}/text.jpg cannot be read: ")
    assert said.endswith("expected 8 bits a channel; ...\n")
    with pytest.raises(ValueError, match=rf"^{tmp_path}: none of 4 images can be used: the image {tmp_path}/text.jpg"):
        check_image_files(tmp_path, [*messages], "skip")


def test_a_size_at_which_pillow_only_warns_is_refused_too(tmp_path):
    (tmp_path / "large.png").write_bytes(png_of(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"large.png cannot be read: it claims 10000x10000 pixels, over the limit"):
            check_image_files(tmp_path, ["large.png"])


def test_formats_that_run_other_programs_are_not_opened(tmp_path):
    file = tmp_path / "a.png"
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "GIF")
    for other in (content.getvalue(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"):
        file.write_bytes(other)
        with pytest.raises(ValueError, match=f"the image {file} cannot be read: cannot identify image file"):
            check_image_files(tmp_path, ["a.png"])


@pytest.mark.parametrize("unreadable", ["error", "skip"])
@pytest.mark.parametrize("name", ["../a.png", "sub/../../a.png", "/etc/passwd", "", ".", "a\n.png", "a\0.png", ".."])
def test_a_name_that_leads_out_of_the_folder_is_refused(name, unreadable, tmp_path):
    root = tmp_path / "root"
    write(root / "a.png")
    write(tmp_path / "a.png")
    message = f"the image {name!r} must be named by a path relative to {root}, which stays inside"
    with pytest.raises(ValueError, match=exactly(message)):
        check_image_files(root, ["a.png", name], unreadable)


@pytest.mark.parametrize("unreadable", ["error", "skip"])
@pytest.mark.parametrize("place", ["sub", "sub/a.png"])
def test_a_link_that_leads_out_of_the_folder_is_refused(place, unreadable, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    write(root / "sub" / "a.png")
    (root / place).rename(outside)
    (root / place).symlink_to(outside)
    message = f"{root / place} leads to {outside}, outside of {root}; move what it links to into the folder"
    with pytest.raises(ValueError, match=exactly(message)):
        check_image_files(root, ["sub/a.png"], unreadable)


def test_links_inside_of_the_folder_are_followed_and_circles_lead_nowhere(tmp_path):
    root = tmp_path / "root"
    write(root / "a.png")
    (root / "b.png").symlink_to(root / "a.png")
    (root / "c.png").symlink_to(root / "c.png")
    (tmp_path / "link").symlink_to(root)
    files, _ = check_image_files(tmp_path / "link", ["b.png"])
    np.testing.assert_array_equal(*ImageFiles([*files, root / "a.png"], 4)[np.arange(2)])
    with pytest.raises(ValueError, match=rf"^the image {root}/c.png is not a file \(1 of 1"):
        check_image_files(root, ["c.png"])


def test_names_that_no_disk_takes_are_missing(three, tmp_path):
    with pytest.raises(ValueError, match=r"the image .* is missing; .*1 of 2 images"):
        check_image_files(tmp_path, ["a.png", "x" * 300])


def test_a_way_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^unknown way with unreadable images 'skp'; did you mean 'skip'\?$"):
        check_image_files(tmp_path, [], "skp")


def test_a_table_has_each_image_once_and_none_that_is_left_out(three, tmp_path, capsys):
    (tmp_path / "x.png").write_text("not an image")
    table, rows = image_table(tmp_path, ["b.jpg", "x.png", "a.png", "b.jpg", "c.png", "x.png"], 4, "skip")
    assert table.files == [three[1], three[0], three[2]]
    assert rows.dtype == np.int32
    assert rows.tolist() == [0, -1, 1, 0, 2, -1]
    assert "left out 1 of 4 images" in capsys.readouterr().err


@pytest.mark.parametrize("load", [load_clevr, load_coco_captions, load_vqa])
def test_options_are_checked_before_anything_is_read(load, tmp_path):
    with pytest.raises(ValueError, match=r"\Aimage_size must be a whole number of at least 1, got 0\Z"):
        load(tmp_path, image_size=0)
    with pytest.raises(ValueError, match=r"\Aunknown way with unreadable images 'x'; there is 'error', 'skip'\Z"):
        load(tmp_path, image_size=8, unreadable="x")
