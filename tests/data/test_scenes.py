import hashlib
import itertools
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest

from merge_jax.data import scene_captions, scene_shapes, sort_of_clevr
from merge_jax.data.image_text import captioned_scenes, scene_questions
from merge_jax.data.image_text.scenes import Shape, arrange, render

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "orange": (255, 156, 0),
    "grey": (128, 128, 128),
    "yellow": (255, 255, 0),
}


class Seen(NamedTuple):
    """What is seen of a colour: the share of each pixel that it covers, and the first and last rows and columns."""

    cover: np.ndarray
    left: int
    top: int
    right: int
    bottom: int

    @property
    def centre(self):
        return np.array([self.left + self.right, self.top + self.bottom]) / 2

    @property
    def across(self):
        return self.right - self.left + 1

    @property
    def kind(self):
        """By area: a square fills its box, a circle pi / 4 of it and a triangle half."""
        filled = self.cover.sum() / (self.across * (self.bottom - self.top + 1))
        return min(
            (abs(filled - share), kind) for kind, share in {"square": 1, "circle": 0.79, "triangle": 0.5}.items()
        )[1]


def look(image):
    """What a reader of pixels sees, by colour; every pixel must be a mixture of white and one colour."""
    ink = 255 - image.astype(float)
    names = list(COLOURS)
    inks = 255 - np.array([COLOURS[name] for name in names], float)
    covers = ink @ inks.T / (inks**2).sum(axis=1)
    errors = np.abs(ink[..., None, :] - covers[..., None] * inks).max(axis=-1)
    nearest = errors.argmin(axis=-1)
    assert errors.min(axis=-1).max() < 1
    seen = {}
    for number, name in enumerate(names):
        cover = np.where((nearest == number) & (ink.max(axis=-1) > 0), covers[..., number], 0)
        if cover.any():
            rows, columns = (np.flatnonzero(cover.any(axis=axis)) for axis in (1, 0))
            seen[name] = Seen(cover, columns[0], rows[0], columns[-1], rows[-1])
    return seen


def words(text):
    return re.findall(r"\w+|[^\w\s]", text)


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


def answer(question, seen):
    """What a reader of pixels answers."""
    (colour,) = [word for word in words(question) if word in COLOURS]
    asked = seen[colour]
    distances = {name: ((asked.centre - other.centre) ** 2).sum() for name, other in seen.items() if name != colour}
    if "nearest" in question:
        return seen[min(distances, key=distances.__getitem__)].kind
    if "farthest" in question:
        return seen[max(distances, key=distances.__getitem__)].kind
    if "how many" in question:
        same = sum(other.kind == asked.kind for other in seen.values())
        return ("one", "two", "three", "four", "five", "six")[same - 1]
    if "left" in question:
        return "left" if asked.centre[0] < 37 else "right"
    if "top" in question:
        return "top" if asked.centre[1] < 37 else "bottom"
    return asked.kind


def is_relational(question):
    return any(word in question for word in ("nearest", "farthest", "how many"))


def test_answers_are_those_of_a_reader_of_pixels():
    made = sort_of_clevr(60, 20, 0, relational=18, non_relational=18)
    assert made.name == "sort_of_clevr"
    for part, size in ((made.train, 60), (made.test, 20)):
        assert part.images.shape == (size, 75, 75, 3)
        assert part.images.dtype == np.uint8
        assert part.image.dtype == np.int32
        np.testing.assert_array_equal(part.image, np.repeat(np.arange(size), 36))
        seen = [look(image) for image in part.images]
        for each in seen:
            assert set(each) == set(COLOURS)
            assert {shape.across for shape in each.values()} == {11}
            assert {shape.kind for shape in each.values()} <= {"square", "circle"}
            assert not any(37 in shape.centre for shape in each.values())
        for number, question, answers, kind in zip(part.image, part.questions, part.answers, part.kinds, strict=True):
            assert answers == (answer(question, seen[number]),)
            assert kind == ("relational" if is_relational(question) else "non_relational")
            assert re.fullmatch(r"[a-z ]+\?", question)
        # All that can be asked, each once.
        assert len(set(zip(part.image.tolist(), part.questions, strict=True))) == len(part.questions)
        assert len(set(part.questions)) == 36


