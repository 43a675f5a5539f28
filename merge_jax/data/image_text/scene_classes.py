"""Images of shapes to classify, drawn like those with questions and captions."""

import functools

import numpy as np

from merge_jax.data.arrays import Arrays
from merge_jax.data.image_text.scenes import COLOURS, KINDS, LARGE, SMALL, Scene, Scenes, arrange, draw_scenes
from merge_jax.data.images.image_set import ImageSet

__all__ = ["scene_shapes"]

_MOST_SMALL = 2
_CLASSES = tuple((colour, kind) for colour in COLOURS for kind in ("square", "circle"))


def scene_shapes(num_train: int, num_test: int, seed: int, *, image_size: int = 32) -> ImageSet:
    """Returns images classified by colour and kind of their large shape, in 12 balanced classes.

    The large shape is a square or a circle at any position, in one of the six colours of `sort_of_clevr`; "red square"
    is a class. Beside it are zero, one or two small shapes, equally likely: squares, circles or triangles of other
    colours. So the colours present do not determine the class; a model must find the large shape, drawn as in
    `scene_captions`. No image repeats, in train and test together.

    Source: our own scenes, so that a run needs no download.

    Raises:
      ValueError: a number of images is below 1, the image size is below 16, or there are too few different images.
    """
    makers = [functools.partial(_scene, colour, kind) for colour, kind in _CLASSES]
    train, test = draw_scenes(np.random.default_rng(seed), makers, num_train, num_test, image_size)
    classes = tuple(" ".join(name) for name in _CLASSES)
    return ImageSet("scene_shapes", _labelled(train), _labelled(test), classes)


def _scene(colour: str, kind: str, rng: np.random.Generator) -> Scene:
    number = int(rng.integers(_MOST_SMALL + 1))
    others = [other for other in COLOURS if other != colour]
    small = [(others[i], KINDS[rng.integers(len(KINDS))], SMALL) for i in rng.permutation(len(others))[:number]]
    return arrange(rng, [(colour, kind, LARGE), *small])


def _labelled(scenes: Scenes) -> Arrays:
    labels = [_CLASSES.index((scene[0].colour, scene[0].kind)) for scene in scenes.scenes]
    return {"image": scenes.images, "label": np.array(labels, np.int32)}
