"""What is seen of scenes by a reader of pixels, and the words of a text."""

import re
from typing import NamedTuple

import numpy as np

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
