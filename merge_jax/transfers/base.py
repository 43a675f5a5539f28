"""Transfers: pure functions that map a source and a target parameter tree to a new target tree."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import optax

from merge_jax.deprecated import warn_renamed
from merge_jax.types import Adapter, Metrics, Params

__all__ = [
    "ApplyFn",
    "DescribeFn",
    "FitFn",
    "InitFn",
    "Key",
    "MonitorFn",
    "RouteSummary",
    "Step",
    "Transfer",
    "check_transfer",
    "identity_transfer",
    "schedule_value",
    "writes",
]

Key = jax.Array | None
"""A random key, which is consumed; None to draw nothing."""

Step = jax.Array | int | None
"""The joint step's count; None outside training."""


class InitFn(Protocol):
    """Makes the adapter of a transfer."""

    def __call__(self, key: jax.Array, source_params: Params, target_params: Params, /) -> Adapter:
        """Checks the transfer against both trees and returns the adapter's parameters; `key` is consumed."""
        ...


class ApplyFn(Protocol):
    """Maps both parameter trees to a new target tree."""

    def __call__(
        self, adapter: Adapter, source_params: Params, target_params: Params, /, *, key: Key = None, step: Step = None
    ) -> Params:
        """Returns a target tree of the same structure, shapes and dtypes; a `key` turns dropout on.

        Raises:
          ValueError: the transfer follows a schedule and there is no `step`.
        """
        ...


class MonitorFn(Protocol):
    """Reports scalars of the adapter during training."""

    def __call__(
        self, adapter: Adapter, source_params: Params, target_params: Params, /, *, step: Step = None
    ) -> Metrics:
        """Returns scalars by name, such as the gates; `step` as in `ApplyFn`."""
        ...


@dataclass(frozen=True)
class RouteSummary:
    """One route of a transfer: its leaves and its cost.

    Attributes:
      target: paths of the target's leaves, joined with ` + `.
      source: paths of the source's leaves.
      shapes: of the target's leaves.
      target_matrix: shape of the target's matrix.
      source_matrix: shape of the source's matrix, with only the rows that the route uses.
      overlap: shape of the block that both matrices share; transfers that copy copy this block.
      view: the meaning of the tokens, and the number of matrices if there are several.
      rank: of the re-encoding; None for whole matrices.
      adapter: path of the route's parameters in the adapter; empty for none. Rows with the same path share parameters
        or have them stacked.
      parameters: number of adapter parameters of this route; 0 if a row above already counts them.
      flops: floating point operations of one pass of the adapter over this route, matrix products only.
      left_out: why leaves that match a route's patterns cannot be paired; empty for all others. Target or source may
        then be empty, and sizes are 0.
    """

    target: str
    source: str
    shapes: tuple[tuple[int, ...], ...]
    target_matrix: tuple[int, int]
    source_matrix: tuple[int, int]
    overlap: tuple[int, int]
    view: str
    rank: int | None
    adapter: str
    parameters: int
    flops: int
    left_out: str = ""


DescribeFn = Callable[[Params, Params], tuple[RouteSummary, ...]]
"""`(source_params, target_params) -> a summary of each route`, from shapes only."""

FitFn = Callable[[Mapping[str, jax.Array], Params, Params], Adapter]
"""`(moments, source_params, target_params) -> adapter`; see `aligned_transfer`."""


def _no_routes(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
    del source_params, target_params
    return ()


def _no_metrics(adapter: Adapter, source_params: Params, target_params: Params, *, step: Step = None) -> Metrics:
    del adapter, source_params, target_params, step
    return {}


@dataclass(frozen=True)
class Transfer:
    """A transfer of knowledge: pure functions over parameter pytrees, like an Optax optimizer.

    Every method, baseline and ablation is a factory that returns a `Transfer`. To make your own, call `Transfer(init,
    apply)`; its `apply` must accept both keywords, even if it ignores them.

    Attributes:
      init: `(key, source_params, target_params) -> adapter`; checks the transfer against both trees.
      apply: `(adapter, source_params, target_params, *, key=None, step=None) -> new target_params`. A key turns dropout
        on. The joint step passes its count as `step`, for schedules. Leaves without a route are returned as the same
        arrays.
      describe: `(source_params, target_params) -> (RouteSummary, ...)`: each route and its cost, then the leaves that
        cannot be paired, from shapes only; empty for a transfer without routes.
      monitor: `(adapter, source_params, target_params, *, step=None) -> scalars by name` to monitor during training,
        such as gates; empty for most transfers.
      fit: `(moments, source_params, target_params) -> adapter` in closed form, from the moments of the source's layer
        inputs; None for most transfers. See `aligned_transfer`.

    Raises:
      ValueError: an `apply` or a `monitor` that does not accept the step.
    """

    init: InitFn
    apply: ApplyFn
    describe: DescribeFn = _no_routes
    monitor: MonitorFn = _no_metrics
    fit: FitFn | None = None

    def __post_init__(self) -> None:  # noqa: D105
        for name, function, arguments in (("apply", self.apply, "key=None, step=None"),
                                          ("monitor", self.monitor, "step=None")):  # fmt: skip
            if not _takes(function, *re.findall(r"(\w+)=", arguments)):
                raise ValueError(
                    f"the transfer's {name} must take the step of training, and the keywords in "
                    f"def {name}(adapter, source_params, target_params, *, {arguments})"
                )

    def at(self, step: Step, /) -> "Transfer":
        """Returns the transfer at a step; kept from version 0.1, replaced by `apply(..., step=step)`."""
        warn_renamed("transfer.at(step).apply(...)", "transfer.apply(..., step=step)")
        apply, monitor = (functools.partial(function, step=step) for function in (self.apply, self.monitor))
        return replace(self, apply=apply, monitor=monitor)


def _takes(function: Any, *keywords: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # Functions not written in Python may have no signature.
        return callable(function)
    named = {one.name for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)}
    return named.issuperset(keywords) or any(one.kind is one.VAR_KEYWORD for one in parameters)


def check_transfer(name: str, value: Any) -> None:
    """Raises ValueError unless the value is a transfer."""
    if not isinstance(value, Transfer):
        raise ValueError(
            f"{name} must be a Transfer, made by a factory or as Transfer(init, apply), got {type(value).__name__}"
        )


def schedule_value(schedule: optax.ScalarOrSchedule, step: Step, noun: str) -> Any:
    """Returns a number unchanged, and a schedule's value at a step.

    Raises:
      ValueError: a schedule and no step; `noun` names the scheduled quantity.
    """
    if not callable(schedule):
        return schedule
    if step is None:
        raise ValueError(f"{noun} follows a schedule: pass the step, as in transfer.apply(..., step=step)")
    return schedule(step)


def identity_transfer() -> Transfer:
    """Returns the transfer that moves nothing: `T' = T`. The baseline "vanilla"; the adapter is empty."""
    return Transfer(_no_adapter, _unchanged)


def _no_adapter(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
    del key, source_params, target_params  # There is nothing to learn.
    return {}


def _unchanged(
    adapter: Adapter, source_params: Params, target_params: Params, *, key: Key = None, step: Step = None
) -> Params:
    del adapter, source_params, key, step  # Nothing moves.
    return target_params


def writes(transfer: Transfer) -> bool:
    """Returns whether a transfer may change the target: any but `identity_transfer()`."""
    return transfer.apply is not _unchanged
