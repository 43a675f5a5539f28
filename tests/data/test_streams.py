"""Entries that are read when they are asked for, and the pairs of images and captions."""

import numpy as np
import pytest

from merge_jax.data import (
    CaptionedImages,
    ReadAhead,
    Streamed,
    batches_of,
    class_balanced,
    indices_of,
    is_streamed,
    num_examples,
    split,
    take,
)


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


def test_what_is_read_ahead_is_what_the_indices_name():
    table, entry = streamed(np.arange(30) % 5)
    arrays = {"target": {"image": entry, "row": np.arange(30)}, "source": {"x": np.arange(7)}}
    indices_at = {"target": indices_of(30, 4, seed=1), "source": indices_of(7, 2, seed=1)}
    assert is_streamed(arrays["target"])
    assert not is_streamed(arrays["source"])
    with ReadAhead(arrays, indices_at, 3) as ahead:
        # In turn, a short chunk at a report, and out of turn, as a resumed run asks.
        for first, count in ((0, 3), (3, 2), (5, 3), (20, 1)):
            found, indices = ahead.read(first, count)
            for role, at in indices_at.items():
                for name, whole in arrays[role].items():
                    expected = whole[at(first, 3).ravel()].reshape(3, at(0, 1).shape[1], *whole.shape[1:])
                    np.testing.assert_array_equal(found[role][name][indices[role]], expected)
    assert max(map(len, table.read)) == 12


def test_an_error_ahead_is_raised_when_its_chunk_is_asked_for():
    class Breaks:
        shape, dtype = (30, 2), np.uint8

        def __getitem__(self, rows):
            if 29 in rows:
                raise ValueError("row 29 cannot be read")
            return np.zeros((len(rows), 2), np.uint8)

    entry = Streamed(Breaks(), np.arange(30))
    in_order = {"target": lambda first, count: np.arange(2 * first, 2 * (first + count)).reshape(count, 2) % 30}
    with ReadAhead({"target": {"image": entry}}, in_order, 5) as ahead:
        for first in (0, 5):
            ahead.read(first, 5)
        with pytest.raises(ValueError, match="row 29 cannot be read"):
            ahead.read(10, 5)


def test_a_chunk_needs_steps():
    with pytest.raises(ValueError, match=r"steps must be .*at least 1, got 0"):
        ReadAhead({}, {}, 0)
