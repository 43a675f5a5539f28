"""A start without labels: trains the target's features toward the source's before the task begins."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from merge_jax.checks import (
    all_finite,
    check_above_zero,
    check_apply,
    check_key,
    check_learnable,
    error_context,
    name_misfit,
    name_missing_collections,
)
from merge_jax.objectives.features import CompareOn, FeatureObjective, disagreement, with_features
from merge_jax.objectives.precision import at_least_float32
from merge_jax.paths import flatten, some_of
from merge_jax.training.nonfinite import NumericFaultError
from merge_jax.training.packing import packed
from merge_jax.training.running_statistics import bind_axis, check_inputs, check_variables, evenly_split
from merge_jax.transfers.base import Transfer, check_transfer
from merge_jax.types import Adapter, ModelApply, Params

__all__ = ["prepare"]

_READ_AT_ONCE = 512


class _Plan(NamedTuple):
    """The static arguments of a compiled `prepare`, besides shapes."""

    source_apply: ModelApply
    target_apply: ModelApply
    source_layers: tuple[str, ...]
    target_layers: tuple[str, ...]
    objective: FeatureObjective
    compare_on: CompareOn | None
    transfer: Transfer | None
    steps: int
    batch_size: int
    axis_name: str | None


def prepare(
    key: jax.Array,
    layers: Mapping[str, str] | Iterable[tuple[str, str]],
    source_apply: ModelApply,
    target_apply: ModelApply,
    source_variables: Mapping[str, Any],
    target_variables: Mapping[str, Any],
    *inputs: Any,
    steps: int = 100,
    batch_size: int = 50,
    learning_rate: float = 1e-2,
    objective: FeatureObjective = disagreement,
    compare_on: CompareOn | None = None,
    transfer: Transfer | None = None,
    axis_name: str | None = None,
) -> dict[str, Any]:
    """Returns the target's variables after training toward the source's features on unlabelled inputs.

    Solves `min_T D(F(T, x), G(x))`, where `F` and `G` are features `[B, ...]` of the layers of target and source, and
    `D` is the objective of `feature_agreement`, the mean of `1 - cka`. Each step is an Adam step on a batch drawn
    without replacement; the rate follows a cosine to 0. The target is in training mode, so its statistics change too;
    the source is in evaluation mode. The models may differ in everything but their inputs. The source's features are
    computed once for all inputs and kept on the device, unless all batches together have fewer examples or `compare_on`
    changes them. Our choice, like `feature_agreement`.

    With a `transfer`, only its adapter is trained, in the target's forward pass, and the target's parameters stay
    fixed. After the last step, the transfer is applied once: `T' = transfer(adapter, S, T)`. With the same objective
    and number of steps, this compares training an adapter with training the target itself.

    It compiles once per models, layers, options and shapes, so all seeds and learning rates share a program. It can be
    used under `jit`.

    Args:
      key: for batches, dropout and the adapter; consumed.
      layers: `{target's layer: source's layer}`, or a sequence of such pairs; paths of submodules, as in
        `with_features`.
      source_apply: `model.apply` of a Linen module called as `(*inputs, train=...)`.
      target_apply: that of the target.
      source_variables: `{"params": ..., **model_state}`.
      target_variables: those of the target.
      inputs: `[N, ...]`, the inputs of both models, in order.
      steps: number of steps.
      batch_size: examples per batch; all of them if there are fewer.
      learning_rate: learning rate of the first step.
      objective: `disagreement`, or a function with the same signature, such as
        `merge_jax.objectives.redundancy_suppression`.
      compare_on: changes each batch of inputs before both models see it, such as `merge_jax.objectives.mixed`; None for
        no change.
      transfer: trained instead of the target's own parameters.
      axis_name: the axis that the models' BatchNorm averages over under `pmap`, if any; here each batch is whole.

    Raises:
      ValueError: not a key, fewer than two inputs, inputs with different numbers of examples, no layers or an unknown
        one, variables without `params`, parameters in float16, a module instead of its `apply`, or a transfer that
        does not fit.
      NumericFaultError: the loss or the result is not finite (not checked under `jit`).
    """
    pairs = tuple(layers.items() if isinstance(layers, Mapping) else layers)
    if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"layers must be one or more pairs {{target's layer: source's layer}}, got {layers!r}")
    check_key(key)
    if not isinstance(learning_rate, Tracer):
        check_above_zero(learning_rate=learning_rate)
    check_apply(source_apply=source_apply, target_apply=target_apply)
    size = check_inputs(inputs, steps=steps, batch_size=batch_size)
    if size < 2:
        raise ValueError("features of two examples at least are compared, got 1")
    for role, variables in (("source", source_variables), ("target", target_variables)):
        check_variables(f"{role}_variables", variables)
    if transfer is not None:
        check_transfer("the transfer", transfer)
    check_learnable("target", target_variables["params"])
    halves = [path for path, leaf in flatten(target_variables["params"]).items() if leaf.dtype == jnp.float16]
    if halves and transfer is None:
        raise ValueError(
            f"the target's parameters are float16 ({some_of(halves, 3)}), where Adam's updates are not finite: give"
            " them in float32 or bfloat16"
        )
    target_layers, source_layers = zip(*pairs, strict=True)
    plan = _Plan(
        source_apply,
        target_apply,
        source_layers,
        target_layers,
        objective,
        compare_on,
        transfer,
        steps,
        min(batch_size, size),
        axis_name,
    )
    adapter_key, key = jax.random.split(key)
    learned: Params | Adapter = target_variables["params"]
    if transfer is not None:
        learned = transfer.init(adapter_key, source_variables["params"], learned)
    source_variables, target_variables = dict(source_variables), dict(target_variables)
    inputs = tuple(map(jnp.asarray, inputs))
    shown = None
    if compare_on is None and size <= steps * plan.batch_size:
        read = functools.partial(_source_features, source_apply, source_layers, source_variables)
        parts = [read(tuple(one[part] for one in inputs)) for part in evenly_split(size, _READ_AT_ONCE)]
        shown = jax.tree.map(lambda *features: jnp.concatenate(features), *parts)
    prepared, losses = _learn(plan, key, learning_rate, learned, source_variables, target_variables, inputs, shown)
    if not isinstance(losses, Tracer) and not all_finite(losses, prepared):
        hint = f"a learning_rate below {float(learning_rate):.3g} may help"
        for place, one in enumerate(inputs):
            if not all_finite(one):
                hint = f"input {place} has values that are not finite"
        raise NumericFaultError(
            f"the target's features came to no finite loss or parameters in {steps} steps (losses {losses[0]:.3g} to "
            f"{losses[-1]:.3g}): {hint}"
        )
    return prepared


@functools.partial(jax.jit, static_argnums=(0, 1))
def _source_features(
    apply: ModelApply, layers: tuple[str, ...], variables: dict[str, Any], inputs: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    with error_context("the source"), name_missing_collections(variables), name_misfit(inputs):
        return with_features(apply, layers)(variables, *inputs, train=False)[1]


@functools.partial(jax.jit, static_argnums=0)
def _learn(
    plan: _Plan,
    key: jax.Array,
    learning_rate: Any,
    start: Params | Adapter,
    source_variables: dict[str, Any],
    target_variables: dict[str, Any],
    inputs: tuple[jax.Array, ...],
    shown: tuple[jax.Array, ...] | None,
) -> tuple[dict[str, Any], jax.Array]:
    """Returns the target's variables and the loss of each step; `shown` are the source's features for all inputs."""
    optimizer = packed(optax.adam(optax.cosine_decay_schedule(learning_rate, plan.steps)))
    observe = with_features(plan.target_apply, plan.target_layers)
    own, source_params = target_variables["params"], source_variables["params"]

    def merged(learned: Any, step: Any, key: jax.Array | None = None) -> Params:
        if plan.transfer is None:
            return learned
        return plan.transfer.apply(learned, source_params, own, key=key, step=step)

    def target_features(params: Params, state: dict[str, Any], seen: tuple[jax.Array, ...], key: jax.Array) -> Any:
        run: Callable[[], Any] = functools.partial(
            observe, {"params": params, **state}, *seen, train=True, mutable=list(state), rngs={"dropout": key}
        )
        with error_context("the target"), name_missing_collections(["params", *state]), name_misfit(seen):
            (_, features), new_state = bind_axis(run, plan.axis_name)
        return features, {**state, **new_state}

    def advance(carry: tuple[Any, dict[str, Any], Any], step: jax.Array) -> tuple[Any, jax.Array]:
        learned, state, opt_state = carry
        rows_key, dropout_key, transfer_key = jax.random.split(jax.random.fold_in(key, step), 3)
        rows = jax.random.permutation(rows_key, len(inputs[0]))[: plan.batch_size]
        seen = jax.tree.map(operator.itemgetter(rows), inputs)
        if plan.compare_on is not None:
            seen = tuple(map(plan.compare_on, seen))
        if shown is None:
            others = _source_features(plan.source_apply, plan.source_layers, source_variables, seen)
        else:
            others = jax.tree.map(operator.itemgetter(rows), shown)

        def loss_fn(learned: Any) -> tuple[jax.Array, dict[str, Any]]:
            features, new_state = target_features(merged(learned, step, transfer_key), state, seen, dropout_key)
            return plan.objective(features, others), new_state

        (loss, new_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(learned)
        updates, opt_state = optimizer.update(grads, opt_state, learned)
        return (optax.apply_updates(learned, updates), new_state, opt_state), loss

    state = {name: value for name, value in target_variables.items() if name != "params"}
    given = {name: value for name, value in state.items() if name == "batch_stats"}
    state |= jax.tree.map(at_least_float32, given)
    carry = (start, state, optimizer.init(start))
    (learned, state, _), losses = lax.scan(advance, carry, jnp.arange(plan.steps))
    state |= {
        name: jax.tree.map(lambda new, old: new.astype(old.dtype), state[name], old) for name, old in given.items()
    }
    return {"params": merged(learned, plan.steps), **state}, losses
