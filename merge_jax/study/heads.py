"""Head first: the last layer fitted to the labelled examples before the first step."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from merge_jax.data import take
from merge_jax.paths import flatten
from merge_jax.study.measures import observer, reset_to_inputs, sampled
from merge_jax.study.model import StudyModel
from merge_jax.training.joint import TrainState
from merge_jax.types import ModelState, Params

__all__ = ["FitHead", "make_fit_head"]

FitHead = Callable[[TrainState, int], tuple[dict[str, np.ndarray], ModelState]]
"""`(target right after the write, seed) -> (leaves of its last layer by path, model state)`."""

_SOME = 16
_SEVERAL = 64


def make_fit_head(model: StudyModel, axis_name: str | None = None) -> tuple[tuple[str, str], FitHead]:
    """Returns the paths of a classifier's last layer, kernel and bias, and what fits it to the labelled examples.

    That is `mj.fit_head`, on features with the statistics of BatchNorm that the training inputs give.

    Raises:
      ValueError: no classifier, one that sows no `features`, or whose logits are not a dense layer of them.
    """
    test = model.splits(0).test
    observe = observer(model, test)
    if observe is None or sampled(model, 0) is None:
        raise ValueError(
            f"head_first needs a classifier that sows 'features', the input of its last layer; {model.name} does not"
        )
    params, model_state = model.init(jax.random.key(0))
    few = take(test, np.arange(min(_SOME, len(test["label"]))))
    kernel, bias = _last_layer(model.name, params, *observe(params, model_state, few))
    checked = False  # Once a run will do.

    def fit_head(target: TrainState, seed: int) -> tuple[dict[str, np.ndarray], ModelState]:
        nonlocal checked
        sample = sampled(model, seed)
        assert sample is not None  # It was there for seed 0.
        target = reset_to_inputs(model, target, sample, seed, axis_name)
        found = observe(target.params, target.model_state, sample.fitted)
        labels = np.asarray(sample.fitted["label"])
        classes = found.logits.shape[1]
        head = mj.fit_head(found.features, labels, num_classes=classes, penalty=model.head_penalty)
        leaves = {kernel: np.asarray(head.kernel), bias: np.asarray(head.bias)}
        if not checked:
            checked = True
            features, known = (jnp.asarray(part[:_SEVERAL]) for part in (found.features, labels))
            calm = float(mj.cross_entropy(head(features), known).mean())
            _warn_of_dropout(model, mj.replace(target.params, leaves), target.model_state, sample.fitted, calm)
        return leaves, target.model_state

    return (kernel, bias), fit_head


def _warn_of_dropout(
    model: StudyModel, params: Params, model_state: ModelState, fitted: Mapping[str, Any], calm: float
) -> None:
    """Says on standard error where dropout takes away what a fitted last layer knows, so that steps would undo it.

    That is where features differ from example to example by far less than by what is dropped of them.
    """
    given = jax.random.key(0), params, model_state, take(fitted, np.arange(min(_SEVERAL, len(fitted["label"]))))
    traced = jax.jit(lambda key, params, state, batch: model.loss(params, state, batch, key)[0]).trace(*given)
    key = traced.jaxpr.jaxpr.invars[0]
    if not any(key is used for equation in traced.jaxpr.eqns for used in equation.invars):
        return  # No dropout.
    noisy = float(traced.lower().compile()(*given))
    if not noisy <= 3 * calm + 1:
        print(
            f"warning: the last layer of {model.name} was fitted first, to a loss of {calm:.2f}; with the model's"
            f" dropout it is {noisy:.3g}, and steps will undo it: take a model without dropout before its last layer"
            " (of text, --pooler mean), or a larger --head-penalty",
            file=sys.stderr,
        )


def _last_layer(name: str, params: Any, features: np.ndarray, logits: np.ndarray) -> tuple[str, str]:
    """Returns the paths of the kernel and the bias that make the logits of the features."""
    leaves = flatten(params)
    for path, kernel in leaves.items():
        bias = f"{path.removesuffix('kernel')}bias"
        if path.endswith("kernel") and bias in leaves and kernel.shape == (features.shape[1], logits.shape[1]):
            made = features @ np.asarray(kernel, np.float32) + np.asarray(leaves[bias], np.float32)
            if np.allclose(made, logits, rtol=0.02, atol=0.02 * np.abs(logits).max()):  # In bfloat16 too.
                return path, bias
    raise ValueError(f"head_first: no kernel and bias of {name} make its logits of its 'features'")
