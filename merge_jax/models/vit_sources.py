"""Vision transformers from any supported file: the matching encoder, and its weights."""

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
    """Returns the encoder that fits a weight file, with its sizes, epsilon and gelu.

    The file contains a ViT of timm, big_vision, google-research/vision_transformer or Hugging Face. Only names and
    shapes are read.

    Args:
      path: as in `from_pytorch`, `from_flax` and `from_huggingface`.
      num_heads: heads of each attention. Files of timm do not contain it, those of Hugging Face only in `config.json`.
      image_size: height and width of the images in pixels; by default those of the file. For others, read its positions
        with `resize_positions=True`.
      options: other attributes of `VisionTransformer`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read, is from another library, or the number of heads is unknown.
    """
    if is_vit_of_huggingface(path):
        return vit_encoder_of(path, num_heads, image_size, options)
    return encoder_of(path, num_heads, image_size, options)


def load_vision_transformer(
    path: str | os.PathLike[str], variables: Any, *, epsilon: float, resize_positions: bool = False
) -> PretrainedVariables:
    """Returns a vision transformer's variables with the weights of any supported file.

    Args:
      path: as `vision_transformer_of`.
      variables: as `from_pytorch`.
      epsilon: of the model's norms, as `from_huggingface`.
      resize_positions: as in the function for the file.

    Raises:
      FileNotFoundError, ValueError: as `from_pytorch`, `from_flax` and `from_huggingface`.
    """
    if is_vit_of_huggingface(path):
        params, kept = from_huggingface(path, variables["params"], epsilon=epsilon, resize_positions=resize_positions)
        return PretrainedVariables({**variables, "params": params}, tuple(f"params/{leaf}" for leaf in kept), ())
    read = from_pytorch if library_of(path) == "timm" else from_flax
    return read(path, variables, resize_positions=resize_positions)
