"""A scenario: two models and the methods to compare. It defines what to run; the runner defines how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import optax

from merge_jax.study.models.model import StudyModel
from merge_jax.training.joint import Task, TrainState
from merge_jax.transfers.base import Transfer, identity_transfer
from merge_jax.types import Adapter, Batch, Params, TeacherFn

__all__ = ["FitFn", "Lengths", "Method", "Scenario", "Schedule", "StartFn"]


class Lengths(NamedTuple):
    """A model's training lengths, in steps.

    Attributes:
      steps: the total number of steps.
      report_every: steps between reports.
      checkpoint_every: steps between checkpoints.
    """

    steps: int
    report_every: int
    checkpoint_every: int


class Schedule(NamedTuple):
    """The lengths of the target's training and of the source's pre-training, if any."""

    source: Lengths
    target: Lengths


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
    """A method to compare: a transfer and the target's task.

    Attributes:
      task: the target's loss and optimizer.
      transfer: the transfer from the source to the target.
      stop: the fraction of the run after which it stops; 0 for no transfer.
      teacher: adds the source's outputs to the target's batches, for distillation.
      fit: makes the initial adapter; None for that of the transfer.
      start: makes the initial target, once, before `fit` and the first step (not on resume); None for the target's own
        initialisation.
      pooled: whether its loss compares on the target's pool; each batch then has as many inputs from it.
      each_alone: whether the teacher computes the source's outputs for each example independently (of the pool, if
        pooled); those of a frozen source are then computed once. False if it compares examples, or uses both kinds.
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
      source: the source model; None if the target is its own source.
      target: the target model.
      source_task: the source's task, if any.
      methods: the methods by name.
      schedule: the lengths of the run.
      adapter_optimizer: the optimizer of every method's adapter.
      axis_name: the `pmap` axis that the models average over; None under jit.
      attach: writes additional files of a run, such as a vocabulary, into its folder.
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
