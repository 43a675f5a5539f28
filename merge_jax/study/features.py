"""What a pretrained network makes of examples, and the last layer that is fitted to them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import merge_jax as mj
from merge_jax.objectives.evaluation import of_all_rows
from merge_jax.types import ModelApply

__all__ = ["fitted_head", "read_features"]

_AT_ONCE = 200
_PENALTY = 100.0
"""Of features of unit variance; our choice: of 10 to 10,000 the best for 2,000 images of CIFAR-100 on validation, from
64 pixels on (`docs/weights.md`), and of 1 to 1,000 within a point for 500 texts of AG News."""


def read_features(apply: ModelApply, variables: Mapping[str, Any], inputs: np.ndarray) -> np.ndarray:
    """Returns what a model sows as `features`, the input of its last layer, `[N, d]`, of inputs `[N, ...]`.

    In evaluation mode, and in batches of one width, so that one compilation serves them.
    """
    observe = mj.objectives.with_features(apply)
    read = jax.jit(lambda variables, inputs: observe(variables, inputs, train=False)[1][0])
    return of_all_rows(
        lambda batch: read(variables, batch["inputs"]), {"inputs": inputs}, np.arange(len(inputs)), _AT_ONCE
    )


def fitted_head(
    apply: ModelApply, variables: Mapping[str, Any], inputs: np.ndarray, labels: np.ndarray, num_classes: int
) -> mj.training.Head:
    """Returns the last layer of a pretrained network for labels `[N]`: logistic regression on its features."""
    features = read_features(apply, variables, inputs)
    return mj.fit_head(features, labels, num_classes=num_classes, penalty=_PENALTY)
