import jax
import numpy as np
import pytest

from merge_jax.lpka import _attend, _kept


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 0.999999])
def test_the_mask_keeps_as_many_as_the_rate_says(rate):
    kept = np.asarray(_kept(jax.random.key(0), rate, (3, 101, 333)))
    expected = 1 - min(round(rate * 2**16), 2**16 - 1) / 2**16
    deviation = (expected * (1 - expected) / kept.size) ** 0.5
    assert abs(kept.mean() - expected) <= 4 * deviation


def test_neighbours_in_the_mask_are_independent():
    # Two entries come from one random word, so neighbours are where a fault would show.
    kept = np.asarray(_kept(jax.random.key(0), 0.5, (1000, 1000))).ravel() - 0.5
    for distance in (1, 2, 3):
        correlation = 4 * np.mean(kept[:-distance] * kept[distance:])
        assert abs(correlation) < 4 / kept.size**0.5
    assert not np.array_equal(kept[::2], kept[1::2])


def test_dropout_leaves_the_mean_of_attention_as_it_is():
    queries, keys = (jax.random.normal(jax.random.key(i), (n, 2, 4)) for i, n in enumerate((2, 64)))

    def mixed(rate, key):
        return _attend(queries, keys, keys, rate, key, max_scores=2**22)

    dropped = jax.vmap(lambda key: mixed(0.3, key))(jax.random.split(jax.random.key(2), 4000))
    error = dropped.std(axis=0) / dropped.shape[0] ** 0.5
    assert np.all(error > 0)
    assert np.all(np.abs(dropped.mean(axis=0) - mixed(0.0, None)) < 5 * error)
