"""What a scenario is: two models and the methods to compare. It says what to run; the runner says how."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from merge_jax.checkpoints.safetensors import load_params
from merge_jax.checks import check_choice
from merge_jax.data import Arrays, Splits
from merge_jax.study.config import Schedule
from merge_jax.training.epoch import Augment
from merge_jax.training.joint import Task, TrainState
from merge_jax.transfers.base import Transfer, identity_transfer
from merge_jax.types import Adapter, Batch, LossFn, ModelApply, ModelState, Params, TeacherFn

__all__ = ["POOL", "FitFn", "Method", "SampleImages", "Scenario", "StartFn", "StudyModel", "choose_methods"]


POOL = "pool/"
"""What the names of inputs from the pool begin with, in a batch and in the examples that `fit` and `start` get."""


@dataclass(frozen=True)
class SampleImages:
    """A few test images, for a picture of the models' outputs.

    Attributes:
      images: reads them, uint8 `[n, H, W, C]`.
      asked: what is asked of each, if anything is.
      right: of each, all answers that are right, the one to show first.
      answer: `(params, model_state) -> answers`, n of them.
    """

    images: Callable[[], np.ndarray]
    asked: Sequence[str]
    right: Sequence[Sequence[str]]
    answer: Callable[[Params, ModelState], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class StudyModel:
    """One model of a scenario: how it starts, what it learns from, how it is judged.

    Attributes:
      name: of the model, for people.
      init: `key -> (params, model_state)`.
      loss: what it learns.
      optimizer: `steps -> optimizer` that it learns by.
      splits: `seed -> Splits`.
      evaluate: `(params, model_state, arrays) -> metrics`, with the one it is judged by, a fraction in [0, 1].
      metric: the name of that one.
      apply: its apply function, for losses that look inside of it; None for several models in one.
      inputs: the entries of a batch that are its inputs, in order.
      attention: its attention blocks as a pattern of paths, by what they attend to: `vision`, `text`.
      augment: changes its batches at random while it trains; None for batches as they are.
      load: `(path, params) -> params` from a file of weights, where `params` is the model as it starts.
      load_pretrained: `(path, variables, seed) -> variables` from a file of another library, where variables are
        `{"params": ..., **model_state}` as the model starts, and what the file lacks, such as a last layer for the
        labels at hand, is fitted to the seed's training examples; for no seed it is checked to fit, and variables may
        be shapes. None for `load`, which knows parameters alone.
      sample_images: test images that it is shown with; None for a model of other things.
      code: lines of Python that make it, see `model_code`; empty where there are none.
      head_penalty: of logistic regressions on its features, see `merge_jax.fit_head`.
      pool: `seed -> inputs` without labels, those of the labelled examples first; None for these alone.
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
    load: Callable[[Path, Params], Params] = load_params
    load_pretrained: Callable[[Path, dict[str, Any], int | None], dict[str, Any]] | None = None
    sample_images: SampleImages | None = None
    code: str = ""
    pool: Callable[[int], Arrays] | None = None
    head_penalty: float = 1.0

    def __post_init__(self) -> None:  # noqa: D105
        if self.apply is not None and not self.inputs:
            raise ValueError(
                f"the model {self.name!r} has an apply function and no inputs: name the entries of a batch that it "
                "reads, such as inputs=('image',)"
            )


FitFn = Callable[[Adapter, TrainState, Params, Batch], Adapter]
"""`(adapter as the transfer makes it, source, target's parameters, target's examples) -> adapter to start from`.

The examples are the labelled ones and, where there is a pool, its inputs under names such as `pool/image`.
"""

StartFn = Callable[[jax.Array, TrainState, TrainState, Batch], TrainState]
"""`(key, source, target as it is initialised, target's examples) -> target to start from`.

Examples are those of `FitFn`. Neither model has an `opt_state`. What comes back has the structure, shapes and dtypes of
the target that was given; the key is consumed.
"""


@dataclass(frozen=True)
class Method:
    """A method to compare: a transfer and what the target learns.

    Attributes:
      task: the target's loss and optimizer.
      transfer: what moves parameters from the source to the target.
      stop: the fraction of the run after which it moves no more; 0 for no transfer.
      teacher: adds the source's outputs to the target's batches, for a loss that distils them.
      fit: makes the adapter that the run starts from; None for the one that the transfer makes.
      start: makes the target that the run starts from, before `fit` and before the first step, once: not where a run
        goes on; None for the target as it is initialised.
      pooled: whether its loss compares on the target's pool, so that each batch has as many inputs of that.
      each_alone: whether the teacher shows the source's outputs of each example on its own, of the pool where it is
        pooled: those of a frozen source are then computed once. Not where it compares examples, or shows both kinds.
    """

    task: Task
    transfer: Transfer = field(default_factory=identity_transfer)
    stop: float = 0.0
    teacher: TeacherFn | None = None
    fit: FitFn | None = None
    start: StartFn | None = None
    pooled: bool = False
    each_alone: bool = False


@dataclass(frozen=True)
class Scenario:
    """Two models and the methods to compare.

    Attributes:
      name: of the scenario.
      source: the model that gives; None where the target is its own source.
      target: the model that receives.
      source_task: what the source learns, if there is one.
      methods: by name.
      schedule: the lengths of the run.
      adapter_optimizer: of every method's adapter.
      axis_name: the `pmap` axis that the models average over; None under jit.
      attach: writes what belongs to a run beside its checkpoints, such as a vocabulary, into its folder.
      head_first: whether the target's last layer is fitted before the first step.
    """

    name: str
    source: StudyModel | None
    target: StudyModel
    source_task: Task | None
    methods: Mapping[str, Method]
    schedule: Schedule
    adapter_optimizer: optax.GradientTransformation
    axis_name: str | None = None
    attach: Callable[[Path], None] | None = None
    head_first: bool = False


def choose_methods(methods: Mapping[str, Callable[[], Method]], names: Sequence[str]) -> dict[str, Method]:
    """Returns the named methods in the order of their names; only these are made.

    Raises:
      ValueError: no names, a name that is no method's, or one that appears twice.
    """
    if not names:
        raise ValueError(f"no methods: name one or more of {', '.join(methods)}")
    chosen: dict[str, Method] = {}
    for name in names:
        check_choice("method", name, methods)
        if name in chosen:
            raise ValueError(f"the method {name!r} is named twice")
        chosen[name] = methods[name]()
    return chosen
