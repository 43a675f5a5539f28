"""Image classifiers as models of a scenario: models by name, data by name, and training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import merge_jax as mj
from merge_jax.checks import check_at_least_one, check_choice
from merge_jax.data import (
    Arrays,
    ImageSet,
    Splits,
    channel_statistics,
    crop_flip_rotate,
    load_digits,
    load_image_folder,
    load_shifted_digits,
    load_tfds_images,
    scene_shapes,
    split,
)
from merge_jax.study.choices import ImageModelName, ImageTaskName, LearningRateSchedule, VisionModelName
from merge_jax.study.models.code import model_code
from merge_jax.study.models.model import StudyModel, classifier
from merge_jax.study.models.pretrained import OF_PYTORCH, Weights, with_fitted_head
from merge_jax.study.models.texts import adamw

__all__ = [
    "VISION_ATTENTION",
    "ImageData",
    "image_classifier",
    "image_model",
    "load_image_task",
    "load_images",
    "make_model",
    "make_vision_encoder",
    "named_classifier",
    "sgd",
    "vision_classifier",
]

VISION_ATTENTION = "encoder/*/attention"

# A study makes many scenarios of one set, with at most two kinds of labels; none changes the arrays.
_tfds_images = lru_cache(maxsize=2)(load_tfds_images)
_scene_shapes = lru_cache(maxsize=2)(scene_shapes)

_DIGITS = {"digits": (load_digits, 8), "shifted_digits": (load_shifted_digits, 10)}


Pixels = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel."""


@dataclass(frozen=True)
class ImageData:
    """Training, validation and test images.

    Attributes:
      name: the set's name.
      splits: `seed -> Splits`; the test split is the same for every seed.
      shape: an image's shape, `(H, W, C)`.
      num_classes: the number of classes.
      pixels: each channel's mean and standard deviation for uint8 images; None for float images in [0, 1].
    """

    name: str
    splits: Callable[[int], Splits]
    shape: tuple[int, int, int]
    num_classes: int
    pixels: Pixels | None


def load_images(
    name: str, data_dir: Path | None, image_size: int | None, validation: int, label: str = "label"
) -> ImageData:
    """Returns the named images: `digits`, `shifted_digits`, a TFDS set such as `cifar100`, or a folder.

    Args:
      name: the set; a name with a slash, or of a folder, is a path.
      data_dir: TFDS's folder.
      image_size: the height and width to resize images to; None for no change.
      validation: the number of training images to hold out, redrawn for each seed; 0 for none. Digits always hold out
        200.
      label: the label feature of a TFDS set.

    Raises:
      ValueError: the images are unavailable, or too few can be held out.
    """
    if name in _DIGITS:
        load, size = _DIGITS[name]
        if image_size is not None:
            raise ValueError(f"{name} are {size}x{size} images: image_size is for other data, got {image_size}")
        return ImageData(name, lru_cache(maxsize=1)(load), (size, size, 1), 10, None)
    if "/" in name or Path(name).is_dir():
        images = load_image_folder(name, image_size=image_size)
    else:
        images = _tfds_images(name, data_dir, image_size=image_size, label=label)
    return _held_out(name, images, validation)


def _held_out(name: str, images: ImageSet, validation: int) -> ImageData:
    size = len(images.train["label"])
    if validation != 0 and not images.num_classes <= validation <= size - images.num_classes:
        raise ValueError(
            f"validation is {validation} of the {size} training images of {name}, of {images.num_classes} classes: "
            "give --validation 0 to hold out none, or a number that leaves one of each class on either side"
        )

    def splits(seed: int) -> Splits:
        train, held_out = images.train, {entry: array[:0] for entry, array in images.train.items()}
        if validation:
            held_out, train = split(images.train, validation, seed)
        return Splits(train, held_out, images.test)

    height, width, channels = images.train["image"].shape[1:]
    pixels = channel_statistics(images.train["image"])
    return ImageData(name, lru_cache(maxsize=1)(splits), (height, width, channels), images.num_classes, pixels)


def load_image_task(task: str, data_dir: Path | None, image_size: int | None, validation: int) -> ImageData:
    """Returns the images of a task with its labels.

    Raises:
      ValueError: the task is unknown, or as `load_images`.
    """
    check_choice("task", task, get_args(ImageTaskName))
    if task.startswith("cifar100"):
        label = "coarse_label" if task == "cifar100_coarse" else "label"
        return load_images("cifar100", data_dir, image_size, validation, label)
    if task == "shapes":
        return _held_out(task, _scene_shapes(4000, 1000, seed=0, image_size=image_size or 32), validation)
    digits = load_images("digits", data_dir, image_size, validation)
    if task == "parity":
        return _relabelled(digits, task, 2, lambda digit: digit % 2)
    if task == "parity_and_size":
        return _relabelled(digits, task, 4, lambda digit: digit % 2 + 2 * (digit >= 5))
    return digits


