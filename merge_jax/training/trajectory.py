"""The source's whole training as a source: saved steps, replayed in order.

A trajectory is one tree whose leaves `[K, ...]` hold K saved steps of the source, oldest first. Like other parameters,
it can be jitted, donated, distributed over devices and saved.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.checks import check_at_least_one
from merge_jax.transfers.base import Key, RouteSummary, Step, Transfer, check_transfer
from merge_jax.types import Adapter, Batch, Metrics, ModelState, Params, TeacherFn

__all__ = ["Trajectory", "last_of", "load_trajectory", "replay_evenly", "replayed"]

_Tree = TypeVar("_Tree")

Replay = Callable[[Any], Any]
"""`step of the target -> number of the saved step`, in [0, K)."""


class Trajectory(NamedTuple):
    """Saved steps of a run.

    Attributes:
      steps: the step numbers, in order.
      parts: the saved trees, by path, leaves `[K, ...]`.
    """

    steps: tuple[int, ...]
    parts: dict[str, Any]


def load_trajectory(
    checkpoints: Checkpoints, parts: Mapping[str, Any], *, steps: Sequence[int] | None = None
) -> Trajectory:
    """Returns saved steps of a run, stacked in order; all of them by default.

    Args:
      checkpoints: the run's checkpoints; `Checkpoints(folder, keep=None)` keeps every step.
      parts: the trees to read, by path, e.g. `{"target/params": params}`; see `Checkpoints.restore_parts`.
      steps: the steps to read.

    Raises:
      ValueError: no steps are saved, a requested one is missing (the message lists those that exist), or they belong to
        another architecture (each difference is named).
    """
    saved = checkpoints.steps
    wanted = saved if steps is None else tuple(sorted(steps))
    missing = sorted(set(wanted) - set(saved))
    if missing or not wanted:
        lacks = f"lacks the steps {missing}" if missing else "has no steps"
        raise ValueError(f"the trajectory in {checkpoints.folder} {lacks}; saved: {list(saved)}")
    saved_parts = [checkpoints.restore_parts(step, parts) for step in wanted]
    return Trajectory(wanted, jax.tree.map(lambda *leaves: jnp.stack(leaves), *saved_parts))


def replay_evenly(num_snapshots: int, num_steps: int) -> Replay:
    """Returns the schedule that shows K saved steps equally long: `k(i) = min(floor(i K / n), K - 1)`.

    Args:
      num_snapshots: the number of saved steps, K.
      num_steps: the number of target steps over which they are shown, n; the last one is shown from then on.

    Raises:
      ValueError: either is below 1.
    """
    check_at_least_one(num_snapshots=num_snapshots, num_steps=num_steps)
    # Integers, since a 32-bit product may overflow: this computes the first step that shows each saved step.
    starts = -(-np.arange(1, num_snapshots, dtype=np.int64) * num_steps // num_snapshots)

    def replay(step: Any) -> Any:
        return jnp.searchsorted(jnp.asarray(starts, jnp.int32), jnp.asarray(step, jnp.int32), side="right")

    return replay


def replayed(transfer: Transfer, replay: Replay) -> Transfer:
    """Returns a transfer that replays the source's saved checkpoints: `T' = t(S[k(i)], T)` at step `i`.

    The source's parameters are a trajectory, leaves `[K, ...]`, from `load_trajectory`; the source's task is None. The
    adapter is that of the transfer. Source: the paper's view of knowledge along the source's training (arXiv:
    2404.13322), here without training both models at once.

    Args:
      transfer: the transfer from one saved step.
      replay: `step -> k`, e.g. `replay_evenly(K, num_steps)`; beyond [0, K) it is the first or the last.

    Raises:
      ValueError: not a transfer, or a schedule that is not a function; in `apply` and `monitor`, a missing step (call
        `transfer.apply(..., step=step)`, as the joint step does), or leaves of unequal K.
    """
    check_transfer("what is replayed", transfer)
    if not callable(replay):
        raise ValueError(f"replay must be a function of the step, such as replay_evenly(...), got {replay!r}")

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        return transfer.init(key, _snapshot(source_params, 0), target_params)

    def snapshot(source_params: Params, step: Step) -> tuple[Params, Any]:
        if step is None:
            raise ValueError("a replayed source needs the step: pass it, as in transfer.apply(..., step=step)")
        number = replay(step)
        return _snapshot(source_params, number), number

    def apply(
        adapter: Adapter, source_params: Params, target_params: Params, *, key: Key = None, step: Step = None
    ) -> Params:
        return transfer.apply(adapter, snapshot(source_params, step)[0], target_params, key=key, step=step)

    def describe(source_params: Params, target_params: Params) -> tuple[RouteSummary, ...]:
        one = jax.eval_shape(lambda params: _snapshot(params, 0), source_params)
        return transfer.describe(one, target_params)

    def monitor(adapter: Adapter, source_params: Params, target_params: Params, *, step: Step = None) -> Metrics:
        shown, number = snapshot(source_params, step)
        metrics = transfer.monitor(adapter, shown, target_params, step=step)
        return {**metrics, "snapshot": jnp.asarray(number, jnp.float32)}

    return Transfer(init, apply, describe, monitor)


def last_of(teacher: TeacherFn) -> TeacherFn:
    """Returns a teacher for a source that is a trajectory: its last saved step teaches."""

    def teach(params: Params, model_state: ModelState, batch: Batch) -> Batch:
        return teacher(_snapshot(params, -1), _snapshot(model_state, -1), batch)

    return teach


def _snapshot(trajectory: _Tree, number: Any) -> _Tree:
    """Returns one saved step; out-of-range indices are clipped to the ends."""
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(trajectory)}
    if not lengths:
        return trajectory
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            f"the source must be a trajectory, leaves [K, ...] with one K for all, got leading axes {sorted(lengths)}"
        )
    (length,) = lengths
    index = length - 1 if isinstance(number, int) and number == -1 else jnp.clip(number, 0, length - 1)
    return jax.tree.map(lambda leaf: leaf[index], trajectory)
