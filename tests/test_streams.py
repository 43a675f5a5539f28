"""Entries that are read when they are asked for, and the pairs of images and captions."""

import numpy as np
import pytest

from merge_jax.data import CaptionedImages, Streamed, batches_of, class_balanced, num_examples, split, take


class Reads:
    """A table that knows which rows were read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __getitem__(self, rows):
        self.read.append(np.asarray(rows))
        return self.array[rows]


def streamed(rows):
    table = Reads(np.arange(10, dtype=np.uint8).reshape(5, 2))
    return table, Streamed(table, np.asarray(rows))


def test_rows_are_read_when_they_are_asked_for_and_no_others():
    table, entry = streamed([4, 0, 4])
    assert (len(entry), entry.shape, entry.dtype) == (3, (3, 2), np.uint8)
    taken = entry.take(np.array([2, 1]))
    assert not table.read
    np.testing.assert_array_equal(taken[np.array([1])], [[0, 1]])
    np.testing.assert_array_equal(table.read, [[0]])
    np.testing.assert_array_equal(entry[:2], [[8, 9], [0, 1]])


def test_splits_take_what_is_streamed_unread():
    table, entry = streamed(np.arange(40) % 5)
    arrays = {"image": entry, "label": np.arange(40) % 2}
    assert num_examples(arrays) == 40
    chosen, rest = split(arrays, 10, seed=0)
    few = class_balanced(rest, 6, seed=0)
    assert not table.read
    assert sorted(np.concatenate([chosen["image"].rows, rest["image"].rows])) == sorted(entry.rows)
    np.testing.assert_array_equal(few["image"].rows % 2, few["image"][:][:, 0] // 2 % 2)
    taken = take(arrays, np.array([7]))
    np.testing.assert_array_equal(taken["image"][:], entry[7:8])


def test_batches_of_streamed_entries_are_arrays():
    _, entry = streamed(np.arange(5))
    batch = batches_of({"image": entry, "row": np.arange(5)}, 3, seed=1)(0)
    assert isinstance(batch["image"], np.ndarray)
    np.testing.assert_array_equal(batch["image"][:, 0], 2 * batch["row"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 5], r"rows must lie in \[0, 5\), the rows of the table, got 0 to 5"),
        ([-1], r"rows must lie in \[0, 5\), the rows of the table, got -1 to -1"),
        ([0.5], r"rows must be whole numbers \[N\], got float64 of shape \(1,\)"),
        ([[1]], r"rows must be whole numbers \[N\], got int64 of shape \(1, 1\)"),
    ],
)
def test_rows_that_the_table_has_not_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        streamed(rows)


def test_pairs_are_all_images_with_all_captions_of_their_group():
    rng = np.random.default_rng(0)
    images, captions = rng.integers(0, 6, 20), rng.integers(0, 7, 15)
    found = CaptionedImages(np.zeros((20, 1, 1, 3), np.uint8), images, ["a"] * 15, captions).pairs()
    expected = [(i, k) for i in range(20) for k in range(15) if images[i] == captions[k]]
    assert list(zip(*found, strict=True)) == expected
