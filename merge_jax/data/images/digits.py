"""Image data sets."""

import numpy as np
import sklearn.datasets

from merge_jax.data.arrays import Splits, split

__all__ = ["load_digits"]

_DIGITS_TEST_SIZE = 400
_DIGITS_VALIDATION_SIZE = 200


def load_digits(seed: int) -> Splits:
    """Returns scikit-learn's digits: 1797 real handwritten digits, image `[N, 8, 8, 1]` in [0, 1], label in [0, 10).

    They come with scikit-learn, so nothing is downloaded (UCI, "Optical Recognition of Handwritten Digits").
    The 400 test images are the same for every seed; the seed draws the 200 of validation from the others,
    and 1197 remain to learn from.
    """
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    arrays = {
        "image": (images / 16).astype(np.float32).reshape(-1, 8, 8, 1),
        "label": labels.astype(np.int32),
    }
    test, rest = split(arrays, _DIGITS_TEST_SIZE, seed=0)
    validation, train = split(rest, _DIGITS_VALIDATION_SIZE, seed)
    return Splits(train, validation, test)
