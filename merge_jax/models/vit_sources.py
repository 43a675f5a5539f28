"""Vision transformers of whatever file: the encoder that it is of, and its weights by the reader of its names."""

import os
from typing import Any

from merge_jax.models.huggingface import from_huggingface, is_vit_of_huggingface, vit_encoder_of
from merge_jax.models.key_maps import PretrainedVariables
from merge_jax.models.pytorch import from_pytorch
from merge_jax.models.vit import VisionTransformer
from merge_jax.models.vit_files import encoder_of, from_flax, library_of

__all__ = ["load_vision_transformer", "vision_transformer_of"]


def vision_transformer_of(
    path: str | os.PathLike[str], *, num_heads: int | None = None, image_size: int | None = None, **options: Any
) -> VisionTransformer:
    """Returns the encoder of a file of weights, with its sizes, its epsilon and its gelu.

    The file is of a ViT of timm, big_vision, google-research/vision_transformer or Hugging Face. No numbers are read.

    Args:
      path: as of `from_pytorch`, `from_flax` and `from_huggingface`.
      num_heads: of each attention. Files of timm do not have it, and those of Hugging Face only in `config.json`.
      image_size: height and width of the images in pixels; those of the file by default. For others, read its positions
        with `resize_positions=True`.
      options: other attributes of `VisionTransformer`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read, it is of none of these, or the number of heads is not known.
    """
    if is_vit_of_huggingface(path):
        return vit_encoder_of(path, num_heads, image_size, options)
    return encoder_of(path, num_heads, image_size, options)


def load_vision_transformer(
    path: str | os.PathLike[str], variables: Any, *, epsilon: float, resize_positions: bool = False
) -> PretrainedVariables:
    """Returns a vision transformer's variables with the weights of a file, by the reader of its names.

    Args:
      path: as `vision_transformer_of`.
      variables: as `from_pytorch`.
      epsilon: of the model's norms, as `from_huggingface`.
      resize_positions: as `from_pytorch`.

    Raises:
      FileNotFoundError, ValueError: as `from_pytorch`, `from_flax` and `from_huggingface`.
    """
    if is_vit_of_huggingface(path):
        params, kept = from_huggingface(path, variables["params"], epsilon=epsilon, resize_positions=resize_positions)
        return PretrainedVariables({**variables, "params": params}, tuple(f"params/{leaf}" for leaf in kept), ())
    read = from_pytorch if library_of(path) == "timm" else from_flax
    return read(path, variables, resize_positions=resize_positions)
