"""Questions on scenes: answers are those of a reader of pixels, and nothing but the image tells them."""

import math
import re
from collections import Counter

import numpy as np
import pytest

from merge_jax.data import sort_of_clevr
from merge_jax.data.image_text import scene_questions
from merge_jax.data.image_text.scenes import Shape
from tests.data.seen import COLOURS, look, words


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


@pytest.mark.parametrize("name", ["relational", "non_relational"])
@pytest.mark.parametrize("count", [-1, 19, 2.0, True])
def test_numbers_of_questions_are_checked(name, count):
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number in \[0, 18\], got {count}$"):
        sort_of_clevr(5, 5, 0, **{name: count})


@pytest.mark.parametrize("count", [1, 7, 3.0, True])
def test_numbers_of_shapes_are_checked(count):
    with pytest.raises(ValueError, match=rf"^num_shapes must be a whole number in \[2, 6\], got {count}$"):
        sort_of_clevr(5, 5, 0, num_shapes=count)
