"""The joint step: source, target and adapter train together, and parameters move from source to target.

It is one pure function, so it compiles once and the transfer is an ordinary differentiable part of it. Order and update
rules follow the published training loop of arXiv:2404.13322.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from merge_jax.checks import all_finite, check_arrays, check_choice, check_key, check_learnable
from merge_jax.objectives.device_axis import varying
from merge_jax.objectives.precision import at_least_float32
from merge_jax.paths import flatten, some_of
from merge_jax.training.nonfinite import select_update
from merge_jax.training.optimizers import adapter_adamw, holds_parameters, optimizer_update, warn_of_moments
from merge_jax.training.packing import pack
from merge_jax.training.schedule import TransferSteps
from merge_jax.transfers.base import Transfer, check_transfer, writes
from merge_jax.types import Adapter, Batch, LossFn, Metrics, ModelState, Params, TeacherFn

__all__ = [
    "AdapterState",
    "JointState",
    "JointStep",
    "Task",
    "TrainState",
    "UpdateRule",
    "adapter_metrics",
    "begin_step",
    "check_roles",
    "check_tasks",
    "init_joint_state",
    "learn",
    "learn_adapter",
    "make_joint_step",
    "metrics_by_role",
    "update_model",
]

UpdateRule = Literal["exact", "surrogate"]
"""Which cotangent the adapter learns from; see `make_joint_step`."""


class Task(NamedTuple):
    """A training task of one model: a loss function and an optimizer.

    Attributes:
      loss_fn: `(params, model_state, batch, key) -> (loss, (model_state, metrics))`.
      optimizer: an Optax optimizer of the model's parameters.
    """

    loss_fn: LossFn
    optimizer: optax.GradientTransformation


class TrainState(struct.PyTreeNode):
    """The training state of one model.

    Attributes:
      params: the model's parameters.
      model_state: the model's other collections, e.g. `{"batch_stats": ...}`.
      opt_state: the optimizer's state; None for a frozen source.
    """

    params: Params
    model_state: ModelState
    opt_state: Any


class AdapterState(struct.PyTreeNode):
    """The training state of the adapter: parameters and optimizer state."""

    params: Adapter
    opt_state: Any


class JointState(struct.PyTreeNode):
    """The complete state of a joint run, as saved in a checkpoint.

    Attributes:
      step: completed steps, an int32 scalar.
      key: the run's root key; step `i` draws from `fold_in(key, i)`, so resuming needs no other state.
      source: the source model.
      target: the target model.
      adapter: the parameters of the transfer.
    """

    step: jax.Array
    key: jax.Array
    source: TrainState
    target: TrainState
    adapter: AdapterState


JointStep = Callable[[JointState, Mapping[str, Batch]], tuple[JointState, Metrics]]
"""`(state, {"source": batch, "target": batch}) -> (state, metrics)`; pure, made to be jitted and donated."""


def init_joint_state(
    key: jax.Array,
    source: Task | None,
    target: Task,
    transfer: Transfer,
    *,
    source_params: Params,
    target_params: Params,
    source_state: ModelState = None,
    target_state: ModelState = None,
    adapter: Adapter | None = None,
    adapter_optimizer: optax.GradientTransformation | None = None,
) -> JointState:
    """Returns the state before the first step; `key` is consumed.

    The given arrays are copied, since the step may be jitted with its state donated.

    Args:
      key: the run's root random key.
      source: the source's task, or None if it is frozen.
      target: the target's task.
      transfer: the transfer between them; its `init` checks its routes against both trees.
      source_params: parameters of the source.
      target_params: parameters of the target.
      source_state: the source's model state; `{}` if not given.
      target_state: the target's model state; `{}` if not given.
      adapter: the initial adapter, such as one from `transfer.fit`; by default `transfer.init` creates it.
      adapter_optimizer: the same as in `make_joint_step`; `adapter_adamw()` if not given.

    Raises:
      ValueError: not a key, a task or a transfer, a trained leaf that is not a float array, or route errors from
        `transfer.init`.

    Warns:
      UserWarning: the target's optimizer stores a copy of the parameters, which a transfer does not update; one matrix
        appears at two paths of a trained model; or an optimizer's second moments have 16 bits.
    """
    check_key(key)
    check_tasks(source, target, transfer)
    check_learnable("target", target_params)
    (check_arrays if source is None else check_learnable)("source", source_params)
    check_arrays("source state", source_state)
    check_arrays("target state", target_state)
    if writes(transfer) and holds_parameters(target.optimizer, target_params):
        warnings.warn(
            "the target's optimizer stores its own copy of the parameters (as schedule-free ones, COCOB, DoG and "
            "Prodigy do): it may undo what a transfer writes, or diverge after it. Use another optimizer, or a residual"
            " transfer in make_reparameterised_step, which writes nothing",
            stacklevel=2,
        )
    adapter_optimizer = adapter_optimizer or adapter_adamw()
    adapter_key, step_key = jax.random.split(key)
    adapter_params: Adapter = (
        transfer.init(adapter_key, source_params, target_params) if adapter is None else jax.tree.map(_copy, adapter)
    )

    def train_state(task: Task | None, params: Params, model_state: ModelState) -> TrainState:
        params, model_state = jax.tree.map(_copy, (params, model_state or {}))
        # Copied too: some optimizers store the parameters themselves, or one array twice; neither can be donated.
        opt_state = jax.tree.map(_copy, task.optimizer.init(params)) if task else None
        return TrainState(params, model_state, opt_state)

    state = JointState(
        step=jnp.zeros((), jnp.int32),
        key=step_key,
        source=train_state(source, source_params, source_state),
        target=train_state(target, target_params, target_state),
        adapter=AdapterState(adapter_params, adapter_optimizer.init(adapter_params)),
    )
    warn_of_moments(state.source.opt_state, state.target.opt_state)
    return state


def _copy(leaf: Any) -> jax.Array:
    # Much faster than `jnp.array`, which compiles a program per shape. But it would share the memory of a NumPy array.
    return jax.device_put(leaf, may_alias=False) if isinstance(leaf, jax.Array) else jnp.array(leaf, copy=True)


def make_joint_step(
    source: Task | None,
    target: Task,
    transfer: Transfer,
    *,
    cycle: int | optax.Schedule = 4,
    stop: float = 1.0,
    num_steps: int | None = None,
    update: UpdateRule = "exact",
    teacher: TeacherFn | None = None,
    adapter_optimizer: optax.GradientTransformation | None = None,
    axis_name: str | None = None,
    largest_growth: float = 1e3,
) -> JointStep:
    """Returns one step of joint training as a pure function of the state and both batches.

    At step `i`, with `T` and `S` the current parameters of target and source:

    1. If the step transfers, `i % cycle == 0` and `i < stop * num_steps`, `T' = transfer(adapter, S, T)`. Otherwise
       `T' = T` (self-learning). `TransferSteps(cycle, stop, num_steps)` defines these steps.
    2. The source takes a gradient step on its batch, unless it is frozen.
    3. The target takes one on its batch from `T'`. The transfer does not change its optimizer state.
    4. If step 1 transferred, the adapter takes one along `(d T' / d adapter)^T c`, where the cotangent `c` is

       - `exact`: `dL_target / dT'`, the true gradient of the target's loss through the transfer (our choice;
         one backward pass of the target serves both);
       - `surrogate`: `T' - T_after_step_3`, as published and as in hypernetwork training. It pulls the output toward
         the target's updated parameters.

    Numeric faults are contained (our choice):

    - If the loss, the gradient or the update of a model is not finite, the model keeps its parameters, model state and
      optimizer state bit for bit. A transfer written at this step is undone.
    - If the result of a transfer is not finite, or `|T'| > largest_growth * max(|T|, |S|)`, it is rejected, and the
      target learns from `T`.
    - The adapter is updated only if the transfer was written and the target was updated.

    Metrics are a flat dict of scalars. Those of the adapter are 0 at a step that does not transfer:

    - `source/...` and `target/...`: the loss, and the metrics of each loss function;
    - `source/skipped`, `target/skipped`, `adapter/skipped`: 1 if an update was skipped, else 0;
    - `adapter/transferred`, `adapter/rejected`: 1 if `T'` was written and kept, or was rejected, else 0;
    - `adapter/change`: `|T' - T| / |T|`, or `|T'|` if `T` is 0;
    - `adapter/norm`, `adapter/norm_before`, `adapter/gradient_norm`: `|T'|`, `|T|`, and the norm before clipping;
    - the transfer's `monitor` values: `adapter/gate/<target path>` of learned gates, `adapter/gate` and
      `adapter/weight` of schedules.

    Args:
      source: the source's task; None freezes the source, and its batch is not needed.
      target: the target's task.
      transfer: the transfer.
      cycle: steps from one transfer to the next, 1 or more, or a schedule of it by the step; see `TransferSteps`.
      stop: the fraction of `num_steps` after which only self-learning continues; 0 means no transfer. A transfer that
        shares (`share_transfer`, the output `warm`) overwrites the target's learned overlap, so stop it early.
      num_steps: the length of the run in steps; required if `0 < stop < 1` or the cycle is a schedule.
      update: `exact` or `surrogate`.
      teacher: adds the source's outputs to the target's batch before the target's loss, for distillation; it uses the
        source after step 2.
      adapter_optimizer: the adapter's optimizer; `adapter_adamw()` if not given.
      largest_growth: the maximum ratio of the merged parameters' norm to the larger of the target's and the source's.
      axis_name: the axis of a `pmap` or `shard_map` that splits the batch: gradients, losses, metrics and model states
        are averaged over it, and each device draws its own dropout masks. Losses that compare examples with each other
        need its name too (`feature_agreement`, `retrieval_loss`). None under `jit`.

    Raises:
      ValueError: as `TransferSteps`, or an unknown update rule. While tracing: batches without one of the roles, a
        state made for a frozen source although this one has a task, an optimizer that needs more than values and
        gradients, or under `axis_name` an integer model state, which cannot be averaged.
    """
    check_tasks(source, target, transfer)
    transfer_steps = TransferSteps(cycle, stop, num_steps)
    check_choice("update rule", update, get_args(UpdateRule))
    if not largest_growth > 0:
        raise ValueError(f"largest_growth must be above 0, got {largest_growth}")
    adapter_optimizer = adapter_optimizer or adapter_adamw()

    def step(state: JointState, batches: Mapping[str, Batch]) -> tuple[JointState, Metrics]:
        new_source, source_metrics, target_batch, target_key, transfer_key = begin_step(
            source, teacher, state, batches, axis_name
        )

        def transfer_and_learn() -> tuple[TrainState, AdapterState, Metrics, Metrics]:
            def apply(adapter: Adapter) -> Params:
                # Source and target before this step: new_source is not used here.
                source_params, target_params = state.source.params, state.target.params
                return transfer.apply(adapter, source_params, target_params, key=transfer_key, step=state.step)

            merged, pullback = jax.vjp(apply, state.adapter.params)
            own = state.target.params
            largest = largest_growth * jnp.maximum(_norm(own), _norm(state.source.params))
            accepted = all_finite(pack(merged)) & (_norm(merged) <= largest)
            written = select_update(accepted, merged, own)
            new_target, grads, metrics = learn(target, state.target, written, target_batch, target_key, axis_name)
            cotangent = grads if update == "exact" else optax.tree.sub(written, new_target.params)
            (adapter_grads,) = pullback(cotangent)
            useful = accepted & (metrics["skipped"] == 0)
            new_adapter, skipped = learn_adapter(adapter_optimizer, state.adapter, adapter_grads, useful)
            adapter_values = adapter_metrics(own, merged, adapter_grads, transferred=useful, rejected=~accepted)
            return new_target, new_adapter, metrics, {**adapter_values, "skipped": skipped}

        def learn_alone() -> tuple[TrainState, AdapterState, Metrics, Metrics]:
            new_target, _, metrics = learn(
                target, state.target, state.target.params, target_batch, target_key, axis_name
            )
            zero = jnp.zeros((), jnp.float32)
            return new_target, state.adapter, metrics, dict.fromkeys((*_ADAPTER_METRICS, "skipped"), zero)

        if transfer_steps.never:
            outcome = learn_alone()
        elif transfer_steps.always:
            outcome = transfer_and_learn()
        else:
            # The target's step is in both branches, so the adapter's residuals exist in only one: steps without a
            # transfer pay nothing for it, and no forward pass of the adapter runs twice.
            outcome = lax.cond(transfer_steps.includes(state.step), transfer_and_learn, learn_alone)
        new_target, new_adapter, target_metrics, adapter_values = outcome
        # The gates that this step used, not the updated ones.
        gates = transfer.monitor(state.adapter.params, state.source.params, state.target.params, step=state.step)

        new_state = state.replace(step=state.step + 1, source=new_source, target=new_target, adapter=new_adapter)
        return new_state, metrics_by_role(source_metrics, target_metrics, {**adapter_values, **gates})

    return step


def check_tasks(source: Task | None, target: Task, transfer: Transfer) -> None:
    """Raises ValueError unless the tasks are tasks and the transfer is a transfer."""
    for role, task in (("source", source), ("target", target)):
        if task is None and role == "source":
            continue
        if not callable(getattr(task, "loss_fn", None)) or not hasattr(getattr(task, "optimizer", None), "update"):
            raise ValueError(f"the {role} must be a Task(loss function, Optax optimizer), got {task!r}")
    check_transfer("the transfer", transfer)


def learn(
    task: Task, state: TrainState, params: Params, batch: Batch, key: jax.Array, axis_name: str | None = None
) -> tuple[TrainState, Params, Metrics]:
    """Takes one gradient step of a task from `params`; returns the new state, the gradient, and the metrics.

    If the loss, the gradient or the update is not finite, the new state is the old one, and the metric `skipped` is 1.
    """
    if axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
        _check_averages(state.model_state)

    def loss_fn(params: Params) -> tuple[jax.Array, tuple[ModelState, Metrics]]:
        return task.loss_fn(params, state.model_state, batch, key)

    def value_fn(params: Params) -> jax.Array:
        if axis_name is None:
            return loss_fn(params)[0]
        # Of the whole batch, and differentiable: otherwise each device would run a separate line search.
        return lax.pmean(loss_fn(lax.pmean(params, axis_name))[0], axis_name)

    outcome = jax.value_and_grad(loss_fn, has_aux=True)(varying(params, axis_name))
    if axis_name is not None:
        outcome = lax.pmean(outcome, axis_name)
    (loss, (model_state, metrics)), grads = outcome
    new_state, metrics = update_model(task, state, params, grads, loss, model_state, metrics, value_fn)
    return new_state, grads, metrics


def update_model(
    task: Task,
    state: TrainState,
    params: Params,
    grads: Params,
    loss: jax.Array,
    model_state: ModelState,
    metrics: Metrics,
    value_fn: Callable[[Params], jax.Array],
) -> tuple[TrainState, Metrics]:
    """Moves `params` along their gradient; returns the new state and the metrics with `loss` and `skipped`.

    If the loss, the gradient or the update is not finite, the new state is the old one. `model_state` and `metrics` are
    the loss function's auxiliary outputs; `value_fn` computes the loss of parameters, for a line search.
    """
    updates, opt_state = optimizer_update(task.optimizer, grads, state.opt_state, params, loss, value_fn)
    # Check the gradient, since an optimizer may turn an infinite one into a finite update, as by its sign; check the
    # update, since a finite gradient may yield NaN.
    ok = all_finite(loss, pack(grads), pack(updates))
    new_state = select_update(ok, TrainState(optax.apply_updates(params, updates), model_state, opt_state), state)
    return new_state, {"loss": loss, "skipped": jnp.float32(~ok), **metrics}


def _check_averages(model_state: ModelState) -> None:
    whole = [path for path, leaf in flatten(model_state).items() if not jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if whole:
        raise ValueError(
            f"the model state has numbers in {some_of(whole, 3)} that are no floats, and devices of one axis_name "
            "average their states: train by jit with a batch that is split over the devices (jit_layout)"
        )


def learn_adapter(
    optimizer: optax.GradientTransformation, state: AdapterState, grads: Adapter, useful: jax.Array
) -> tuple[AdapterState, jax.Array]:
    """Takes one gradient step of the adapter if it is useful and finite; returns whether it skipped."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    ok = useful & all_finite(pack(grads), pack(updates))
    return select_update(ok, AdapterState(optax.apply_updates(state.params, updates), opt_state), state), jnp.float32(
        ~ok
    )


