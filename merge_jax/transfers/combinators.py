"""Combinators of transfers."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax import lax

from merge_jax.checks import check_number_or_schedule
from merge_jax.paths import flatten, near_misses, replace
from merge_jax.transfers.base import Key, RouteSummary, Step, Transfer, check_transfer, schedule_value
from merge_jax.types import Adapter, Metrics, Params

__all__ = ["chain", "scheduled", "self_transfer", "several_sources", "without_source"]


def chain(*transfers: Transfer) -> Transfer:
    """Returns the composition of transfers: `T' = t_k(S, ... t_2(S, t_1(S, T)))`.

    Each receives the target from the one before, and the unchanged source. The adapter is `{"0": the first's adapter,
    "1": ...}`.

    Raises:
      ValueError: no transfers, or something that is not a transfer.
    """
    if not transfers:
        raise ValueError("no transfers to chain: give at least one")
    for i, transfer in enumerate(transfers):
        check_transfer(f"number {i} of the chain", transfer)
    by_name = {str(i): transfer for i, transfer in enumerate(transfers)}

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        keys = jax.random.split(key, len(by_name))
        return {
            name: transfer.init(k, source_params, target_params)
            for (name, transfer), k in zip(by_name.items(), keys, strict=True)
        }

    def apply(
        adapter: Adapter, source_params: Params, target_params: Params, *, key: Key = None, step: Step = None
    ) -> Params:
        for i, (name, transfer) in enumerate(by_name.items()):
            own_key = None if key is None else jax.random.fold_in(key, i)
            target_params = transfer.apply(adapter[name], source_params, target_params, key=own_key, step=step)
        return target_params

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        return tuple(
            _prefixed(name, row)
            for name, transfer in by_name.items()
            for row in transfer.describe(source_params, target_params)
        )

    def monitor(adapter: Adapter, source_params: Params, target_params: Params, *, step: Step = None) -> Metrics:
        return _monitor_all(by_name, adapter, dict.fromkeys(by_name, source_params), target_params, step)

    return Transfer(init, apply, describe, monitor)


def scheduled(transfer: Transfer, schedule: optax.ScalarOrSchedule) -> Transfer:
    """Returns the transfer weighted by a schedule: `T' = T + w(i) (t(S, T) - T)`, with `i` the joint step's count.

    A weight of 0 leaves the target unchanged, 1 is the transfer itself, and values in between interpolate. Use any
    Optax schedule, such as `optax.cosine_decay_schedule(1.0, num_steps)`, or a number for a constant weight. The
    adapter is that of the transfer. Leaves without a route are returned as the same arrays.

    Raises:
      ValueError: something that is not a transfer or not a schedule; in `apply` and `monitor`, a schedule without a
        step: call `transfer.apply(..., step=step)`, as the joint step does.
    """
    check_transfer("what is scheduled", transfer)
    check_number_or_schedule(schedule=schedule)

    def apply(
        adapter: Adapter, source_params: Params, target_params: Params, *, key: Key = None, step: Step = None
    ) -> Params:
        weight = schedule_value(schedule, step, "the transfer")
        old = flatten(target_params)
        merged = flatten(transfer.apply(adapter, source_params, target_params, key=key, step=step))
        mixed = {
            path: (old[path] + weight * (new - old[path])).astype(new.dtype)
            for path, new in merged.items()
            if new is not old[path]  # Leaves without a route are returned as the same array.
        }
        return replace(target_params, mixed)

    def monitor(adapter: Adapter, source_params: Params, target_params: Params, *, step: Step = None) -> Metrics:
        metrics = transfer.monitor(adapter, source_params, target_params, step=step)
        return {**metrics, "weight": jnp.asarray(schedule_value(schedule, step, "the transfer"), jnp.float32)}

    return Transfer(transfer.init, apply, transfer.describe, monitor)


def several_sources(transfers: Mapping[str, Transfer]) -> Transfer:
    """Returns one transfer from several sources: each target leaf is the mean over its sources.

    `T' = (1 / k) sum_i t_i(S_i, T)` over the `k` transfers with a route to the leaf. The source's parameters and the
    adapter are `{name: parameters}`. All transfers read the original target; in a `chain`, each reads the output of
    the one before. Our choice.

    Raises:
      ValueError: no transfers, or something that is not a transfer; in `init` and `apply`, source parameters that
        lack one of the names.
    """
    if not isinstance(transfers, Mapping) or not transfers:
        raise ValueError(f"sources are a mapping of names to transfers, at least one, got {type(transfers).__name__}")
    transfers = dict(transfers)
    for name, transfer in transfers.items():
        check_transfer(f"the transfer of the source {name!r}", transfer)

    def check(source_params: Params) -> None:
        for name in transfers:
            if name not in source_params:
                raise ValueError(f"the source's parameters lack {name!r}; {near_misses(name, source_params)}")

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        check(source_params)
        keys = jax.random.split(key, len(transfers))
        return {
            name: transfer.init(k, source_params[name], target_params)
            for (name, transfer), k in zip(transfers.items(), keys, strict=True)
        }

    def apply(
        adapter: Adapter, source_params: Params, target_params: Params, *, key: Key = None, step: Step = None
    ) -> Params:
        check(source_params)
        old = flatten(target_params)
        made: dict[str, list[jax.Array]] = {}
        for i, (name, transfer) in enumerate(transfers.items()):
            own_key = None if key is None else jax.random.fold_in(key, i)
            merged = transfer.apply(adapter[name], source_params[name], target_params, key=own_key, step=step)
            for path, new in flatten(merged).items():
                if new is not old[path]:  # Leaves without a route are returned as the same array.
                    made.setdefault(path, []).append(new)
        return replace(target_params, {path: jnp.mean(jnp.stack(new), axis=0) for path, new in made.items()})

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        check(source_params)
        return tuple(
            dataclasses.replace(_prefixed(name, row), source=f"{name}: {row.source}")
            for name, transfer in transfers.items()
            for row in transfer.describe(source_params[name], target_params)
        )

    def monitor(adapter: Adapter, source_params: Params, target_params: Params, *, step: Step = None) -> Metrics:
        return _monitor_all(transfers, adapter, source_params, target_params, step)

    return Transfer(init, apply, describe, monitor)


def self_transfer(transfer: Transfer) -> Transfer:
    """Returns the transfer inside one model: the target is its own source, `T' = t(stop_gradient(T), T)`.

    Routes connect layers, e.g. deep to shallow, `{"layer_0/kernel": "layer_5/kernel"}`; all layers are read before any
    is written. The source's parameters are not used: pass `{}`, and None as its task. As between two models, the source
    side gets no gradient (our choice; it matters only to `make_reparameterised_step`). Self transfer:
    arXiv:2404.13322.

    Raises:
      ValueError: something that is not a transfer.
    """
    check_transfer("what a model gives to itself", transfer)
    return _from_made_source(transfer, lambda source_params, target_params: target_params)


def without_source(transfer: Transfer) -> Transfer:
    """Returns the transfer without its source: `T' = t(0, T)`, zeros instead of the source's parameters.

    A control with the same number of parameters and the same computation, but no source: its gains are not knowledge
    of the source. Transfers that start from the source's numbers (`share_transfer`, the output `warm`) would write
    zeros; the output `residual` measures the value of the adapter alone. Our choice.

    Raises:
      ValueError: something that is not a transfer.
    """
    check_transfer("what is to read no source", transfer)
    return _from_made_source(transfer, lambda source_params, target_params: jax.tree.map(jnp.zeros_like, source_params))


def _from_made_source(transfer: Transfer, make_source: Callable[[Params, Params], Params]) -> Transfer:
    """Returns the transfer with the source replaced by `make_source(source, target)`, without gradient."""

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        return transfer.init(key, make_source(source_params, target_params), target_params)

    def apply(
        adapter: Adapter, source_params: Params, target_params: Params, *, key: Key = None, step: Step = None
    ) -> Params:
        source_params = lax.stop_gradient(make_source(source_params, target_params))
        return transfer.apply(adapter, source_params, target_params, key=key, step=step)

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        return transfer.describe(make_source(source_params, target_params), target_params)

    def monitor(adapter: Adapter, source_params: Params, target_params: Params, *, step: Step = None) -> Metrics:
        return transfer.monitor(adapter, make_source(source_params, target_params), target_params, step=step)

    return Transfer(init, apply, describe, monitor)


def _monitor_all(
    transfers: Mapping[str, Transfer],
    adapter: Adapter,
    sources: Mapping[str, Params],
    target_params: Params,
    step: Step,
) -> Metrics:
    """Returns the monitored scalars of all transfers, prefixed with the transfer's name."""
    return {
        f"{name}/{scalar}": value
        for name, transfer in transfers.items()
        for scalar, value in transfer.monitor(adapter[name], sources[name], target_params, step=step).items()
    }


def _prefixed(name: str, row: RouteSummary) -> RouteSummary:
    return dataclasses.replace(row, adapter=f"{name}/{row.adapter}" if row.adapter else "")