@pytest.mark.parametrize("num_shapes", [2, 3, 5])
def test_fewer_shapes_are_asked_for_as_six_are(num_shapes):
    most = 3 * num_shapes
    part = sort_of_clevr(40, 5, 0, num_shapes=num_shapes, relational=most, non_relational=most).train
    seen = [look(image) for image in part.images]
    assert {len(each) for each in seen} == {num_shapes}
    assert set().union(*seen) == set(COLOURS)
    for number, question, answers in zip(part.image, part.questions, part.answers, strict=True):
        assert answers == (answer(question, seen[number]),)
    for each in seen if num_shapes > 2 else []:
        for one in each.values():
            distances = sorted(((one.centre - other.centre) ** 2).sum() for other in each.values())
            assert distances[1] < distances[2]
            assert distances[-2] < distances[-1]


def test_answers_are_those_of_a_scene_worked_out_by_hand(monkeypatch):
    circle = {"red", "blue", "grey", "yellow"}
    places = {"red": (10, 10), "green": (10, 30), "blue": (64, 12), "orange": (60, 60), "grey": (12, 66)}
    expected = {
        "what is the shape of the {} object?": "circle square circle square circle circle",
        "is the {} object on the left or on the right?": "left left right right left right",
        "is the {} object at the top or at the bottom?": "top top top bottom bottom bottom",
        # Of red, green, blue, orange, grey and yellow: green; red; yellow; yellow; green; orange.
        "what is the shape of the object nearest to the {} object?": "square circle circle circle square square",
        # Orange; orange; grey; red; blue; red.
        "what is the shape of the object farthest from the {} object?": "square square circle circle circle circle",
        "how many objects have the shape of the {} object?": "four two four two four four",
    }
    scenes = [
        tuple(
            Shape(colour, "circle" if colour in circle else "square", 5, *place)
            for colour, place in {**places, "yellow": (50, row)}.items()
        )
        for row in (45, 46)
    ]
    drawn = iter(scenes)
    monkeypatch.setattr(scene_questions, "arrange", lambda rng, looks: next(drawn))
    made = sort_of_clevr(1, 1, 0, relational=18, non_relational=18)
    for part in (made.train, made.test):
        answers = {question: given for question, (given,) in zip(part.questions, part.answers, strict=True)}
        assert answers == {
            question.format(colour): given
            for question, row in expected.items()
            for colour, given in zip(COLOURS, row.split(), strict=True)
        }


def test_no_two_objects_are_equally_near_to_a_third_or_equally_far():
    made = sort_of_clevr(150, 1, 2, relational=1, non_relational=0)
    for image in made.train.images:
        seen = look(image)
        for one in seen.values():
            distances = sorted(((one.centre - other.centre) ** 2).sum() for other in seen.values())
            assert distances[1] < distances[2]
            assert distances[-2] < distances[-1]


@pytest.mark.parametrize(("relational", "non_relational"), [(10, 10), (0, 3), (18, 0), (1, 2)])
def test_questions_of_both_kinds_are_as_many_as_asked_for(relational, non_relational):
    part = sort_of_clevr(20, 5, 1, image_size=16, relational=relational, non_relational=non_relational).train
    for number in range(20):
        kinds = Counter(kind for image, kind in zip(part.image, part.kinds, strict=True) if image == number)
        assert kinds == +Counter(relational=relational, non_relational=non_relational)
    assert len(set(zip(part.image.tolist(), part.questions, strict=True))) == 20 * (relational + non_relational)


@pytest.fixture(scope="module")
def many_questions():
    return sort_of_clevr(2500, 500, 0, image_size=16)


