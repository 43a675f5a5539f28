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

    They ship with scikit-learn, so nothing is downloaded (UCI, "Optical Recognition of Handwritten Digits"). The 400
    test images are the same for every seed; the seed draws 200 validation images from the others, and 1197 remain for
    training.
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
    """Returns the splits of `load_digits` with each digit shifted within a zero-padded image `[N, 10, 10, 1]`.

    One of nine positions, drawn once for each of the 1797 digits, the same for every seed. A linear model of pixels,
    which is hard to beat on centred digits, cannot separate position from digit; a convolution can. Our choice, after
    the translated digits used for attention models (arXiv:1406.6247).
    """
    digits = load_digits(seed)
    return Splits(_shifted(digits.train), _shifted(digits.validation), _shifted(digits.test))


def _shifted(arrays: Arrays) -> dict[str, np.ndarray]:
    digits = np.asarray(arrays["image"])
    count, height, width, _ = digits.shape
    images = np.zeros((count, _SHIFTED_SIZE, _SHIFTED_SIZE, 1), np.float32)
    for image, digit in zip(images, digits, strict=True):
        # By the digit's content, so that its position is the same in every split.
        row, column = np.random.default_rng((16 * digit).astype(np.uint8).ravel()).integers(
            0, (_SHIFTED_SIZE - height + 1, _SHIFTED_SIZE - width + 1)
        )
        image[row : row + height, column : column + width] = digit
    return {**arrays, "image": images}
