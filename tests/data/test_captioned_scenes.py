"""Captions of scenes: each is true of its image and of no other."""

import re
from collections import Counter

import numpy as np
import pytest

from merge_jax.data import scene_captions
from merge_jax.data.image_text import captioned_scenes
from tests.data.seen import COLOURS, look, words


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
