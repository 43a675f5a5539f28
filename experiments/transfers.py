"""Options of the transfer that every experiment has, and what they make."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import optax

import merge_jax as mj
from experiments.config import RunConfig, Schedule
from merge_jax.transfer import OutputForm

__all__ = ["TransferConfig", "parse_routes"]


@dataclass(frozen=True, kw_only=True)
class TransferConfig(RunConfig):
    """Options of the transfer."""

    stop: float = 0.1
    """Fraction of the run after which share and mergenet leave the target to itself."""
    output: OutputForm = "warm"
    """How the adapter's output becomes the target's: see lpka_transfer."""
    gate: Literal["learned", "rising", "falling"] = "learned"
    """Gate of each route: learned from 0 on, or going evenly from 0 to 1, or from 1 to 0, while transfers last."""
    num_layers: int = 1
    """Layers of each route's LPKA."""
    num_heads: int = 8
    """Heads of each attention."""
    capped: bool = True
    """Cap the widths of the LPKA as lpka_transfer does; without, they are the published ones."""
    attention_dropout: float = 0.1
    """Dropout on the attention weights of each LPKA."""
    feed_forward_dropout: float = 0.2
    """Dropout on the feed-forward block of each LPKA."""
    adapter_learning_rate: float = 1e-2
    """Learning rate of the adapter's AdamW."""
    adapter_schedule: Literal["constant", "cosine"] = "constant"
    """Course of that rate; cosine falls to 0 after the first 2 percent of the run, as published."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        super().check()
        if not 0 < self.adapter_learning_rate < float("inf"):
            raise ValueError(f"adapter_learning_rate must be above 0, got {self.adapter_learning_rate}")
        if not 0 <= self.stop <= 1:
            raise ValueError(f"stop must be a fraction in [0, 1], got {self.stop}")

    def lpka(self, routes: Any, num_steps: int, *, output: OutputForm | None = None) -> mj.Transfer:
        """Returns the transfer of these options for a run of so many steps, maybe in another output form."""
        ends = {"rising": (0.0, 1.0), "falling": (1.0, 0.0)}.get(self.gate)
        gate = None if ends is None else optax.linear_schedule(*ends, max(1, round(self.stop * num_steps)))
        return mj.lpka_transfer(
            routes,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            output=output or self.output,
            gate=gate,
            attention_dropout=self.attention_dropout,
            feed_forward_dropout=self.feed_forward_dropout,
            max_width=512 if self.capped else None,
            max_hidden=1024 if self.capped else None,
        )

    def adapter_optimizer(self, schedule: Schedule) -> optax.GradientTransformation:
        """Returns the adapter's AdamW; its rate goes by the number of its own updates, one a transfer."""
        rate: optax.ScalarOrSchedule = self.adapter_learning_rate
        if self.adapter_schedule == "cosine":
            updates = max(2, round(self.stop * schedule.target.steps / self.cycle))
            held = max(1, round(0.02 * updates))
            falling = optax.cosine_decay_schedule(rate, updates - held)
            rate = optax.join_schedules([optax.constant_schedule(rate), falling], [held])
        return mj.adapter_adamw(rate)


def parse_routes(words: Iterable[str]) -> list[mj.Route]:
    """Returns the routes that are given as `target=source`, each path or pattern as `merge_jax.Route` has it.

    Paths that both end in `attention` are blocks of attention, which move head by head.

    Raises:
      ValueError: a word that is no such pair.
    """
    routes = []
    for word in words:
        target, equals, source = word.partition("=")
        if not (target and equals and source):
            raise ValueError(f"a route must be target=source, such as fc/kernel=fc/kernel, got {word!r}")
        blocks = target.endswith("attention") and source.endswith("attention")
        routes.append(mj.Route(target, source, view="attention" if blocks else None))
    return routes