def test_nothing_but_the_image_tells_answers(many_questions):
    """A guess from the question alone is right for half of the shapes and positions, and 10/32 of the counts.

    That is the published set's too: a count is one more than heads among five fair coins.
    """
    sorts = {
        "shape of the": 1 / 2,
        "left": 1 / 2,
        "top": 1 / 2,
        "nearest": 1 / 2,
        "farthest": 1 / 2,
        "how many": 5 / 16,
    }

    def sort_of(question):
        return next(sort for sort in reversed(sorts) if sort in question)

    train, test = many_questions.train, many_questions.test
    answers = {}
    for question, (given,) in zip(train.questions, train.answers, strict=True):
        answers.setdefault(question, Counter())[given] += 1
    assert len(answers) == 36
    right = {sort: [] for sort in sorts}
    for question, (given,) in zip(test.questions, test.answers, strict=True):
        right[sort_of(question)].append(given == answers[question].most_common(1)[0][0])
    for sort, hits in right.items():
        assert len(hits) == pytest.approx(500 * 10 / 3, rel=0.1)
        assert np.mean(hits) == pytest.approx(sorts[sort], abs=0.06), sort
    for question, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < sorts[sort_of(question)] + 0.05, question
    counts = sum((answers[question] for question in answers if "how many" in question), Counter())
    expected = [math.comb(5, heads) / 32 for heads in range(6)]
    shares = [counts[word] / counts.total() for word in ("one", "two", "three", "four", "five", "six")]
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_no_image_comes_twice_in_train_and_test_together(many_questions):
    images = np.concatenate([many_questions.train.images, many_questions.test.images])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 3000


@pytest.fixture(scope="module")
def captioned():
    """At 75 pixels, where a pixel is a cell of the grid, so that what is seen is exact."""
    return scene_captions(250, 60, 0, image_size=75, num_captions=8)


RELATION = "(?:to the )?(left of|right of|above|below)"
THING = "(?:a |the )?((?:small|large) [a-z]+ (?:square|circle|triangle))"
WORDINGS = {
    "plain": f"{THING} {RELATION} {THING}(?: and {RELATION} {THING})?",
    "there is": f"there is {THING} {RELATION} {THING}",
    "is": f"{THING} is {RELATION} {THING}",
    "with": f"{THING} with {THING} {RELATION} it(?: and {THING} {RELATION} it)?",
}


def read(caption):
    """Who stands where to whom in a caption, as a reader of English has it, and its wording."""
    for name, wording in WORDINGS.items():
        found = re.fullmatch(wording, caption)
        if found:
            first, *rest = [group for group in found.groups() if group]
            pairs = list(zip(rest[::2], rest[1::2], strict=True))
            if name == "with":
                return [(other, relation, first) for other, relation in pairs], (name, len(pairs))
            return [(first, relation, other) for relation, other in pairs], (name, len(pairs))
    raise AssertionError(f"no one reads {caption!r}")


def name_of(colour, seen):
    return f"{'large' if seen.across > 17 else 'small'} {colour} {seen.kind}"


def holds(statements, things):
    """Whether a caption that names all there is is true of the things seen."""
    if {name for one, _, other in statements for name in (one, other)} != set(things):
        return False
    for one, relation, other in statements:
        first, second = things[one], things[other]
        true = {
            "left of": first.right < second.left,
            "right of": first.left > second.right,
            "above": first.bottom < second.top,
            "below": first.top > second.bottom,
        }
        if not true[relation]:
            return False
    return True


def things_of(image):
    return {name_of(colour, seen): seen for colour, seen in look(image).items()}


def test_captions_are_true_of_their_image_and_of_no_other(captioned):
    parts = (captioned.train, captioned.test)
    things = [things_of(image) for part in parts for image in part.images]
    captions = [*captioned.train.captions, *captioned.test.captions]
    owners = np.concatenate([captioned.train.caption_group, captioned.test.caption_group + 250])
    for caption, owner in zip(captions, owners, strict=True):
        statements, _ = read(caption)
        assert [number for number, each in enumerate(things) if holds(statements, each)] == [owner], caption
    assert len(set(captions)) == len(captions) == 310 * 8


