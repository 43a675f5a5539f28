"""The training loop: runs steps over data, reports and saves; it can start at any step."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.objectives.precision import at_least_float32
from merge_jax.training.nonfinite import RejectedTransfers, SkippedUpdates
from merge_jax.types import Batch, Metrics

__all__ = ["Advance", "Report", "run_loop", "stepwise"]


class _HasStep(Protocol):
    @property
    def step(self) -> jax.Array: ...


_State = TypeVar("_State", bound=_HasStep)

Advance = Callable[[_State, int, int], tuple[_State, Metrics]]
"""`(state, number of the first step, count) -> (state after count steps, sums of their metrics)`; donates the state."""

Report = Callable[[int, dict[str, Any], Any], float | None]
"""`(steps done, means of the metrics since the last report, state) -> score`; called now and then and at the end.

The score, higher being better, is what the best checkpoint is chosen by; None for none.
"""


def stepwise(
    step_fn: Callable[[_State, Mapping[str, Batch]], tuple[_State, Metrics]],
    batches_at: Callable[[int], Mapping[str, Batch]],
) -> Advance[_State]:
    """Wraps a jitted step so that it can advance several steps, one host batch each.

    Args:
      step_fn: `(state, batches) -> (state, metrics)`, compiled, the state donated.
      batches_at: `step -> batches`.
    """

    def advance(state: _State, first: int, count: int) -> tuple[_State, Metrics]:
        state, metrics = step_fn(state, batches_at(first))
        sums = jax.tree.map(at_least_float32, metrics)
        for step in range(first + 1, first + count):
            state, metrics = step_fn(state, batches_at(step))
            sums = jax.tree.map(jnp.add, sums, metrics)
        return state, sums

    return advance


def run_loop(
    advance: Advance[_State],
    state: _State,
    *,
    num_steps: int,
    report_every: int,
    report: Report,
    steps_per_call: int = 1,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    on_steps: Callable[[int], Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
    most_skipped: int = 100,
) -> _State:
    """Runs from the given state's step to step `num_steps`, and returns the final state.

    The state is donated: use the returned one. If batches depend only on the step and the state holds everything else,
    a stopped and restored run equals an uninterrupted one, bit for bit. After a stop between two reports, the next
    report averages only the steps after the stop.

    Args:
      advance: executes some steps: `stepwise(step_fn, batches_at)`, or a compiled `make_epoch` with its data.
      state: a state with `step`, the number of completed steps.
      num_steps: steps of the whole run, including completed ones.
      report_every: steps between reports.
      report: receives the number of completed steps, the means of all metrics since the last report, and the state;
        returns the score of the state, or None.
      steps_per_call: the maximum number of steps per call of `advance`.
      checkpoints: where to save; None saves nothing.
      checkpoint_every: steps between saves, a multiple of `report_every` so that no mean is split; the last step is
        always saved.
      on_steps: called after every call of `advance` with the number of its steps, e.g. to move a progress bar.
      should_stop: called after every call of `advance`; once it returns True, the current step is saved and its state
        returned, as with `StopSignals`.
      most_skipped: the maximum number of consecutive non-finite updates of one model, each of which is skipped; checked
        at each report.

    Raises:
      ValueError: a number of steps below 1, or saves that do not coincide with reports.
      NumericFaultError: `most_skipped` consecutive updates of one model were skipped; earlier saves remain.

    Warns:
      UserWarning: transfers were rejected, and none was written.
    """
    for name, value in (
        ("num_steps", num_steps),
        ("report_every", report_every),
        ("steps_per_call", steps_per_call),
        ("most_skipped", most_skipped),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if checkpoint_every is not None and (checkpoint_every < 1 or checkpoint_every % report_every):
        raise ValueError(
            f"checkpoint_every must be a multiple of report_every, got {checkpoint_every} and {report_every}"
        )
    done = int(state.step)
    window: list[tuple[int, Metrics]] = []
    skips, rejections = SkippedUpdates(most_skipped), RejectedTransfers()
    while done < num_steps:
        next_report = min(num_steps, (done // report_every + 1) * report_every)
        count = min(steps_per_call, next_report - done)
        state, sums = advance(state, done, count)
        window.append((count, sums))
        done += count
        score = None
        if done == next_report:
            score = report(done, _means(window, done, skips, rejections), state)
            window = []
        if on_steps is not None:
            on_steps(count)
        stops = should_stop is not None and should_stop()
        due = done == num_steps or (checkpoint_every is not None and done % checkpoint_every == 0)
        if checkpoints is not None and (due or stops):
            checkpoints.save(done, state, score=score)
        if stops:
            break
    rejections.warn()
    return state


def _means(
    window: list[tuple[int, Metrics]], done: int, skips: SkippedUpdates, rejections: RejectedTransfers
) -> dict[str, Any]:
    # Fetched at once: reading each metric after its step would make the device wait for the host.
    fetched: list[tuple[int, Any]] = jax.device_get(window)
    steps = sum(count for count, _ in fetched)
    at = done - steps
    for count, sums in fetched:
        at += count
        skips.add(sums, count, at)
        rejections.add(sums, count, at)

    def total(values: list[Any]) -> Any:  # NumPy would add numbers of bfloat16 in bfloat16, and end at 256.
        return np.sum(values, axis=0, dtype=np.promote_types(np.asarray(values[0]).dtype, np.float32))

    return {name: total([sums[name] for _, sums in fetched]) / steps for name in fetched[0][1]}
