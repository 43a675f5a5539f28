"""Reparameterised training: the transfer is part of the target's forward pass at every step."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from merge_jax.training.joint import (
    JointState,
    JointStep,
    Task,
    adapter_metrics,
    begin_step,
    check_tasks,
    learn_adapter,
    metrics_by_role,
    update_model,
)
from merge_jax.training.optimizers import adapter_adamw
from merge_jax.transfers.base import Transfer
from merge_jax.types import Adapter, Batch, Metrics, ModelState, Params, TeacherFn

__all__ = ["bake", "make_reparameterised_step"]


def make_reparameterised_step(
    source: Task | None,
    target: Task,
    transfer: Transfer,
    *,
    teacher: TeacherFn | None = None,
    adapter_optimizer: optax.GradientTransformation | None = None,
) -> JointStep:
    """Returns a joint step that trains the target through the transfer without writing it.

    The target is `T' = transfer(adapter, S, T)`; its loss is `L(T')`, and one backward pass computes the gradients of
    `T` and of the adapter, and both take a step. The source takes one on its own loss, and receives no gradient of the
    target's. `state.target.params` is `T`: evaluate and keep `bake(transfer, state)`. This extends arXiv:2404.13322,
    whose transfers are written at every `cycle`-th step. A state of `init_joint_state` works for both kinds of step.

    If the loss, the gradient or the update of the target is not finite, target and adapter do not change, as in
    `make_joint_step`. Metrics are those of `make_joint_step`; `adapter/transferred` is 1 if the target was updated.

    Args:
      source: the source's task; None freezes the source, and its batch is not needed.
      target: the target's task; its optimizer updates `T`.
      transfer: the transfer.
      teacher: as in `make_joint_step`.
      adapter_optimizer: the adapter's optimizer; `adapter_adamw()` if not given.

    Raises:
      ValueError: not a task or a transfer; while tracing, as in `make_joint_step`.
    """
    check_tasks(source, target, transfer)
    adapter_optimizer = adapter_optimizer or adapter_adamw()

    def step(state: JointState, batches: Mapping[str, Batch]) -> tuple[JointState, Metrics]:
        new_source, source_metrics, target_batch, target_key, transfer_key = begin_step(source, teacher, state, batches)

        own = state.target.params

        def loss_fn(adapter: Adapter, params: Params) -> tuple[jax.Array, tuple[Params, ModelState, Metrics]]:
            merged = transfer.apply(adapter, state.source.params, params, key=transfer_key, step=state.step)
            loss, (model_state, metrics) = target.loss_fn(merged, state.target.model_state, target_batch, target_key)
            return loss, (merged, model_state, metrics)

        def value_fn(params: Params) -> jax.Array:
            return loss_fn(state.adapter.params, params)[0]

        gradient = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, (merged, model_state, metrics)), (adapter_grads, grads) = gradient(state.adapter.params, own)
        new_target, metrics = update_model(target, state.target, own, grads, loss, model_state, metrics, value_fn)
        ok = metrics["skipped"] == 0
        new_adapter, skipped = learn_adapter(adapter_optimizer, state.adapter, adapter_grads, ok)
        adapter_values = adapter_metrics(own, merged, adapter_grads, transferred=ok, rejected=jnp.array(False))
        gates = transfer.monitor(state.adapter.params, state.source.params, own, step=state.step)
        new_state = state.replace(step=state.step + 1, source=new_source, target=new_target, adapter=new_adapter)
        return new_state, metrics_by_role(source_metrics, metrics, {**adapter_values, "skipped": skipped, **gates})

    return step


def bake(transfer: Transfer, state: JointState) -> Params:
    """Returns the target's parameters with the transfer applied, without dropout: plain parameters of the target.

    `T' = transfer(adapter, S, T)` for a state trained by a reparameterised step. Adapter and source are then no longer
    needed.
    """
    return transfer.apply(state.adapter.params, state.source.params, state.target.params, step=state.step)
