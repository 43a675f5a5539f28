"""Classes of scenes: those of the large shape, in equal parts, and no image twice."""

from collections import Counter

import numpy as np
import pytest

from merge_jax.data import scene_shapes
from tests.data.seen import COLOURS, look


@pytest.fixture(scope="module")
def shapes():
    return scene_shapes(360, 120, 0, image_size=75)


def test_classes_are_the_colour_and_kind_of_the_large_shape(shapes):
    assert shapes.name == "scene_shapes"
    assert shapes.num_classes == 12
    assert shapes.classes == tuple(f"{colour} {kind}" for colour in COLOURS for kind in ("square", "circle"))
    for part in (shapes.train, shapes.test):
        assert part["image"].dtype == np.uint8
        assert part["label"].dtype == np.int32
        numbers, kinds = Counter(), Counter()
        for image, label in zip(part["image"], part["label"], strict=True):
            things = look(image)
            (large,) = [colour for colour, seen in things.items() if seen.across == 23]
            assert shapes.classes[label] == f"{large} {things[large].kind}"
            small = [seen for colour, seen in things.items() if colour != large]
            assert all(seen.across == 13 for seen in small)
            numbers[len(small)] += 1
            kinds.update(seen.kind for seen in small)
        for counts in (numbers, kinds):
            assert len(counts) == 3
            assert min(counts.values()) > 0.25 * counts.total()


def test_classes_have_equal_parts_in_no_order_and_no_image_comes_twice(shapes):
    np.testing.assert_array_equal(np.bincount(shapes.train["label"]), 30)
    np.testing.assert_array_equal(np.bincount(shapes.test["label"]), 10)
    assert len(np.unique(shapes.train["label"][:50])) > 9
    images = np.concatenate([shapes.train["image"], shapes.test["image"]])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 480
    np.testing.assert_array_equal(np.bincount(scene_shapes(14, 1, 0).train["label"]), [2, 2, *[1] * 10])


def test_images_of_one_shape_that_are_drawn_twice_are_drawn_anew():
    """Of 4000 images some 1300 have one shape, each of 12 classes in 53 x 53 places: without care some come twice."""
    made = scene_shapes(3000, 1000, 0, image_size=16)
    images = np.concatenate([made.train["image"], made.test["image"]])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 4000
