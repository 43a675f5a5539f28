"""The types of the interface, in one place.

Roles are names throughout: the **source** model gives knowledge, the **target** model receives it, and the
**adapter** holds the parameters of the transfer between them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

__all__ = [
    "Adapter",
    "ApplyFn",
    "Batch",
    "InitFn",
    "LossFn",
    "Metrics",
    "ModelApply",
    "ModelState",
    "Params",
    "RouteSummary",
    "TeacherFn",
    "Transfer",
]

# JAX has no static type for a pytree, so each name below says which pytree is meant.

Params = Any
"""A pytree of float arrays: the trainable parameters of one model, as `model.init(...)["params"]` gives."""

ModelState = Any
"""A pytree of arrays that a model keeps but no gradient changes, e.g. `{"batch_stats": ...}`; `{}` for none."""

Adapter = Any
"""A pytree of float arrays: the trainable parameters of a `Transfer`; `{}` for a transfer without any."""

Batch = Any
"""A pytree of arrays with the examples on the leading axis, e.g. `{"image": [B, H, W, C], "label": [B]}`."""

Metrics = Mapping[str, jax.Array]
"""Scalars by name. The joint step prefixes each name with its role: `source/loss`, `target/accuracy`."""


ModelApply = Callable[..., Any]
"""`model.apply` of a Linen module whose `__call__` takes `(inputs, train=...)`."""


class LossFn(Protocol):
    """What the joint step asks of a model: a differentiable loss of its parameters on one batch."""

    def __call__(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array, /
    ) -> tuple[jax.Array, tuple[ModelState, Metrics]]:
        """Returns the scalar loss, the model state after the batch, and scalar metrics; `key` is consumed."""
        ...


class TeacherFn(Protocol):
    """What lets the target learn from the source's outputs (distillation): it annotates the target's batch."""

    def __call__(self, params: Params, model_state: ModelState, batch: Batch, /) -> Batch:
        """Returns the target's batch with the source's outputs on it added; `params` are the source's."""
        ...


class InitFn(Protocol):
    """Makes the adapter of a transfer."""

    def __call__(self, key: jax.Array, source_params: Params, target_params: Params, /) -> Adapter:
        """Checks the transfer against both trees and returns the adapter's parameters; `key` is consumed."""
        ...


class ApplyFn(Protocol):
    """Maps both parameter trees to a new target tree."""

    def __call__(
        self,
        adapter: Adapter,
        source_params: Params,
        target_params: Params,
        /,
        *,
        key: jax.Array | None = None,
    ) -> Params:
        """Returns a target tree of the same structure, shapes and dtypes; a `key` turns dropout on."""
        ...


@dataclass(frozen=True)
class RouteSummary:
    """What one route of a transfer is and costs.

    Attributes:
      target: paths of the target's leaves, joined with ` + `.
      source: paths of the source's leaves.
      shapes: of the target's leaves.
      target_matrix: shape of the target's matrix.
      source_matrix: shape of the source's matrix, of the rows that the route takes of it.
      overlap: shape of the block that both matrices have; what is copied where a transfer copies.
      view: what the tokens are, and how many matrices there are where it is not one.
      rank: of the re-encoding; None for whole matrices.
      core: whether it is from both sides.
      adapter: path of the route's parameters in the adapter, shared or stacked with those of other routes where
        several rows have the same; empty for none.
      parameters: number of adapter parameters of this route; 0 where a row above has them already.
      flops: floating point operations of one pass of the adapter over this route, matrix products alone.
      left_out: why the leaves take no part, where a route's patterns name them and they cannot be paired; empty for all
        others. One of target and source may then be empty, and sizes are 0.
    """

    target: str
    source: str
    shapes: tuple[tuple[int, ...], ...]
    target_matrix: tuple[int, int]
    source_matrix: tuple[int, int]
    overlap: tuple[int, int]
    view: str
    rank: int | None
    core: bool
    adapter: str
    parameters: int
    flops: int
    left_out: str = ""


class Transfer(NamedTuple):
    """A transfer of knowledge as a pair of pure functions over parameter pytrees, as an Optax optimizer is.

    Every method, baseline and ablation is one factory that returns this pair. Leaves that take no part come
    back from `apply` as the same arrays.
    """

    init: InitFn
    apply: ApplyFn

    def at(self, step: jax.Array | int, /) -> "Transfer":
        """Returns the transfer as it is at a step of training; itself, unless it follows a schedule."""
        del step
        return self

    def describe(self, source_params: Params, target_params: Params, /) -> tuple[RouteSummary, ...]:
        """Returns what each route is and costs, then what cannot be paired, from shapes alone; nothing without any."""
        del source_params, target_params
        return ()

    def monitor(self, adapter: Adapter, source_params: Params, target_params: Params, /) -> Metrics:
        """Returns scalars worth following while the adapter learns, such as its gates; nothing for most transfers."""
        del adapter, source_params, target_params
        return {}
