"""Loss functions of Linen models, and their sums."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from merge_jax.checks import check_entries, name_missing_collections
from merge_jax.types import Batch, LossFn, Metrics, ModelApply, ModelState, Params

__all__ = ["model_loss", "sum_losses"]


def model_loss(
    apply_fn: ModelApply,
    inputs: Sequence[str],
    per_example: Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]],
    *,
    needs: Sequence[str] = (),
    hint: str = "",
) -> LossFn:
    """Returns the loss function of a Linen model: the mean over the batch of the losses of its outputs.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(*inputs, train=True)`; its collections (BatchNorm
        statistics) are updated, and dropout draws from the step's key.
      inputs: names of the batch entries that are the model's inputs, in order.
      per_example: `(outputs, batch) -> (losses [B], metrics)`.
      needs: names of the other entries that `per_example` reads.
      hint: the end of the error message for a missing input.

    Raises:
      ValueError: while tracing, for a batch that lacks an entry, or a model state that lacks a collection.
    """

    def loss_fn(
        params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, dict[str, jax.Array]]]:
        check_entries(batch, *inputs, hint=hint)
        check_entries(batch, *needs)
        with name_missing_collections(model_state, "target"):
            outputs, new_state = apply_fn(
                {"params": params, **model_state},
                *(batch[name] for name in inputs),
                train=True,
                mutable=list(model_state),
                rngs={"dropout": key},
            )
        losses, metrics = per_example(outputs, batch)
        return losses.mean(), (new_state, metrics)

    return loss_fn


def sum_losses(task_loss: LossFn, *terms: LossFn) -> LossFn:
    """Returns the loss function `L + sum_i L_i` of a task and additional terms, with the metrics of all.

    Each term receives the same parameters, model state, batch and key, so dropout draws the same masks in all. The new
    model state is the task's; of metrics with one name, the first is kept. If a term runs the model on the task's
    inputs, as `feature_agreement` may, XLA can share the forward pass, but not the backward pass.
    """

    def loss_fn(
        params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Metrics]]:
        total, (new_state, metrics) = task_loss(params, model_state, batch, key)
        for term in terms:
            loss, (_, more) = term(params, model_state, batch, key)
            total, metrics = total + loss, {**more, **metrics}
        return total, (new_state, metrics)

    return loss_fn
