"""One model of a scenario: its interface, a classifier of arrays, and its pool of unlabelled inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

import merge_jax as mj
from merge_jax.checks import check_entries
from merge_jax.data import Arrays, Splits, class_balanced, num_examples, take
from merge_jax.training.epoch import Augment
from merge_jax.types import LossFn, ModelApply, ModelState, Params

__all__ = ["POOL", "SampleImages", "StudyModel", "check_pool", "classifier", "draw_pool", "inputs_of", "pool_inputs"]

_EVALUATED_AT_ONCE = 200  # Divides the digits' validation and test sizes: one compilation serves both.

POOL = "pool/"
"""What the names of inputs from the pool begin with, in a batch and in the examples that `fit` and `start` get."""


@dataclass(frozen=True)
class SampleImages:
    """A few test images, for a figure of the models' outputs.

    Attributes:
      images: reads them, uint8 `[n, H, W, C]`.
      asked: the question on each, if any.
      right: all correct answers of each, the one to show first.
      answer: `(params, model_state) -> n answers`.
    """

    images: Callable[[], np.ndarray]
    asked: Sequence[str]
    right: Sequence[Sequence[str]]
    answer: Callable[[Params, ModelState], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class StudyModel:
    """One model of a scenario: its initialisation, data, training and evaluation.

    Attributes:
      name: the display name.
      init: `key -> (params, model_state)`.
      loss: its loss.
      optimizer: `steps -> optimizer`.
      splits: `seed -> Splits`.
      evaluate: `(params, model_state, arrays) -> metrics`, including its main metric, a fraction in [0, 1].
      metric: the name of the main metric.
      apply: its apply function, for losses that read intermediates; None for several models in one.
      inputs: its input entries of a batch, in order.
      attention: path patterns of its attention blocks, by modality: `vision`, `text`.
      augment: augments its training batches; None for no change.
      load: `(path, params) -> params` from a weight file; the given `params` are the initial ones.
      load_pretrained: `(path, variables, seed) -> variables` from another library's file. The given variables are the
        initial `{"params": ..., **model_state}`. Missing parts, such as a last layer for the task's labels, are fitted
        to the seed's training examples. Without a seed, only checks the fit, and variables may be shapes. None to use
        `load`, which handles only parameters.
      sample_images: test images for its figure; None for a model without images.
      code: Python lines that define it, see `model_code`; may be empty.
      head_penalty: the penalty of logistic regressions on its features, see `merge_jax.fit_head`.
      head_floor: the floor of its fitted last layer, see there.
      pool: `seed -> inputs` without labels, starting with those of the labelled examples; None for these alone.
    """

    name: str
    init: Callable[[jax.Array], tuple[Params, ModelState]]
    loss: LossFn
    optimizer: Callable[[int], optax.GradientTransformation]
    splits: Callable[[int], Splits]
    evaluate: Callable[[Params, ModelState, Arrays], dict[str, float]]
    metric: str = "accuracy"
    apply: ModelApply | None = None
    inputs: tuple[str, ...] = ()
    attention: Mapping[str, str] = field(default_factory=dict)
    augment: Augment | None = None
    load: Callable[[Path, Params], Params] = mj.load_params
    load_pretrained: Callable[[Path, dict[str, Any], int | None], dict[str, Any]] | None = None
    sample_images: SampleImages | None = None
    code: str = ""
    pool: Callable[[int], Arrays] | None = None
    head_penalty: float = 1.0
    head_floor: float = 0.0

    def __post_init__(self) -> None:  # noqa: D105
        if self.apply is not None and not self.inputs:
            raise ValueError(
                f"the model {self.name!r} has an apply function and no inputs: name the entries of a batch that it "
                "reads, such as inputs=('image',)"
            )

    @cached_property
    def shapes(self) -> tuple[Params, ModelState]:
        """Shapes of the parameters and of the model state."""
        return jax.eval_shape(self.init, jax.random.key(0))


def classifier(
    name: str,
    module: nn.Module,
    splits: Callable[[int], Splits],
    *,
    inputs: str,
    optimizer: Callable[[int], optax.GradientTransformation],
    labels: int | None = None,
    unlabelled: int = 0,
    apply: ModelApply | None = None,
) -> StudyModel:
    """Returns a model that classifies the examples of arrays, trained by cross entropy.

    Args:
      name: the display name.
      module: the Linen module, called as `(inputs, train=...)`, with logits.
      splits: `seed -> Splits` of examples with an entry of inputs and their `label`.
      inputs: the name of the input entry.
      optimizer: `steps -> optimizer`.
      labels: the number of training examples, drawn stratified by class; None for all.
      unlabelled: the number of additional unlabelled examples, see `StudyModel.pool`.
      apply: its apply function, if it transforms the inputs first, such as `merge_jax.on_pixels`.

    Raises:
      ValueError: examples without such an entry, or too few examples.
    """
    train = splits(0).train
    check_entries(train, inputs, "label")
    if unlabelled:
        check_pool(train, labels, unlabelled)
    entry = train[inputs]
    # `apply` converts uint8 to floats.
    example = np.zeros((1, *entry.shape[1:]), np.float32 if entry.dtype == np.uint8 else entry.dtype)

    def init(key: jax.Array) -> tuple[Params, ModelState]:
        variables = mj.models.initialize(module, key, example)
        return variables["params"], {name: state for name, state in variables.items() if name != "params"}

    def few_labels(seed: int) -> Splits:
        found = splits(seed)
        return found if labels is None else replace(found, train=class_balanced(found.train, labels, seed))

    def pool(seed: int) -> Arrays:
        assert labels is not None  # check_pool
        return draw_pool(splits(seed).train, labels, unlabelled, seed, (inputs,))

    apply = module.apply if apply is None else apply
    return StudyModel(
        name=name,
        init=init,
        loss=mj.classification_loss(apply, inputs=inputs),
        optimizer=optimizer,
        splits=lru_cache(maxsize=1)(few_labels),
        evaluate=mj.evaluate_classifier(apply, inputs=inputs, batch_size=_EVALUATED_AT_ONCE),
        apply=apply,
        inputs=(inputs,),
        pool=lru_cache(maxsize=1)(pool) if unlabelled else None,
    )


def check_pool(train: Arrays, labels: int | None, unlabelled: int) -> None:
    """Raises ValueError unless there are that many training examples besides the labelled ones."""
    total = num_examples(train)
    left = 0 if labels is None else total - labels
    if unlabelled > left:
        has = "all are labelled" if labels is None else f"{labels} are labelled"
        raise ValueError(
            f"unlabelled is {unlabelled}, but of {total} training examples {has}, which leaves {left}: give fewer"
        )


def draw_pool(train: Arrays, labels: int, unlabelled: int, seed: int, inputs: tuple[str, ...]) -> dict[str, Any]:
    """Returns the inputs of the labelled examples, drawn by `class_balanced`, and then of that many others.

    The order of the others does not depend on their number.
    """
    total = num_examples(train)
    labelled = class_balanced({"row": np.arange(total), "label": train["label"]}, labels, seed)["row"]
    others = np.random.default_rng([seed, labels]).permutation(np.setdiff1d(np.arange(total), labelled))
    rows = np.concatenate([labelled, others[:unlabelled]])
    return take({name: train[name] for name in inputs}, rows)


def pool_inputs(model: StudyModel) -> tuple[str, ...]:
    """Returns a batch's entries, of the target's inputs, on which it is compared with its source."""
    return model.inputs if model.pool is None else tuple(POOL + name for name in model.inputs)


def inputs_of(examples: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    """Returns inputs without labels: those of the pool, or, without a pool, of the labelled examples.

    Raises:
      ValueError: the examples lack an input.
    """
    check_entries(examples, *names)
    return [examples.get(POOL + name, examples[name]) for name in names]
