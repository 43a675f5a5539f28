"""What a pretrained network makes of examples, for the last layer that is fitted to them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import merge_jax as mj
from merge_jax.objectives.evaluation import padded_batches
from merge_jax.types import ModelApply

__all__ = ["read_features"]

_AT_ONCE = 200


def read_features(apply: ModelApply, variables: Mapping[str, Any], inputs: np.ndarray) -> np.ndarray:
    """Returns what a model sows as `features`, the input of its last layer, `[N, d]`, of inputs `[N, ...]`.

    In evaluation mode, and in batches of one width, so that one compilation serves them.
    """
    observe = mj.objectives.with_features(apply)
    read = jax.jit(lambda variables, inputs: observe(variables, inputs, train=False)[1][0])
    batches = padded_batches({"inputs": inputs}, np.arange(len(inputs)), _AT_ONCE)
    return np.concatenate([np.asarray(read(variables, batch["inputs"]))[:count] for count, batch in batches])
