"""Captions of scenes: their shapes, and one shape's position relative to the others."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from merge_jax.checks import check_at_least_one
from merge_jax.data.image_text.image_text_set import CaptionedImages, CaptionSet
from merge_jax.data.image_text.scenes import COLOURS, KINDS, LARGE, SMALL, Scene, Scenes, Shape, arrange, draw_scenes

__all__ = ["scene_captions"]

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_ARTICLED = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
# For `{0}`, which is `{1}` of `{2}`.
_TWO = ("a {0} {1} a {2}", "there is a {0} {1} a {2}", "the {0} is {1} the {2}", "a {2} with a {0} {1} it")
# For `{0}`, which is `{1}` of `{2}` and `{3}` of `{4}`, or reversed, with it in the middle.
_THREE = ("a {0} {1} a {2} and {3} a {4}", "{0} {1} {2} and {3} {4}")
_THREE_TURNED = ("{0} with {2} {1} it and {4} {3} it",)
# The minimum for two shapes, as one may be only above the other.
_MOST_CAPTIONS = 2 * len(_TWO)


class _Relation(NamedTuple):
    """The relation of the first shape to the second, both described in words, independent of the scene."""

    first: str
    name: str
    second: str


def scene_captions(
    num_train: int, num_test: int, seed: int, *, image_size: int = 32, num_captions: int = 1
) -> CaptionSet:
    """Returns images of two or three shapes with captions of their sizes, colours, kinds and relations.

    An example is "a small red circle to the left of a large blue square". There are 7 wordings of at most 17 words.
    Shapes are squares, circles and triangles in the colours of `sort_of_clevr`, small or large; colours do not repeat
    within an image. A caption names all shapes of its image, and the position of one relative to each of the others:
    left of another if no column of the grid has both, and so on. If two are apart in both directions, it states one.

    No caption and no image repeats. Moreover, if read as naming all shapes, a caption is true only of its own image, in
    train and test together. (A caption of two shapes can be true of two among three.) So scenes of two shapes, half of
    those tried, soon run out: they are 39 % of a set of 2,500 images and 17 % of one of 10,500, equally in train and
    test.

    Source: our own wordings and scenes, so that a run needs no download.

    Raises:
      ValueError: a number of images is below 1, the image size is below 16, `num_captions` per image is not in [1, 8]
        (every scene has 8), or there are too few different scenes.
    """
    check_at_least_one(num_captions=num_captions)
    if num_captions > _MOST_CAPTIONS:
        raise ValueError(f"num_captions must lie in [1, {_MOST_CAPTIONS}], got {num_captions}")
    rng = np.random.default_rng(seed)
    train, test = draw_scenes(rng, [_scene], num_train, num_test, image_size, _facts)
    return CaptionSet("scene_captions", _caption(rng, train, num_captions), _caption(rng, test, num_captions))


def _scene(rng: np.random.Generator) -> Scene:
    number = int(rng.integers(2, 4))
    colours = rng.permutation(len(COLOURS))[:number]
    kinds = rng.integers(len(KINDS), size=number)
    radii = rng.choice((SMALL, LARGE), number).tolist()
    names = tuple(COLOURS)
    looks = [(names[i], KINDS[j], radius) for i, j, radius in zip(colours, kinds, radii, strict=True)]
    return arrange(rng, looks)


def _caption(rng: np.random.Generator, scenes: Scenes, num_captions: int) -> CaptionedImages:
    captions: list[str] = []
    for scene in scenes.scenes:
        possible = [caption for relations in _statements(scene) for caption in _wordings(relations)]
        captions += [possible[i] for i in rng.permutation(len(possible))[:num_captions]]
    image_group = np.arange(len(scenes.scenes), dtype=np.int32)
    return CaptionedImages(scenes.images, image_group, tuple(captions), np.repeat(image_group, num_captions))


def _facts(scene: Scene) -> Iterator[frozenset[_Relation]]:
    """Yields all facts that a caption of the scene can state, in any order."""
    yield from map(frozenset, _statements(scene))


def _statements(scene: Scene) -> Iterator[tuple[_Relation, ...]]:
    """Yields one shape's true relations to the others, in all orders of the others."""
    for first, *others in itertools.permutations(scene):
        yield from itertools.product(*(_relations(first, other) for other in others))


def _relations(first: Shape, second: Shape) -> list[_Relation]:
    """Returns the one or two relations of separate shapes."""
    reach = first.radius + second.radius
    right, down = second.x - first.x, second.y - first.y
    true = {"left of": right > reach, "right of": -right > reach, "above": down > reach, "below": -down > reach}
    return [_Relation(_describe(first), name, _describe(second)) for name, holds in true.items() if holds]


def _wordings(relations: tuple[_Relation, ...]) -> list[str]:
    name = relations[0].first
    if len(relations) == 1:
        return [wording.format(name, _ARTICLED[relations[0].name], relations[0].second) for wording in _TWO]
    straight = [word for relation in relations for word in relation[1:]]
    turned = [word for relation in relations for word in (_OPPOSITE[relation.name], relation.second)]
    return [
        *(wording.format(name, *straight) for wording in _THREE),
        *(wording.format(name, *turned) for wording in _THREE_TURNED),
    ]


def _describe(shape: Shape) -> str:
    return f"{'large' if shape.radius == LARGE else 'small'} {shape.colour} {shape.kind}"
