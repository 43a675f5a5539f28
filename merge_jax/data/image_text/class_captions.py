"""Class names as captions of labelled images."""

import re

import numpy as np

from merge_jax.data.arrays import Arrays
from merge_jax.data.image_text.image_text_set import CaptionedImages, CaptionSet
from merge_jax.data.images.image_set import ImageSet

__all__ = ["class_captions"]

_ARTICLE = re.compile(r"\b([Aa]) \{\}")
# By the letter, except for common words that sound different.
_AN = re.compile(r"(?!eu|one\b|uni)[aeiou]|hour|honest", re.IGNORECASE)


def class_captions(images: ImageSet, template: str = "a picture of a {}") -> CaptionSet:
    """Returns the images with one caption per class, shared by all its images: the template with the class name.

    Underscores become spaces, and "a" becomes "an" before a vowel. The template follows zero-shot classification
    (Radford et al. 2021, CLIP). For CIFAR-100: `class_captions(load_tfds_images("cifar100"))`.

    Raises:
      ValueError: the template does not have exactly one `{}`; two classes have the same caption; images are not uint8.
    """
    if template.count("{}") != 1 or re.search("[{}]", template.replace("{}", "")):
        raise ValueError(f"the template must have one {{}}, where the name of the class goes, got {template!r}")
    captions = [_caption(name, template) for name in images.classes]
    for i, caption in enumerate(captions):
        first = captions.index(caption)
        if first < i:
            raise ValueError(f"the classes {images.classes[first]!r} and {images.classes[i]!r} are both {caption!r}")
    train, test = (
        _captioned(f"{images.name} {split}", arrays, captions)
        for split, arrays in (("train", images.train), ("test", images.test))
    )
    return CaptionSet(images.name, train, test)


def _caption(name: str, template: str) -> str:
    words = " ".join(name.replace("_", " ").split())
    if _AN.match(words):
        template = _ARTICLE.sub(r"\1n {}", template)
    return template.replace("{}", words)


def _captioned(name: str, arrays: Arrays, captions: list[str]) -> CaptionedImages:
    images, labels = np.asarray(arrays["image"]), np.asarray(arrays["label"])
    if images.dtype != np.uint8:
        raise ValueError(f"{name}: images must be uint8, got {images.dtype}")
    return CaptionedImages(images, labels.astype(np.int32), captions, np.arange(len(captions), dtype=np.int32))
