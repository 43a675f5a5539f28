"""Images in arrays: their statistics, and what is wrong with them is named."""

import numpy as np
import pytest

from merge_jax.data import channel_statistics, check_images
from tests.data.common import pixels


def test_statistics_equal_those_of_a_float_copy():
    images = pixels(0, 7, 6)
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-12)
    assert channel_statistics(np.full((2, 4, 4, 1), 255, np.uint8)) == ((1.0,), (0.0,))
    with pytest.raises(ValueError, match=r"channel statistics: images must be uint8 .* got float64 of shape \(7,"):
        channel_statistics(images / 255)
    with pytest.raises(ValueError, match=r"need pixels, got shape \(0, 6, 6, 3\)"):
        channel_statistics(images[:0])


GOOD = {"image": np.zeros((3, 2, 2, 1), np.float32), "label": np.array([0, 1, 1])}
WITH_NAN = GOOD["image"].copy()
WITH_NAN[1, 0, 1, 0], WITH_NAN[2, 0, 0, 0] = np.nan, np.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "entry 'label' is missing; there is 'image'"),
        ({"image": GOOD["image"][0]}, r"images must be \[N, H, W, C\], got shape \(2, 2, 1\)"),
        ({"image": GOOD["image"][:0], "label": GOOD["label"][:0]}, "there are no examples"),
        ({"image": GOOD["image"].astype(int)}, "uint8 or of a float type, got int64"),
        ({"label": GOOD["label"].astype(float)}, "labels must be of an integer type, got float64"),
        ({"label": GOOD["label"][:2]}, r"labels of 3 images must be \[3\], got shape \(2,\)"),
        ({"label": np.array([0, 2, 5])}, r"labels must lie in \[0, 2\), got 2 at index 1 \(2 of 3 are out of range\)"),
        ({"label": np.array([0, 1, -1])}, r"got -1 at index 2"),
        ({"image": WITH_NAN}, r"pixels must be finite, got nan at \(1, 0, 1, 0\) \(2 are not finite\)"),
    ],
)
def test_bad_images_are_named(changes, message):
    arrays = {entry: array for entry, array in {**GOOD, **changes}.items() if array is not None}
    with pytest.raises(ValueError, match=f"^mine: .*{message}"):
        check_images("mine", arrays, 2)


def test_good_images_pass():
    check_images("mine", GOOD, 2)
    check_images("mine", {"image": pixels(0, 3), "label": np.array([0, 1, 1], np.uint8)}, 2)
