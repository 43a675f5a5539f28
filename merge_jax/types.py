"""The types of the interface, in one place.

Names state the role throughout: the **source** model provides knowledge, the **target** model receives it, and
the **adapter** holds the parameters of the transfer between them.
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
"""A pytree of float arrays: the trainable parameters of one model, as in `model.init(...)["params"]`."""

ModelState = Any
"""A pytree of a model's arrays that no gradient updates, e.g. `{"batch_stats": ...}`; `{}` for none."""

Adapter = Any
"""A pytree of float arrays: the trainable parameters of a `Transfer`; `{}` if it has none."""

Batch = Any
"""A pytree of arrays with the examples on the leading axis, e.g. `{"image": [B, H, W, C], "label": [B]}`."""

Metrics = Mapping[str, jax.Array]
"""Scalars by name. The joint step prefixes each name with its role: `source/loss`, `target/accuracy`."""


ModelApply = Callable[..., Any]
"""`model.apply` of a Linen module called as `(inputs, train=...)`."""


class LossFn(Protocol):
    """A model's differentiable loss on one batch, as the joint step needs it."""

    def __call__(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array, /
    ) -> tuple[jax.Array, tuple[ModelState, Metrics]]:
        """Returns the scalar loss, the model state after the batch, and scalar metrics; `key` is consumed."""
        ...


class TeacherFn(Protocol):
    """Adds the source's outputs to the target's batch, so that the target can learn from them (distillation)."""

    def __call__(self, params: Params, model_state: ModelState, batch: Batch, /) -> Batch:
        """Returns the target's batch with the source's outputs added; `params` are the source's."""
        ...
