"""Image data sets."""

import numpy as np
import sklearn.datasets

from merge_jax.data.arrays import Arrays, Splits, split

__all__ = ["load_digits", "load_shifted_digits"]

_SHIFTED_SIZE = 10
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


def load_shifted_digits(seed: int) -> Splits:
    """Returns the splits of `load_digits` with each digit at a place of its own in an image `[N, 10, 10, 1]`, 0 around.

    One of nine places, drawn once for each of the 1797 digits, the same for every seed. A linear model of pixels, which
    is hard to beat on digits that all lie in the middle, cannot tell a place from a digit; a convolution can. Our
    choice, after the translated digits that networks with attention are tried on (arXiv:1406.6247).
    """
    digits = load_digits(seed)
    return Splits(_shifted(digits.train), _shifted(digits.validation), _shifted(digits.test))


def _shifted(arrays: Arrays) -> dict[str, np.ndarray]:
    digits = np.asarray(arrays["image"])
    count, height, width, _ = digits.shape
    images = np.zeros((count, _SHIFTED_SIZE, _SHIFTED_SIZE, 1), np.float32)
    for image, digit in zip(images, digits, strict=True):
        # By what the digit is, so that it lies at the same place in every split.
        row, column = np.random.default_rng((16 * digit).astype(np.uint8).ravel()).integers(
            0, (_SHIFTED_SIZE - height + 1, _SHIFTED_SIZE - width + 1)
        )
        image[row : row + height, column : column + width] = digit
    return {**arrays, "image": images}
