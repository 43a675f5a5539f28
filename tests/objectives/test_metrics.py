import jax.numpy as jnp
import pytest

import merge_jax as mj

LOGITS = jnp.array([[3.0, 2.0, 1.0], [0.0, 1.0, 2.0], [1.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
LABELS = jnp.array([0, 1, 2, 2])


def test_accuracy_is_the_fraction_of_largest_logits_that_are_the_label():
    assert mj.accuracy(LOGITS, LABELS) == 0.25


@pytest.mark.parametrize(("k", "expected"), [(1, 0.25), (2, 0.75), (3, 1.0)])
def test_top_k_accuracy_counts_labels_among_the_k_largest(k, expected):
    assert mj.top_k_accuracy(LOGITS, LABELS, k) == expected


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_be_a_number_of_classes(k):
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 3\], got {k}"):
        mj.top_k_accuracy(LOGITS, LABELS, k)
