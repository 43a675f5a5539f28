"""Scenes: shapes are drawn where they should be, and sets of them depend on the seed and their options alone."""

import hashlib
import itertools
import math

import numpy as np
import pytest

from merge_jax.data import scene_captions, scene_shapes, sort_of_clevr
from merge_jax.data.image_text.scenes import Shape, arrange, render
from tests.data.seen import COLOURS, look


@pytest.mark.parametrize("radius", [5, 6, 11])
@pytest.mark.parametrize("colour", list(COLOURS))
def test_shapes_stand_where_they_should_in_their_colour_and_touch_all_sides_of_their_square(colour, radius):
    for kind in ("square", "circle", "triangle"):
        image = render((Shape(colour, kind, radius, 20, 50),), 75)
        assert image.shape == (75, 75, 3)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image[50, 20], COLOURS[colour])
        (seen,) = look(image).values()
        assert (seen.left, seen.top, seen.right, seen.bottom) == (20 - radius, 50 - radius, 20 + radius, 50 + radius)
        assert seen.kind == kind
        corners = [tuple(image[50 + y * radius, 20 + x * radius]) for y in (-1, 1) for x in (-1, 1)]
        white, full = (255, 255, 255), COLOURS[colour]
        if kind == "square":
            assert corners == [full] * 4
        elif kind == "circle":
            assert corners == [white] * 4
        else:
            assert corners[:2] == [white] * 2
            assert white not in corners[2:]


@pytest.mark.parametrize("size", [16, 32, 75, 128])
def test_sizes_and_places_are_in_proportion_to_the_image(size):
    side = size / 75
    areas = {"square": 23**2, "circle": math.pi * 11.5**2, "triangle": 23**2 / 2}
    for kind, area in areas.items():
        (seen,) = look(render((Shape("blue", kind, 11, 44, 26),), size)).values()
        cover = seen.cover
        assert cover.sum() == pytest.approx(area * side**2, rel=0.08)
        middle = np.array([(cover.sum(axis=axis) * (np.arange(size) + 0.5)).sum() / cover.sum() for axis in (0, 1)])
        # The centre of mass of a triangle is at a third of its height.
        down = 23 / 6 if kind == "triangle" else 0
        np.testing.assert_allclose(middle / side, [44.5, 26.5 + down], atol=0.4 + 0.2 / side)


def test_edges_are_smooth():
    image = render((Shape("blue", "circle", 11, 20, 41),), 32)
    assert len(np.unique(image[..., 0])) > 5


def test_arrangements_reach_all_sides_and_keep_shapes_apart():
    rng = np.random.default_rng(0)
    looks = [("red", "square", 5), ("blue", "square", 11), ("grey", "square", 5)]
    scenes = [arrange(rng, looks) for _ in range(3000)]
    gaps = [
        max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius - 1
        for scene in scenes
        for a, b in itertools.combinations(scene, 2)
    ]
    assert min(gaps) == 1
    for number, (_, _, radius) in enumerate(looks):
        places = np.array([(scene[number].x, scene[number].y) for scene in scenes])
        np.testing.assert_array_equal(places.min(axis=0), radius)
        np.testing.assert_array_equal(places.max(axis=0), 74 - radius)
        np.testing.assert_allclose(places.mean(axis=0), 37, atol=1.5)


def flat(made):
    for part in (made.train, made.test):
        if isinstance(part, dict):
            yield part["label"].tolist(), part["image"]
        elif hasattr(part, "questions"):
            yield (part.image.tolist(), part.questions, part.answers, part.kinds), part.images
        else:
            yield (part.caption_group.tolist(), part.captions), part.images


@pytest.mark.parametrize(
    ("make", "expected"),
    [(sort_of_clevr, "94057406c108fe88"), (scene_captions, "3761187e062fae0f"), (scene_shapes, "a9f280309667f182")],
)
def test_scenes_depend_on_the_seed_alone(make, expected):
    one, again, other = (list(flat(make(30, 10, seed, image_size=16))) for seed in (3, 3, 4))
    for (text, images), (same, same_images), (_, other_images) in zip(one, again, other, strict=True):
        assert text == same
        np.testing.assert_array_equal(images, same_images)
        assert not np.array_equal(images, other_images)
    # Of what is said of the images: how Pillow draws may change.
    assert hashlib.sha256(repr([text for text, _ in one]).encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize("make", [sort_of_clevr, scene_captions, scene_shapes])
def test_options_of_all_sets_are_checked(make):
    with pytest.raises(ValueError, match=r"^num_train must be a whole number of at least 1, got 0$"):
        make(0, 5, 0)
    with pytest.raises(ValueError, match=r"^num_test must be a whole number of at least 1, got 2.5$"):
        make(5, 2.5, 0)
    for size in (15, 32.0, True):
        with pytest.raises(ValueError, match=rf"^image_size must be a whole number of at least 16 pixels, got {size}$"):
            make(5, 5, 0, image_size=size)


def test_no_questions_and_too_many_captions_are_refused():
    with pytest.raises(ValueError, match=r"^relational and non_relational are both 0; there is nothing to ask$"):
        sort_of_clevr(5, 5, 0, relational=0, non_relational=0)
    with pytest.raises(ValueError, match=r"^num_captions must be a whole number of at least 1, got 0$"):
        scene_captions(5, 5, 0, num_captions=0)
    with pytest.raises(ValueError, match=r"^num_captions must lie in \[1, 8\], got 9$"):
        scene_captions(5, 5, 0, num_captions=9)