def _relabelled(data: ImageData, name: str, num_classes: int, relabel: Callable[[np.ndarray], np.ndarray]) -> ImageData:
    def change(arrays: Arrays) -> Arrays:
        return {**arrays, "label": relabel(arrays["label"]).astype(np.int32)}

    def splits(seed: int) -> Splits:
        found = data.splits(seed)
        return Splits(change(found.train), change(found.validation), change(found.test))

    return replace(data, name=name, splits=lru_cache(maxsize=1)(splits), num_classes=num_classes)


def make_model(
    name: str, num_classes: int, *, stages: int, dtype: Any = jnp.float32, **options: Any
) -> mj.models.ResNet | mj.models.MobileNetV2 | mj.models.EfficientNetLite:
    """Returns the named model; `stages` are those of small models, options the models' other attributes.

    Raises:
      ValueError: the model is unknown.
    """
    check_choice("model", name, get_args(ImageModelName))
    options["dtype"] = jnp.dtype(dtype)
    width = 0.5 if name.endswith("_half") else 1.0
    if name.startswith("efficientnet_lite0"):
        # The original's momentum of 0.99 suits longer runs.
        return mj.models.efficientnet_lite(num_classes, width, momentum=0.9, **options)
    if "_imagenet" in name:
        return getattr(mj.models, name.removesuffix("_half"))(num_classes, width, **options)
    if name == "resnet18_quarter":
        return mj.models.resnet18(num_classes, width=0.25, **options)
    if name.startswith("small_"):
        options["num_stages"] = stages
    if name == "small_resnet_half":
        return mj.models.small_resnet(num_classes, width=width, **options)
    return getattr(mj.models, name)(num_classes, **options)


def sgd(
    learning_rate: float, steps: int, *, schedule: LearningRateSchedule = "cosine", momentum: float = 0.9
) -> optax.GradientTransformation:
    """Returns the models' published optimizer: SGD with momentum, and weight decay 5e-4 on all parameters."""
    if schedule == "steps":
        rate = optax.piecewise_constant_schedule(
            learning_rate, {round(fraction * steps): 0.2 for fraction in (0.3, 0.6, 0.8)}
        )
    else:
        rate = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=momentum))


def image_classifier(
    name: str,
    module: Any,
    data: ImageData,
    *,
    optimizer: Callable[[int], optax.GradientTransformation],
    labels: int | None = None,
    unlabelled: int = 0,
    augment: bool = False,
    attention: Mapping[str, str] = MappingProxyType({}),
    pixels: Pixels | None = None,
    weights: Weights = OF_PYTORCH,
) -> StudyModel:
    """Returns a model that classifies images.

    Args:
      name: the display name.
      module: the Linen module, called as `(images, train=...)`, with logits.
      data: its images.
      optimizer: `steps -> optimizer`.
      labels: the number of training images, drawn stratified by class; None for all.
      unlabelled: the number of additional unlabelled images, see `StudyModel.pool`.
      augment: whether to crop, flip and rotate its training images at random.
      attention: its attention blocks, see `StudyModel`.
      pixels: the channels' mean and deviation for its pretrained weights; by default the module's `pixels`.
      weights: how to read these weights, if `pixels` are given.
    """

    own = getattr(module, "pixels", None) if pixels is None else pixels  # For models with known pretrained weights.
    pixels, pretrained = data.pixels, None
    if own is not None and pixels is not None and data.shape[-1] == 3:
        # Pretrained weights need their images' normalisation, and so does a target that receives them.
        pixels = own
    apply = module.apply if pixels is None else mj.on_pixels(module.apply, *pixels)
    model = classifier(
        name,
        module,
        data.splits,
        inputs="image",
        optimizer=optimizer,
        labels=labels,
        unlabelled=unlabelled,
        apply=apply,
    )
    if own is not None:
        pretrained = with_fitted_head(apply, lambda seed: model.splits(seed).train, data.num_classes, weights)
    shape = ", ".join(map(str, data.shape))
    images = f"images [N, {shape}], {'float32 in [0, 1]' if data.pixels is None else 'uint8'}"
    return replace(
        model,
        attention=attention,
        augment=_changed if augment else None,
        load_pretrained=pretrained,
        code=model_code(module, {f"jnp.zeros((1, {shape}))": images}, pixels),
    )


def _changed(key: jax.Array, batch: mj.Batch) -> mj.Batch:
    return {**batch, "image": crop_flip_rotate(key, batch["image"])}


