"""Options that every experiment has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merge_jax.joint import UpdateRule

__all__ = ["RunConfig"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options that every experiment has."""

    seeds: int = 5
    """Number of seeds. A seed fixes splits, source, start and batches, the same for every method."""
    source: Literal["pretrained", "live"] = "pretrained"
    """Pretrained: trained first, then frozen. Live: from scratch beside the target, as in the paper."""
    source_steps: int = 400
    """Steps of training the source before the transfer; a live source takes --steps instead."""
    steps: int = 300
    """Steps of training the target."""
    batch_size: int = 50
    """Examples in a batch."""
    cycle: int = 4
    """Steps from one transfer to the next; the steps between are self-learning."""
    update: UpdateRule = "exact"
    """What the adapter follows: the gradient of the target's loss, or the published surrogate."""
    adapter_learning_rate: float = 1e-3
    """Learning rate of the adapter's AdamW."""
    report_every: int = 15
    """Steps from one report (metrics and validation) to the next."""
    checkpoint_every: int = 150
    """Steps from one checkpoint to the next, a multiple of --report-every; the last step is always saved."""
    run_dir: Path | None = None
    """Folder of the run; by default a new numbered one in runs/."""
    resume: bool = False
    """Go on from the newest checkpoints of --run-dir, or of the last numbered folder."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        for name in ("seeds", "source_steps", "steps", "batch_size", "report_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.checkpoint_every < 1 or self.checkpoint_every % self.report_every:
            raise ValueError(
                f"checkpoint_every must be a multiple of report_every, "
                f"got {self.checkpoint_every} and {self.report_every}"
            )
        if not 0 < self.adapter_learning_rate < float("inf"):
            raise ValueError(f"adapter_learning_rate must be above 0, got {self.adapter_learning_rate}")
