"""Where the source of each seed comes from: trained in the run, or read from a file or from another run."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.checkpoints.safetensors import leaf_paths, load_params
from merge_jax.study.config import Lengths, RunConfig
from merge_jax.study.scenario import Scenario, StudyModel
from merge_jax.training.joint import TrainState
from merge_jax.training.trajectory import load_trajectory

__all__ = ["PURPOSES", "Origin", "initial_key", "origin_of", "read_trajectory"]

_PARAMS, _MODEL_STATE = "target/params", "target/model_state"  # On its own, the source is trained as a target.


Purpose = Literal["source", "target", "adapter", "steps", "control", "source_steps"]
"""What the keys of a seed are for: the starts of the three, the steps of a method, a control of the source, and the
steps of the source that is trained on its own. None shares what it draws with another."""

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


@dataclass(frozen=True)
class Origin:
    """Where the source of each seed comes from.

    Attributes:
      live: whether it learns beside the target.
      lengths: how long it is trained on its own before, 0 steps where it is as it starts; None where it is not.
      snapshots: how many steps of its training a trajectory has; None for no trajectory.
      read: `seed -> source`, where it is read, or as it starts; None where it is trained.
    """

    live: bool = False
    lengths: Lengths | None = None
    snapshots: int | None = None
    read: Callable[[int], TrainState] | None = None


def origin_of(scenario: Scenario, config: RunConfig) -> Origin:
    """Returns where the source of a scenario comes from.

    Raises:
      ValueError: there is no file or run to read it from, or the run has not saved it for every seed; a control of
        the source where the target is its own.
    """
    role, lengths = scenario.source, scenario.schedule.source
    if role is None:
        if config.source_control != "none":
            raise ValueError(
                f"a target that is its own source has none to control: leave out source_control {config.source_control}"
            )
        return Origin()

    def start(seed: int) -> TrainState:
        return TrainState(*role.init(initial_key(seed, "source")), None)

    if config.source_control == "random":
        return Origin(lengths=lengths._replace(steps=0), read=start)
    if config.source == "live":
        return Origin(live=True)
    if config.source == "pretrained":
        return Origin(lengths=lengths)
    path = config.source_from
    if config.source == "trajectory" and path is None:
        # Saves fall on reports.
        every = lengths.report_every * max(1, round(lengths.steps / config.snapshots / lengths.report_every))
        return Origin(lengths=lengths._replace(checkpoint_every=every), snapshots=math.ceil(lengths.steps / every))
    assert path is not None  # config.check
    shapes = jax.eval_shape(lambda: start(0))  # What does not fit them is told before a model is made.
    if config.source == "frozen" and not (path / "checkpoints").is_dir():
        _read_variables(role, path, shapes)
        return Origin(read=lambda seed: _read_file(role, path, start(seed)))
    folders = [path / "checkpoints" / f"source-seed{seed}" for seed in range(config.seeds)]
    missing = [folder.name for folder in folders if not folder.is_dir()]
    if missing:
        raise ValueError(
            f"{path} has no checkpoints of {', '.join(missing)}: it must be the folder of a run that trained a source"
            " on its own (--source pretrained or trajectory) for as many seeds, without --vectorized"
        )
    _read_last(folders[0], shapes)
    if config.source == "frozen":
        return Origin(read=lambda seed: _read_last(folders[seed], start(seed)))
    counts = []
    for folder in folders:
        with Checkpoints(folder, read_only=True) as checkpoints:
            counts.append(len(checkpoints.steps))
    if len(set(counts)) > 1 or counts[0] < 2:
        raise ValueError(
            f"a trajectory needs the same number of saved steps, 2 or more, of every seed; {path} has {counts}: train"
            " it with --source trajectory, which keeps them"
        )
    return Origin(snapshots=counts[0], read=lambda seed: read_trajectory(folders[seed], start(seed)))


def initial_key(seed: int, purpose: Purpose) -> jax.Array:
    """Returns the key of a seed for one purpose; what it draws is the same on every backend."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), PURPOSES.index(purpose))


def read_trajectory(folder: Path, start: TrainState) -> TrainState:
    """Returns all saved steps of a source that was trained on its own, leaves `[K, ...]`.

    Raises:
      ValueError: what is saved does not fit the model.
    """
    with Checkpoints(folder, read_only=True) as checkpoints, _told_as_source(folder):
        parts = load_trajectory(checkpoints, _parts(start)).parts
    return TrainState(parts[_PARAMS], parts[_MODEL_STATE], None)


def _read_last(folder: Path, start: TrainState) -> TrainState:
    with Checkpoints(folder, read_only=True) as checkpoints:
        if checkpoints.latest_step is None:
            raise ValueError(f"{folder} has no saved steps")
        with _told_as_source(folder):
            parts = checkpoints.restore_parts(checkpoints.latest_step, _parts(start))
    return TrainState(parts[_PARAMS], parts[_MODEL_STATE], None)


@contextlib.contextmanager
def _told_as_source(folder: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the source in {folder} cannot be that of this run: {error}") from None


def _parts(start: TrainState) -> dict[str, object]:
    return {_PARAMS: start.params, _MODEL_STATE: start.model_state}


def _read_file(role: StudyModel, path: Path, start: TrainState) -> TrainState:
    read = _read_variables(role, path, start)
    model_state = {name: jax.tree.map(jax.numpy.asarray, one) for name, one in read.items()}
    return TrainState(model_state.pop("params"), model_state, None)


def _read_variables(role: StudyModel, path: Path, start: TrainState) -> dict[str, Any]:
    """Returns parameters and model state by name; what the file has not of them stays as it starts."""
    try:
        if any(
            leaf.startswith("params/") for leaf in leaf_paths(path)
        ):  # With its model state, as `merge-jax export` writes it.
            return dict(load_params(path, {"params": start.params, **start.model_state}))
        return {"params": role.load(path, start.params), **start.model_state}
    except OSError as error:
        raise ValueError(f"the source cannot be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"{error}; the source is to be {role.name}") from None