def vision_classifier(
    name: str,
    model: str,
    data: ImageData,
    learning_rate: float,
    *,
    labels: int | None = None,
    unlabelled: int = 0,
    augment: bool = False,
    dtype: Any = jnp.float32,
    attributes: Mapping[str, Any] = MappingProxyType({}),
) -> StudyModel:
    """Returns a vision transformer that classifies images, trained by AdamW; see `make_vision_encoder`.

    Raises:
      ValueError: as `make_vision_encoder`, or images that are not square.
    """
    height, width, _ = data.shape
    if height != width:
        raise ValueError(f"{model} takes square images, those of {data.name} are {height}x{width}")
    encoder = make_vision_encoder(model, height, attributes, dtype=jnp.dtype(dtype))
    return image_classifier(
        name,
        mj.models.ImageClassifier(encoder, data.num_classes),
        data,
        optimizer=partial(adamw, learning_rate),
        labels=labels,
        unlabelled=unlabelled,
        augment=augment,
        attention={"vision": VISION_ATTENTION},
    )


def named_classifier(
    model: str,
    data: ImageData,
    learning_rate: float,
    *,
    name: str | None = None,
    labels: int | None = None,
    unlabelled: int = 0,
    augment: bool = False,
    stages: int = 3,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    schedule: LearningRateSchedule = "cosine",
    momentum: float = 0.9,
    attributes: Mapping[str, Any] = MappingProxyType({}),
) -> StudyModel:
    """Returns a built-in network, by name, as a model that classifies images.

    Vision transformers use AdamW and accept `attributes`, see `vision_classifier`. Others use SGD.

    Args:
      model: one of `ImageModelName` or `VisionModelName`.
      data: its images.
      learning_rate: the optimizer's learning rate.
      name: the display name; by default the network's.
      labels: see `image_classifier`.
      unlabelled: the same.
      augment: the same.
      stages: the stages of a small convolutional network, 1 to 3.
      dtype: the dtype of the computation.
      axis_name: the device axis that BatchNorm averages over, if any.
      schedule: SGD's learning rate schedule.
      momentum: SGD's momentum.
      attributes: attributes of a small vision transformer, see `make_vision_encoder`.

    Raises:
      ValueError: the network is unknown, or does not accept these images.
    """
    name = model if name is None else name
    options = {"labels": labels, "unlabelled": unlabelled, "augment": augment}
    if model in get_args(VisionModelName):
        return vision_classifier(name, model, data, learning_rate, dtype=dtype, attributes=attributes, **options)
    network = make_model(model, data.num_classes, stages=stages, dtype=dtype, axis_name=axis_name)
    optimizer = partial(sgd, learning_rate, schedule=schedule, momentum=momentum)
    return image_classifier(name, network, data, optimizer=optimizer, **options)


def image_model(
    task: str,
    model: str,
    *,
    data_dir: Path | None,
    image_size: int | None,
    validation: int,
    labels: int | None,
    unlabelled: int = 0,
    stages: int,
    learning_rate: float,
    attributes: Mapping[str, Any] = MappingProxyType({}),
) -> StudyModel:
    """Returns a model for an image task; see `load_image_task` and `named_classifier`.

    Raises:
      ValueError: the model or the task is unknown, or the images are unavailable.
    """
    data = load_image_task(task, data_dir, image_size, validation)
    return named_classifier(
        model,
        data,
        learning_rate,
        name=f"{model} ({task})",
        labels=labels,
        unlabelled=unlabelled,
        stages=stages,
        attributes=attributes,
    )


def make_vision_encoder(
    model: str,
    image_size: int,
    attributes: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> mj.models.VisionTransformer:
    """Returns the named vision transformer for square images.

    Args:
      model: one of `VisionModelName`.
      image_size: the images' height and width.
      attributes: attributes of a small model, such as layers, width and patch size, by default a quarter of the image.
      options: attributes of any model.

    Raises:
      ValueError: the model is unknown, needs images of another size, has fixed sizes, or patches do not fill the image.
    """
    check_choice("vision model", model, get_args(VisionModelName))
    if model == "vit_base":
        if image_size != 224 or attributes:
            raise ValueError("vit_base has fixed sizes, with patches of 16: use --image-size 224")
        return mj.models.vit_base(**options)
    attributes = {"patch_size": max(1, image_size // 4), **attributes}
    check_at_least_one(patch_size=attributes["patch_size"])
    if image_size % attributes["patch_size"]:
        raise ValueError(f"patches of {attributes['patch_size']} do not fill images of {image_size}x{image_size}")
    return getattr(mj.models, model)(image_size, **attributes, **options)
