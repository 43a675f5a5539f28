"""The training loop: it runs a step over data, reports, and saves; it can start anywhere."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from merge_jax.checkpoint import Checkpoints
from merge_jax.types import Batch, Metrics

__all__ = ["Report", "run_loop"]


class _HasStep(Protocol):
    @property
    def step(self) -> jax.Array: ...


_State = TypeVar("_State", bound=_HasStep)

Report = Callable[[int, dict[str, float], Any], None]
"""`(steps done, means of the metrics since the last report, state)`; called now and then and at the end."""


def run_loop(
    step_fn: Callable[[_State, Mapping[str, Batch]], tuple[_State, Metrics]],
    state: _State,
    batches_at: Callable[[int], Mapping[str, Batch]],
    *,
    num_steps: int,
    report_every: int,
    report: Report,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    on_step: Callable[[], Any] | None = None,
) -> _State:
    """Returns the state after step `num_steps`, from whatever step the given state has reached.

    The state is donated: use the returned one. Since the batches depend on the step alone and the state holds
    all else, a run that was stopped and restored is equal to an unbroken one, bit for bit.

    Args:
      step_fn: `(state, batches) -> (state, metrics)`, compiled.
      state: a state with `step`, the number of steps done.
      batches_at: `step -> batches`.
      num_steps: steps of the whole run, those already done included.
      report_every: steps between reports.
      report: gets the number of steps done, the means of all metrics since the last report, and the state.
      checkpoints: where to save; nothing is saved without.
      checkpoint_every: steps between saves, a multiple of `report_every` so that no mean is cut in two; the last
        step is always saved.
      on_step: called after every step, e.g. to move a progress bar.

    Raises:
      ValueError: a number of steps below 1, or saves that do not fall on reports.
    """
    for name, value in (("num_steps", num_steps), ("report_every", report_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if checkpoint_every is not None and (checkpoint_every < 1 or checkpoint_every % report_every):
        raise ValueError(
            f"checkpoint_every must be a multiple of report_every, got {checkpoint_every} and {report_every}"
        )
    window: list[Metrics] = []
    for done in range(int(state.step) + 1, num_steps + 1):
        state, metrics = step_fn(state, batches_at(done - 1))
        window.append(metrics)
        last = done == num_steps
        if done % report_every == 0 or last:
            report(done, _means(window), state)
            window = []
        saves = last or (checkpoint_every is not None and done % checkpoint_every == 0)
        if checkpoints is not None and saves:
            checkpoints.save(done, state)
        if on_step is not None:
            on_step()
    return state


def _means(window: list[Metrics]) -> dict[str, float]:
    # Fetched at once: reading each metric after its step would make the device wait for the host.
    fetched = jax.device_get(window)
    return {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}
