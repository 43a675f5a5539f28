"""The types of the interface, in one place.

Roles are names throughout: the **source** model gives knowledge, the **target** model receives it, and the
**adapter** holds the parameters of the transfer between them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

__all__ = [
    "Adapter",
    "Batch",
    "LossFn",
    "Metrics",
    "ModelApply",
    "ModelState",
    "Params",
    "TeacherFn",
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