def begin_step(
    source: Task | None,
    teacher: TeacherFn | None,
    state: JointState,
    batches: Mapping[str, Batch],
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics, Batch, jax.Array, jax.Array]:
    """Checks the roles and trains the source; every kind of joint step begins with this.

    Returns the new source (the old if it is frozen), its metrics, the target's batch annotated by the teacher, and the
    keys of the target and of the transfer.
    """
    check_roles(source, state, batches)
    source_key, target_key, transfer_key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    new_source, metrics = state.source, {}
    if source is not None:
        new_source, _, metrics = learn(
            source, state.source, state.source.params, batches["source"], source_key, axis_name
        )
    target_batch = batches["target"]
    if teacher is not None:
        target_batch = teacher(new_source.params, new_source.model_state, target_batch)
    return new_source, metrics, target_batch, target_key, transfer_key


def check_roles(source: Task | None, state: JointState, batches: Mapping[str, Batch]) -> None:
    """Raises ValueError for batches without a trained role, or a state made for another kind of source."""
    for role in ("target",) if source is None else ("source", "target"):
        if role not in batches:
            raise ValueError(f"batches must hold one for {role!r}, got {sorted(batches)}")
    if (source is None) != (state.source.opt_state is None):
        frozen, tasked = ("step", "state") if source is None else ("state", "step")
        raise ValueError(f"the {frozen} was made with a frozen source (None), the {tasked} with a task for it")