def test_captions_have_numbers_of_their_images_and_are_short_and_of_all_wordings(captioned):
    assert captioned.name == "scene_captions"
    for part, size in ((captioned.train, 250), (captioned.test, 60)):
        assert part.images.shape == (size, 75, 75, 3)
        assert part.images.dtype == np.uint8
        assert part.image_group.dtype == part.caption_group.dtype == np.int32
        np.testing.assert_array_equal(part.image_group, np.arange(size))
        np.testing.assert_array_equal(part.caption_group, np.repeat(np.arange(size), 8))
        images, captions = part.pairs()
        np.testing.assert_array_equal(images, np.repeat(np.arange(size), 8))
        np.testing.assert_array_equal(captions, np.arange(size * 8))
        assert max(len(words(caption)) for caption in part.captions) == 17
    wordings = Counter((*read(caption)[1], caption.startswith("a ")) for caption in captioned.train.captions)
    assert len(wordings) == 7
    assert min(wordings.values()) > 100


def test_scenes_have_two_or_three_shapes_of_all_looks(captioned):
    things = [things_of(image) for image in captioned.train.images]
    counts = Counter(len(each) for each in things)
    assert set(counts) == {2, 3}
    assert min(counts.values()) > 80
    names = Counter(word for each in things for name in each for word in name.split())
    total = sum(len(each) for each in things)
    for group in (("small", "large"), ("square", "circle", "triangle"), COLOURS):
        assert sum(names[word] for word in group) == total
        for word in group:
            assert names[word] / total == pytest.approx(1 / len(group), abs=0.08)


def test_scenes_of_two_shapes_have_the_same_share_in_train_and_test():
    made = scene_captions(3000, 1000, 1, image_size=16)
    train, test = (np.mean([len(read(each)[0]) == 1 for each in part.captions]) for part in (made.train, made.test))
    assert train < 0.4
    assert train == pytest.approx(test, abs=0.05)
    images = np.concatenate([made.train.images, made.test.images])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 4000
    assert len({*made.train.captions, *made.test.captions}) == 4000
    assert len(made.train.captions) == 3000


def test_more_scenes_than_there_are_captions_for_are_refused(monkeypatch):
    monkeypatch.setattr(captioned_scenes, "COLOURS", ("red", "green", "blue"))
    monkeypatch.setattr(captioned_scenes, "KINDS", ("square",))
    assert len(scene_captions(30, 5, 0, image_size=16).train.captions) == 30
    with pytest.raises(ValueError, match=r"^there are no more different scenes than about \d+; ask for fewer$"):
        scene_captions(3000, 5, 0, image_size=16)


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


@pytest.mark.parametrize("name", ["relational", "non_relational"])
@pytest.mark.parametrize("count", [-1, 19, 2.0, True])
def test_numbers_of_questions_are_checked(name, count):
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number in \[0, 18\], got {count}$"):
        sort_of_clevr(5, 5, 0, **{name: count})


def test_no_questions_and_too_many_captions_are_refused():
    with pytest.raises(ValueError, match=r"^relational and non_relational are both 0; there is nothing to ask$"):
        sort_of_clevr(5, 5, 0, relational=0, non_relational=0)
    with pytest.raises(ValueError, match=r"^num_captions must be a whole number of at least 1, got 0$"):
        scene_captions(5, 5, 0, num_captions=0)
    with pytest.raises(ValueError, match=r"^num_captions must lie in \[1, 8\], got 9$"):
        scene_captions(5, 5, 0, num_captions=9)


@pytest.mark.parametrize("count", [1, 7, 3.0, True])
def test_numbers_of_shapes_are_checked(count):
    with pytest.raises(ValueError, match=rf"^num_shapes must be a whole number in \[2, 6\], got {count}$"):
        sort_of_clevr(5, 5, 0, num_shapes=count)
