"""A vision transformer with weights from a file, as the frozen source of a scenario."""

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import merge_jax as mj
from merge_jax.checkpoints.weights.load import find_weights
from merge_jax.study.models.images import VISION_ATTENTION, ImageData, image_classifier
from merge_jax.study.models.model import StudyModel
from merge_jax.study.models.pretrained import Weights
from merge_jax.study.models.texts import adamw

__all__ = ["vit_of_file"]

_PIXELS = ((0.5,) * 3, (0.5,) * 3)  # Of Google, Hugging Face and most of timm; not stored in the tensors.


def vit_of_file(
    path: Path | None,
    data: ImageData,
    *,
    num_heads: int | None,
    labels: int | None,
    dtype: Any = jnp.float32,
) -> StudyModel:
    """Returns a file's vision transformer for the images of a data set; positions are resized to match.

    Its last layer is the file's if the number of classes matches, and is fitted otherwise, see `with_fitted_head`.

    Args:
      path: the path of the file, as in `merge_jax.models.vision_transformer_of`.
      data: the images.
      num_heads: as in `vision_transformer_of`.
      labels: the number of images to fit its last layer to; None for all.
      dtype: the dtype of the computation.

    Raises:
      ValueError: no path, a file without a known vision transformer, or images that its patches do not fill.
    """
    if path is None:
        raise ValueError("source_model vit_of_file is a file's network: give --source frozen --source-from FILE")
    file, (height, width, channels) = find_weights(path), data.shape
    try:
        encoder = mj.models.vision_transformer_of(file, num_heads=num_heads, image_size=height, dtype=jnp.dtype(dtype))
    except ValueError as error:  # The option of a command has another name.
        raise ValueError(str(error).replace("num_heads", "--source-heads")) from None
    if height != width or height % encoder.patch_size or channels != 3:
        raise ValueError(
            f"{path} has patches of {encoder.patch_size}x{encoder.patch_size} pixels of 3 channels, which do not fill"
            f" images of {height}x{width}x{channels}: give --image-size a multiple of {encoder.patch_size}"
        )
    read = partial(mj.models.load_vision_transformer, epsilon=encoder.epsilon, resize_positions=True)
    return image_classifier(
        "vit_of_file",
        mj.models.ImageClassifier(encoder, data.num_classes),
        data,
        optimizer=partial(adamw, 1e-3),  # It is never trained.
        labels=labels,
        attention={"vision": VISION_ATTENTION},
        pixels=_PIXELS,
        weights=Weights(read, "params/classifier"),
    )
