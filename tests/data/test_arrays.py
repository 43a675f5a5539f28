import itertools

import numpy as np
import pytest

from merge_jax.data import batches_of, class_balanced, indices_of, load_digits


def test_the_batch_of_a_step_holds_the_examples_that_the_indices_name():
    arrays = {"image": np.random.default_rng(0).normal(size=(23, 2)), "label": np.arange(23)}
    batch_at, rows = batches_of(arrays, 5, seed=3), indices_of(23, 5, seed=3)(0, 20)
    assert rows.shape == (20, 5)
    assert rows.dtype == np.int32
    for step, indices in enumerate(rows):
        batch = batch_at(step)
        np.testing.assert_array_equal(batch["label"], indices)
        np.testing.assert_array_equal(batch["image"], arrays["image"][indices])


@pytest.mark.parametrize(("size", "batch_size"), [(23, 5), (20, 5), (3, 8), (7, 7)])
def test_any_division_of_the_steps_gives_the_same_indices(size, batch_size):
    whole = indices_of(size, batch_size, seed=0)(0, 30)
    # Whole epochs, wherever batches begin and end: every example comes equally often, but for the last epoch.
    epochs = whole.ravel()[: 30 * batch_size // size * size].reshape(-1, size)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (len(epochs), 1)))
    random = np.random.default_rng(1)
    for _ in range(10):
        cuts = [0, *np.sort(random.choice(np.arange(1, 30), 4, replace=False)).tolist(), 30]
        indices_at = indices_of(size, batch_size, seed=0)
        parts = [indices_at(first, last - first) for first, last in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(indices_at(17, 4), whole[17:21])  # Out of turn, as a resumed run asks for it.


def test_orders_differ_by_seed_and_by_epoch():
    first, other = (indices_of(50, 50, seed)(0, 2) for seed in (0, 1))
    assert len({tuple(row) for row in (*first, *other)}) == 4


def test_digits_are_real_images_in_disjoint_splits():
    splits = load_digits(0)
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part["label"]) for part in parts] == [1197, 200, 400]
    assert splits.train["image"].shape[1:] == (8, 8, 1)
    assert splits.train["image"].min() == 0
    assert splits.train["image"].max() == 1
    images = np.concatenate([part["image"].reshape(-1, 64) for part in parts])
    # scikit-learn's set has no two equal images, so equal rows would be a split that overlaps.
    assert len(np.unique(images, axis=0)) == 1797
    for part in parts:
        assert np.bincount(part["label"], minlength=10).min() > 0.08 * len(part["label"])


def test_the_test_split_is_the_same_for_every_seed_and_validation_is_not():
    first, second = load_digits(0), load_digits(1)
    np.testing.assert_array_equal(first.test["image"], second.test["image"])
    assert not np.array_equal(first.validation["image"], second.validation["image"])


def test_few_labels_are_balanced():
    few = class_balanced(load_digits(0).train, 100, seed=0)
    assert np.abs(np.bincount(few["label"]) - 10).max() <= 1


@pytest.mark.parametrize("size", [0, 9, 1198])
def test_a_number_of_labels_that_cannot_be_had_is_refused(size):
    with pytest.raises(ValueError, match=rf"between 10, one of each class, and 1197.*got {size}"):
        class_balanced(load_digits(0).train, size, seed=0)


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match=r"same number of examples, got \{'a': 2, 'b': 3\}"):
        batches_of({"a": np.zeros(2), "b": np.zeros(3)}, 1, seed=0)
    with pytest.raises(ValueError, match="got 0 and 1"):
        batches_of({"a": np.zeros(0)}, 1, seed=0)
    with pytest.raises(ValueError, match="got 3 and 0"):
        batches_of({"a": np.zeros(3)}, 0, seed=0)


@pytest.mark.parametrize(("size", "counts"), [(3, [9, 2, 2]), (4, [9, 2, 2]), (12, [9, 2, 2]), (10, [9, 1, 2])])
def test_a_choice_by_class_has_each_class_where_they_differ_in_size(size, counts):
    arrays = {"label": np.repeat(np.arange(3), counts), "number": np.arange(sum(counts))}
    for seed in range(8):
        few = class_balanced(arrays, size, seed)
        assert set(few["label"].tolist()) == {0, 1, 2}
        assert len(np.unique(few["number"])) == size
        np.testing.assert_array_equal(arrays["label"][few["number"]], few["label"])
