"""Scenes of coloured shapes on a white background, determined by the seed: layout and drawing."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from merge_jax.checks import check_at_least_one

__all__ = [
    "CELLS",
    "COLOURS",
    "KINDS",
    "LARGE",
    "SMALL",
    "Scene",
    "Scenes",
    "Shape",
    "arrange",
    "draw_scenes",
    "render",
]

# The grid is the published Sort-of-CLEVR image, one cell per pixel. Its centre is the centre of a cell.
CELLS = 75
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "orange": (255, 156, 0),
    "grey": (128, 128, 128),
    "yellow": (255, 255, 0),
}
KINDS = ("square", "circle", "triangle")
# Radii in cells: 5.5 and 9.8 pixels across in an image of 32, so that three large ones fit.
SMALL, LARGE = 6, 11
# At 16 pixels a shape of Sort-of-CLEVR is 2.3 pixels across, where circles and squares look nearly the same.
_SMALLEST_IMAGE = 16
_OVERSAMPLING = 4


class Shape(NamedTuple):
    """A shape on a grid of 75 x 75 cells, independent of the image size.

    It touches all four sides of a square of `2 radius + 1` cells; a triangle stands on the bottom side.

    Attributes:
      colour: a name in `COLOURS`.
      kind: one of `KINDS`.
      radius: cells on each side of the middle one.
      x: the column of its middle cell, from the left.
      y: the row of its middle cell, from the top.
    """

    colour: str
    kind: str
    radius: int
    x: int
    y: int


Scene = tuple[Shape, ...]


class Scenes(NamedTuple):
    """Scenes and their images, uint8 `[M, S, S, 3]`."""

    scenes: list[Scene]
    images: np.ndarray


class _Seen(NamedTuple):
    facts: set[Hashable]
    images: set[bytes]


def arrange(rng: np.random.Generator, looks: Sequence[tuple[str, str, int]]) -> Scene:
    """Returns a scene of shapes with these colours, kinds and radii, at least one white cell apart.

    Every valid arrangement is equally likely: an invalid one is redrawn as a whole. The squares around
    shapes are kept apart whatever their kinds, so that positions carry no information about them.
    """
    radii = np.array([radius for _, _, radius in looks])
    first, second = np.triu_indices(len(radii), 1)
    needed = radii[first] + radii[second] + 2
    while True:
        places = rng.integers(radii[:, None], CELLS - radii[:, None], (len(radii), 2))
        if (np.abs(places[first] - places[second]).max(axis=1) >= needed).all():
            return tuple(Shape(*look, *place) for look, place in zip(looks, places.tolist(), strict=True))


def render(scene: Scene, image_size: int) -> np.ndarray:
    """Returns the image of a scene, uint8 `[S, S, 3]`; a pixel is the mean of 4 x 4 points of it."""
    side = image_size * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(canvas)
    for colour, kind, radius, x, y in scene:
        edges = (x - radius, y - radius, x + radius + 1, y + radius + 1)
        left, top, right, bottom = (round(edge * side / CELLS) for edge in edges)
        # Pillow also fills the last given point.
        right, bottom = right - 1, bottom - 1
        if kind == "square":
            pen.rectangle((left, top, right, bottom), COLOURS[colour])
        elif kind == "circle":
            pen.ellipse((left, top, right, bottom), COLOURS[colour])
        else:
            pen.polygon([(left, bottom), ((left + right) / 2, top), (right, bottom)], COLOURS[colour])
    return np.asarray(canvas.reduce(_OVERSAMPLING))


def draw_scenes(
    rng: np.random.Generator,
    makers: Sequence[Callable[[np.random.Generator], Scene]],
    num_train: int,
    num_test: int,
    image_size: int,
    facts_of: Callable[[Scene], Iterable[Hashable]] = lambda scene: (),
) -> tuple[Scenes, Scenes]:
    """Returns scenes for train and test, from one distribution and in random order.

    The makers contribute equally to both (within 1, the first ones more). No image repeats, in train and test together,
    and no two scenes share a fact.

    Raises:
      ValueError: a number is below 1, the image size is below 16, or there are too few different scenes.
    """
    check_at_least_one(num_train=num_train, num_test=num_test)
    _check_image_size(image_size)
    seen = _Seen(set(), set())
    train: list[tuple[Scene, np.ndarray]] = []
    test: list[tuple[Scene, np.ndarray]] = []
    for number, make in enumerate(makers):
        for_train, for_test = (len(range(number, size, len(makers))) for size in (num_train, num_test))
        drawn = [_new(rng, make, facts_of, image_size, seen) for _ in range(for_train + for_test)]
        # Simple scenes soon run out. Drawing the test scenes afterwards would make them less simple.
        drawn = [drawn[i] for i in rng.permutation(len(drawn))]
        train += drawn[:for_train]
        test += drawn[for_train:]
    return _shuffled(rng, train), _shuffled(rng, test)


def _check_image_size(image_size: int) -> None:
    """Raises ValueError unless the size is an integer of at least 16 pixels, below which shapes blur."""
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < _SMALLEST_IMAGE:
        raise ValueError(f"image_size must be a whole number of at least {_SMALLEST_IMAGE} pixels, got {image_size!r}")


def _new(
    rng: np.random.Generator,
    make: Callable[[np.random.Generator], Scene],
    facts_of: Callable[[Scene], Iterable[Hashable]],
    image_size: int,
    seen: _Seen,
) -> tuple[Scene, np.ndarray]:
    for _ in range(1000):
        scene = make(rng)
        facts = set(facts_of(scene))
        if not seen.facts.isdisjoint(facts):
            continue
        image = render(scene, image_size)
        pixels = hashlib.blake2b(image.tobytes()).digest()
        if pixels not in seen.images:
            seen.facts.update(facts)
            seen.images.add(pixels)
            return scene, image
    raise ValueError(f"there are no more different scenes than about {len(seen.images)}; ask for fewer")


def _shuffled(rng: np.random.Generator, drawn: list[tuple[Scene, np.ndarray]]) -> Scenes:
    drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    return Scenes([scene for scene, _ in drawn], np.stack([image for _, image in drawn]))
