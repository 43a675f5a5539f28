"""Initial weights of a text model."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

import merge_jax as mj
from merge_jax.models.huggingface import Loaded, check_huggingface, read_huggingface

__all__ = ["check_weights", "read_weights", "weights_error", "with_weights"]


def check_weights(path: Path, encoder: nn.Module, inputs: Any) -> None:
    """Raises ValueError for Hugging Face weights of another encoder, as far as their header tells."""
    shapes: Any = jax.eval_shape(encoder.init, jax.random.key(0), inputs)
    with weights_error():
        check_huggingface(path, shapes["params"])


@contextlib.contextmanager
def weights_error() -> Iterator[None]:
    """Raises ValueError for weights that cannot be read."""
    try:
        yield
    except (OSError, ImportError) as error:
        raise ValueError(f"the weights cannot be read: {error}") from None


def with_weights(given: Loaded, params: Any) -> Any:
    """Returns the weights read, with missing ones at their random initial values."""
    drawn = mj.flatten(params)
    return mj.replace(given.params, {leaf: drawn[leaf] for leaf in given.kept})


def read_weights(path: Path, params: Any, fitted: str | None = None) -> Loaded:
    """Returns Hugging Face weights for a model, and reports on standard error what they lack.

    Args:
      path: the path of the weights.
      params: the model's parameters.
      fitted: prefixes of leaves not to report, since they are fitted next.

    Raises:
      ValueError: they cannot be read, or do not fit the model or its vocabulary.
    """
    try:
        with weights_error():
            loaded = read_huggingface(path, params)
    except ValueError as error:
        if "vocabulary" not in str(error):
            raise
        raise ValueError(f"{error}: --vocabulary names the one that the weights were trained with") from None
    if kept := [leaf for leaf in loaded.kept if fitted is None or not leaf.startswith(fitted)]:
        print(f"{path}: not in it, so as they start: {', '.join(kept)}", file=sys.stderr)
    return loaded
