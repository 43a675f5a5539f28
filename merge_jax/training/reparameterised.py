"""Reparameterised training: the transfer stands inside the target's forward pass at every step."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from merge_jax.training.joint import (
    JointState,
    JointStep,
    Task,
    TrainState,
    adapter_metrics,
    begin_step,
    check_tasks,
    learn_adapter,
    metrics_by_role,
)
from merge_jax.training.nonfinite import all_finite, keep_unless
from merge_jax.training.optimizers import adapter_adamw, optimizer_update
from merge_jax.training.packing import pack
from merge_jax.transfers.base import Transfer
from merge_jax.types import Adapter, Batch, Metrics, Params, TeacherFn

__all__ = ["bake", "make_reparameterised_step"]


def make_reparameterised_step(
    source: Task | None,
    target: Task,
    transfer: Transfer,
    *,
    teacher: TeacherFn | None = None,
    adapter_optimizer: optax.GradientTransformation | None = None,
) -> JointStep:
    """Returns a joint step that trains the target through the transfer, which is never written into it.

    The target is `T' = transfer(adapter, S, T)`; its loss is `L(T')`, and one backward pass gives the gradients of
    `T` and of the adapter, both of which take a step. The source takes one on its own loss, and gets no gradient
    from the target's. In the state, `state.target.params` is `T`: evaluate and keep `bake(transfer, state)`.
    Beyond arXiv:2404.13322, whose transfers are written at every `cycle`-th step. A state of `init_joint_state`
    serves both kinds of step.

    Where the loss, the gradient or the update of the target is not finite, target and adapter stay as they were, as in
    `make_joint_step`. Metrics are those of `make_joint_step`; `adapter/transferred` is 1 where the target learned.

    Args:
      source: the source's task; None freezes the source, and its batch is not needed.
      target: the target's task; its optimizer moves `T`.
      transfer: the transfer.
      teacher: as in `make_joint_step`.
      adapter_optimizer: the adapter's optimizer; `adapter_adamw()` if not given.

    Raises:
      ValueError: for what is no task or no transfer; while tracing, as `make_joint_step`.
    """
    check_tasks(source, target, transfer)
    adapter_optimizer = adapter_optimizer or adapter_adamw()

    def step(state: JointState, batches: Mapping[str, Batch]) -> tuple[JointState, Metrics]:
        new_source, source_metrics, target_batch, target_key, transfer_key = begin_step(source, teacher, state, batches)

        def loss(adapter: Adapter, params: Params) -> tuple[jax.Array, tuple[Params, Params, Metrics]]:
            merged = transfer.apply(adapter, state.source.params, params, key=transfer_key, step=state.step)
            loss, (model_state, metrics) = target.loss_fn(merged, state.target.model_state, target_batch, target_key)
            return loss, (merged, model_state, {"loss": loss, **metrics})

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (adapter_grads, grads), (merged, model_state, metrics) = gradient(state.adapter.params, state.target.params)
        updates, opt_state = optimizer_update(
            target.optimizer,
            grads,
            state.target.opt_state,
            state.target.params,
            metrics["loss"],
            lambda params: loss(state.adapter.params, params)[0],
        )
        ok = all_finite(metrics["loss"], pack(grads), pack(updates))
        new_target = TrainState(optax.apply_updates(state.target.params, updates), model_state, opt_state)
        new_target = keep_unless(ok, new_target, state.target)
        new_adapter, skipped = learn_adapter(adapter_optimizer, state.adapter, adapter_grads, ok)
        of_adapter = adapter_metrics(
            state.target.params, merged, adapter_grads, transferred=ok, rejected=jnp.array(False)
        )
        metrics["skipped"] = jnp.asarray(~ok, jnp.float32)
        gates = transfer.monitor(state.adapter.params, state.source.params, state.target.params, step=state.step)
        new_state = state.replace(step=state.step + 1, source=new_source, target=new_target, adapter=new_adapter)
        return new_state, metrics_by_role(source_metrics, metrics, {**of_adapter, "skipped": skipped, **gates})

    return step


def bake(transfer: Transfer, state: JointState) -> Params:
    """Returns the target's parameters with the transfer applied, without dropout: plain parameters of the target.

    `T' = transfer(adapter, S, T)` of a state that a reparameterised step has trained; the adapter and the source
    are needed no more.
    """
    return transfer.apply(state.adapter.params, state.source.params, state.target.params, step=state.step)
