"""What a scenario is: two models and the methods to compare. It says what to run; the runner says how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import optax

from merge_jax.study.model import StudyModel
from merge_jax.training.joint import Task, TrainState
from merge_jax.transfers.base import Transfer, identity_transfer
from merge_jax.types import Adapter, Batch, Params, TeacherFn

__all__ = ["FitFn", "Lengths", "Method", "Scenario", "Schedule", "StartFn"]


class Lengths(NamedTuple):
    """How long a model is trained, in steps.

    Attributes:
      steps: all of them.
      report_every: from one report to the next.
      checkpoint_every: from one checkpoint to the next.
    """

    steps: int
    report_every: int
    checkpoint_every: int


class Schedule(NamedTuple):
    """How long the target is trained, and the source before it where it is pretrained."""

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