def metrics_by_role(source: Metrics, target: Metrics, adapter: Metrics) -> Metrics:
    """Returns all metrics, each name prefixed with its role."""
    roles = {"source": source, "target": target, "adapter": adapter}
    return {f"{role}/{name}": value for role, metrics in roles.items() for name, value in metrics.items()}


_ADAPTER_METRICS = ("transferred", "rejected", "change", "norm", "norm_before", "gradient_norm")


def adapter_metrics(
    old: Params, merged: Params, adapter_grads: Adapter, *, transferred: jax.Array, rejected: jax.Array
) -> Metrics:
    """Returns the adapter's metrics at a transfer step, float32 scalars."""
    norm_before = _norm(old)
    change = _norm(optax.tree.sub(merged, old)) / jnp.where(norm_before > 0, norm_before, 1)
    values = (transferred, rejected, change, _norm(merged), norm_before, _norm(adapter_grads))
    return {name: jnp.float32(value) for name, value in zip(_ADAPTER_METRICS, values, strict=True)}


def _norm(tree: Any) -> jax.Array:
    """Returns the norm of all float leaves, in float32: a frozen source may have other leaves too."""
    leaves = [leaf for leaf in jax.tree.leaves(pack(tree)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return optax.tree.norm(list(map(at_least_float32, leaves)))
