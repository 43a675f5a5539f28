"""The transfer steps of a run."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from merge_jax.checks import check_at_least_one

__all__ = ["TransferSteps"]


@dataclass(frozen=True)
class TransferSteps:
    """The steps that transfer: the first, then one per cycle, until the fraction `stop` of the run.

    `0, cycle, 2 cycle, ...` below `round(stop * num_steps)`. A scheduled cycle is evaluated at each transfer: after
    step `i` the next is `i + max(1, round(cycle(i)))` (our choice: no step is skipped or counted twice). The joint
    step, the plan and the documents all use this class.

    Attributes:
      cycle: steps from one transfer to the next, 1 or more (the published grid is 1 to 5); or a schedule over steps,
        for transfers that become rarer or denser (the outlook of arXiv:2404.13322).
      stop: the fraction of the run after which only self-learning continues; 0 means no transfer.
      num_steps: the length of the run in steps; required if `0 < stop < 1`, and for a scheduled cycle.

    Raises:
      ValueError: a cycle below 1; a stop outside [0, 1], without `num_steps`, or before the first step; or a scheduled
        cycle in a run of unknown length.
    """

    cycle: int | optax.Schedule = 4
    stop: float = 1.0
    num_steps: int | None = None

    def __post_init__(self) -> None:  # noqa: D105
        if callable(self.cycle):
            if self.num_steps is None:
                raise ValueError("a cycle that changes needs the length of the run: give num_steps too")
        else:
            check_at_least_one(cycle=self.cycle)
        if not 0 <= self.stop <= 1:
            raise ValueError(f"stop must be a fraction in [0, 1], got {self.stop}")
        if 0 < self.stop < 1 and self.num_steps is None:
            raise ValueError(f"stop is {self.stop}, a fraction of the run: give num_steps too")
        if self.stop > 0 and self._until == 0:
            raise ValueError(
                f"stop is {self.stop} of {self.num_steps} steps, less than one: nothing would be transferred"
            )

    @property
    def _until(self) -> int | None:
        """The first step from which on none transfers, or None."""
        if self.stop == 0:
            return 0
        return None if self.stop == 1 or self.num_steps is None else round(self.stop * self.num_steps)

    @property
    def never(self) -> bool:
        """Whether no step transfers."""
        return self.stop == 0

    @property
    def always(self) -> bool:
        """Whether every step transfers."""
        return not callable(self.cycle) and self.cycle == 1 and self._until is None

    def includes(self, step: Any) -> Any:
        """Returns whether a step transfers, for a number, an array, or a traced scalar."""
        if callable(self.cycle):
            changing = jnp.asarray(self._changing(self.cycle))
            return changing.at[step].get(mode="fill", fill_value=False)
        transfers = step % self.cycle == 0
        return transfers if self._until is None else transfers & (step < self._until)

    def count(self) -> int:
        """Returns the number of steps in the run that transfer.

        Raises:
          ValueError: the length of the run is not known.
        """
        if self.num_steps is None:
            raise ValueError("how many steps transfer depends on the length of the run: give num_steps")
        return int(np.sum(self.includes(np.arange(self.num_steps))))

    def _changing(self, cycle: optax.Schedule) -> np.ndarray:
        """Returns whether each step of the run transfers, `[num_steps]`."""
        assert self.num_steps is not None  # __post_init__
        until = self.num_steps if self._until is None else self._until
        transfers, step = np.zeros(self.num_steps, bool), 0
        with jax.ensure_compile_time_eval():  # A schedule may be written in jax.numpy, and this may be traced.
            while step < until:
                transfers[step] = True
                steps = float(jnp.asarray(cycle(step)))
                if math.isnan(steps):
                    raise ValueError(f"the cycle must be a number of steps, got {steps} at step {step}")
                step += self.num_steps if math.isinf(steps) else max(1, round(steps))
        return transfers
