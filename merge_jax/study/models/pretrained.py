"""Pretrained networks: their features of examples, and a last layer fitted to the task's labels."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import merge_jax as mj
from merge_jax.data import Arrays
from merge_jax.models.key_maps import PretrainedVariables
from merge_jax.objectives.evaluation import apply_in_batches
from merge_jax.types import ModelApply

__all__ = ["OF_PYTORCH", "Weights", "fitted_head", "read_features", "with_fitted_head"]

_AT_ONCE = 200
_PENALTY = 100.0
"""Of features of unit variance; our choice: of 10 to 10,000 the best for 2,000 images of CIFAR-100 on validation, from
64 pixels on (`docs/weights.md`), and of 1 to 1,000 within a point for 500 texts of AG News."""


class Weights(NamedTuple):
    """How to read a pretrained network's weights.

    Attributes:
      read: `(path, variables) -> PretrainedVariables`.
      last: the path of the last layer.
    """

    read: Callable[[Path, dict[str, Any]], PretrainedVariables]
    last: str


OF_PYTORCH = Weights(mj.models.from_pytorch, "params/fc")


def read_features(apply: ModelApply, variables: Mapping[str, Any], inputs: np.ndarray) -> np.ndarray:
    """Returns a model's sown `features`, the input of its last layer, `[N, d]`, for inputs `[N, ...]`.

    Runs in evaluation mode, in batches of one size, so that one compilation serves them.
    """
    observe = mj.objectives.with_features(apply)
    read = jax.jit(lambda variables, inputs: observe(variables, inputs, train=False)[1][0])
    return apply_in_batches(
        lambda batch: read(variables, batch["inputs"]), {"inputs": inputs}, np.arange(len(inputs)), _AT_ONCE
    )


def fitted_head(
    apply: ModelApply, variables: Mapping[str, Any], inputs: np.ndarray, labels: np.ndarray, num_classes: int
) -> mj.training.Head:
    """Returns the last layer of a pretrained network for labels `[N]`: logistic regression on its features."""
    features = read_features(apply, variables, inputs)
    return mj.fit_head(features, labels, num_classes=num_classes, penalty=_PENALTY)


def with_fitted_head(
    apply: ModelApply, examples: Callable[[int], Arrays], num_classes: int, weights: Weights = OF_PYTORCH
) -> Callable[[Path, dict[str, Any], int | None], dict[str, Any]]:
    """Returns `StudyModel.load_pretrained` of a network with such weights.

    If the file has as many classes as the model, its last layer is used; otherwise one is fitted to the features of the
    seed's training examples. The source sees no other labels.

    Args:
      apply: the model's apply function, for images as in the examples.
      examples: `seed -> labelled examples`.
      num_classes: the model's number of classes.
      weights: how to read them.
    """
    heads: dict[tuple[Path, int], mj.training.Head] = {}

    def load(path: Path, variables: dict[str, Any], seed: int | None) -> dict[str, Any]:
        if seed is None:  # For shapes; missing parts are fitted later.
            last = {name: leaf for name, leaf in mj.flatten(variables).items() if name.startswith(f"{weights.last}/")}
            variables = mj.replace(variables, {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in last.items()})
        loaded = weights.read(path, variables)
        if not loaded.kept or seed is None:
            return loaded.variables
        if (path, seed) not in heads:  # A run calls this once to check, and once to train.
            train = examples(seed)
            images = np.asarray(train["image"])
            heads[path, seed] = fitted_head(apply, loaded.variables, images, train["label"], num_classes)
        names = (f"{weights.last}/{name}" for name in mj.training.Head._fields)
        return mj.replace(loaded.variables, dict(zip(names, heads[path, seed], strict=True)))

    return load
