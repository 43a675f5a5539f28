"""Options that every experiment has."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from merge_jax.checks import check_at_least_one, check_zero_or_more
from merge_jax.study.choices import OPPONENTS, OpponentName, SourceControl, UpdateRule
from merge_jax.training.compilation_cache import CacheChoice

__all__ = ["RunConfig", "check_types", "run_options"]

# They determine where and how far a run continues, not its identity: a resumed run may change them.
_NOT_IDENTIFYING = (
    *("run_dir", "resume", "compilation_cache", "opponents"),
    *("devices", "parallel", "shard_state", "hosts", "coordinator", "num_processes", "process_id"),
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options that every experiment has."""

    seeds: int = 5
    """Number of seeds. Each seed fixes splits, source, initial parameters and batches, the same for every method."""
    first_seed: int = 0
    """The first seed. Seeds 6 to 11 (--first-seed 6 --seeds 6) confirm what was chosen on seeds 0 to 5. Machines can
    share the work as runs of different seeds."""
    source: Literal["pretrained", "live", "frozen", "trajectory"] = "pretrained"
    """Pretrained: trained first, then frozen. Live: trained from scratch together with the target, as in the paper.
    Frozen: read from --source-from. Trajectory: replays a source's saved checkpoints in order, from --source-from or
    trained first."""
    source_from: Path | None = None
    """The frozen source: the folder of a run that trained one, a weight file that merge_jax.load_weights reads, or
    package:NAME for weights in an installed package. For a trajectory, the folder of a run."""
    snapshots: int = 8
    """Approximate number of source checkpoints to keep for --source trajectory. Ignored if the trajectory is read
    from a run."""
    source_control: SourceControl = "none"
    """A control to compare with the trained source. Random: untrained. Shuffled: the trained entries of each leaf in
    random order. Noise: normal values with each leaf's mean and standard deviation. Other_seed: trained on the same
    split, with other initial parameters and batches."""
    source_steps: int = 400
    """Training steps of the source before the transfer; a live source uses --steps instead."""
    steps: int = 300
    """Training steps of the target."""
    epochs: int | None = None
    """Training epochs of the target, instead of --steps; reports and checkpoints are then counted in epochs too."""
    source_epochs: int | None = None
    """Training epochs of the source, if --epochs is given; by default as many as the target's."""
    batch_size: int = 50
    """Examples per batch, over all devices."""
    cycle: int = 4
    """Steps from one transfer to the next; in between, the target learns alone."""
    update: UpdateRule = "exact"
    """How the adapter learns: by the exact gradient of the target's loss, or by the published surrogate."""
    opponents: tuple[OpponentName, ...] = OPPONENTS
    """Baselines in a classifier's tables, without training: logistic regression on the raw inputs and on the source's
    features, and the source itself. With many labels they take minutes. A resumed run may name others, for the seeds
    that are still to train."""
    report_every: int = 15
    """Steps (or epochs) between reports, which show metrics and validate."""
    checkpoint_every: int = 150
    """Steps (or epochs) between checkpoints, a multiple of --report-every; the last step is always saved."""
    devices: int | None = None
    """Number of devices that share each batch; all by default."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How devices share a batch: jit splits one program, pmap runs one program on each."""
    shard_state: bool = False
    """Also split parameters, optimizer and adapter over the devices, for models too large for one device."""
    hosts: bool = False
    """A cluster (Slurm, Kubernetes, Cloud TPU, Open MPI) has started this command in several processes; JAX finds
    them by itself."""
    coordinator: str | None = None
    """host:port of process 0, if several processes run the same command together."""
    num_processes: int = 1
    """Number of processes."""
    process_id: int = 0
    """Index of this process, from 0."""
    run_dir: Path | None = None
    """Folder of the run; by default a new numbered folder in runs/."""
    resume: bool = False
    """Resume from the newest checkpoints of --run-dir, or of the last numbered folder."""
    compilation_cache: CacheChoice = "default"
    """Where to keep compiled programs for later runs: none, or a folder, which may grow to 512 MiB. The default is
    JAX_COMPILATION_CACHE_DIR, or a folder in the user's cache."""

    def check(self) -> None:
        """Raises ValueError for an option of another type or out of range.

        Every class of a config checks its options in `check_options`; this calls each once.
        """
        check_types(self)
        for kind in reversed(type(self).__mro__):
            if "check_options" in vars(kind):
                kind.check_options(self)  # pyright: ignore[reportAttributeAccessIssue]

    def check_options(self) -> None:
        """Raises ValueError for an option out of range."""
        for name in ("seeds", "source_steps", "steps", "batch_size", "report_every", "checkpoint_every", "snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_zero_or_more(first_seed=self.first_seed)
        check_at_least_one(cycle=self.cycle, num_processes=self.num_processes)
        optional = {name: getattr(self, name) for name in ("epochs", "source_epochs", "devices")}
        check_at_least_one(**{name: value for name, value in optional.items() if value is not None})
        if self.source == "frozen" and self.source_from is None:
            raise ValueError("a frozen source needs --source-from, a file of weights or the folder of a run")
        if self.source_from is not None and self.source not in ("frozen", "trajectory"):
            raise ValueError(
                f"--source-from is for a source that is frozen or a trajectory; this one is {self.source}, and trained "
                "here: add --source frozen"
            )
        if self.source_control != "none" and self.source not in ("pretrained", "frozen"):
            raise ValueError(
                f"source_control is for a source that is pretrained or frozen; this one is {self.source}: "
                f"leave out {self.source_control}"
            )
        if self.source_control == "other_seed" and self.source == "frozen":
            raise ValueError("source_control other_seed trains a source of another seed: leave out --source frozen")
        if self.checkpoint_every % self.report_every:
            raise ValueError(
                f"checkpoint_every must be a multiple of report_every, "
                f"got {self.checkpoint_every} and {self.report_every}"
            )
        if self.source_epochs is not None and self.epochs is None:
            raise ValueError("source_epochs is given without epochs: give lengths either in steps or in epochs")
        if self.shard_state and self.parallel == "pmap":
            raise ValueError("shard_state needs --parallel jit: pmap keeps a full copy on every device")
        if (self.num_processes > 1) != (self.coordinator is not None):
            raise ValueError("several processes need all of coordinator, num_processes and process_id")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"process_id must lie in [0, {self.num_processes}), got {self.process_id}")
        if self.hosts and self.coordinator is not None:
            raise ValueError("hosts lets JAX find all processes: leave out coordinator, num_processes and process_id")
        if (self.hosts or self.coordinator is not None) and self.run_dir is None:
            raise ValueError("several processes need a run_dir that all of them can access")

    @property
    def seed_range(self) -> range:
        """The seeds, in the order in which they are trained."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def axis_name(self) -> str | None:
        """The device axis over which models average and losses compare examples; None under jit."""
        if self.parallel != "pmap":
            return None
        from merge_jax.training.sharding import DATA_AXIS

        return DATA_AXIS


def run_options(config: RunConfig) -> dict[str, Any]:
    """Returns the options that identify a run."""
    return {name: value for name, value in asdict(config).items() if name not in _NOT_IDENTIFYING}


def check_types(options: Any, prefix: str = "") -> None:
    """Raises ValueError unless every field of a dataclass has its declared type, and every number is finite.

    A command line already types its options; this is for options from Python or a file.
    """
    for field, hint in get_type_hints(type(options)).items():
        name, value = f"{prefix}{field}", getattr(options, field)
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError:
            kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("pathlib.", "")
            raise ValueError(f"{name} must be {kind}, got {value!r}") from None
        if is_dataclass(value):
            check_types(value, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
