"""Determines each seed's source: trained in the run, or read from a file or another run."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.checkpoints.weights.load import find_weights, load_params, weight_paths
from merge_jax.checks import error_context
from merge_jax.paths import flatten
from merge_jax.study.choices import SourceControl
from merge_jax.study.config import RunConfig
from merge_jax.study.models.model import StudyModel
from merge_jax.study.scenario import Lengths, Scenario
from merge_jax.training.joint import TrainState
from merge_jax.training.trajectory import load_trajectory

__all__ = ["OTHER_SEED", "PURPOSES", "SourcePlan", "control_source", "initial_key", "plan_source", "read_trajectory"]

OTHER_SEED = 1000
"""Added to a seed for the start and the batches of the source under `other_seed`; the split stays the seed's."""

Purpose = Literal["source", "target", "adapter", "steps", "control", "source_steps", "start"]
"""What the keys of a seed are for: the starts of the three, the steps of a method, a control of the source, the steps
of the source that is trained on its own, and what a method does before its first step. None shares what it draws with
another."""

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

_PARAMS, _MODEL_STATE = "target/params", "target/model_state"  # Pre-training trains the source as a target.


@dataclass(frozen=True)
class SourcePlan:
    """Where the source of each seed comes from.

    Attributes:
      live: whether it trains together with the target.
      lengths: the lengths of its pre-training, 0 steps for an untrained source; None without pre-training.
      snapshots: the number of saved steps in its trajectory; None for no trajectory.
      read: `seed -> source`, if it is read or untrained; None if it is trained.
    """

    live: bool = False
    lengths: Lengths | None = None
    snapshots: int | None = None
    read: Callable[[int], TrainState] | None = None


def plan_source(scenario: Scenario, config: RunConfig) -> SourcePlan:
    """Returns where the source of a scenario comes from.

    Raises:
      ValueError: there is no file or run to read it from, the run has not saved it for every seed, or a source control
        although the target is its own source.
    """
    role, lengths = scenario.source, scenario.schedule.source
    if role is None:
        if config.source_control != "none":
            raise ValueError(
                f"a target that is its own source has no control: leave out source_control {config.source_control}"
            )
        return SourcePlan()

    def start(seed: int) -> TrainState:
        return TrainState(*role.init(initial_key(seed, "source")), None)

    if config.source_control == "random":
        return SourcePlan(lengths=lengths._replace(steps=0), read=start)
    if config.source == "live":
        return SourcePlan(live=True)
    if config.source == "pretrained":
        return SourcePlan(lengths=lengths)
    path = config.source_from
    if config.source == "trajectory" and path is None:
        # Saves coincide with reports.
        every = lengths.report_every * max(1, round(lengths.steps / config.snapshots / lengths.report_every))
        return SourcePlan(lengths=lengths._replace(checkpoint_every=every), snapshots=math.ceil(lengths.steps / every))
    assert path is not None  # config.check
    path = find_weights(path)
    shapes = jax.eval_shape(lambda: start(0))  # Mismatches are refused before a model is created.
    if config.source == "frozen" and not (path / "checkpoints").is_dir():
        _read_variables(role, path, shapes, None)
        return SourcePlan(read=lambda seed: _read_file(role, path, start(seed), seed))
    folders = _source_folders(path, config.seed_range)
    _read_last(folders[config.first_seed], shapes)
    if config.source == "frozen":
        return SourcePlan(read=lambda seed: _read_last(folders[seed], start(seed)))
    return SourcePlan(
        snapshots=_count_snapshots(path, folders.values()),
        read=lambda seed: read_trajectory(folders[seed], start(seed)),
    )


def initial_key(seed: int, purpose: Purpose) -> jax.Array:
    """Returns a seed's key for one purpose; it draws the same values on every backend."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), PURPOSES.index(purpose))


def control_source(control: SourceControl, source: TrainState, seed: int) -> TrainState:
    """Returns the control source that replaces a trained one.

    `shuffled` permutes the entries of each parameter leaf, which keeps values but no structure. `noise` redraws each
    leaf from a normal distribution with its mean and standard deviation. BatchNorm statistics stay. Other controls
    concern the training, and the source is returned unchanged. Our choice: leaf by leaf, so that a layer's scale, which
    helps by itself, is kept.

    Args:
      control: the control's name.
      source: the trained source.
      seed: determines all random draws.
    """
    draws = {"shuffled": _permuted, "noise": _normal}
    if control not in draws:
        return source
    keys = optax.tree.split_key_like(initial_key(seed, "control"), source.params)
    return source.replace(params=jax.tree.map(draws[control], keys, source.params))


def read_trajectory(folder: Path, start: TrainState) -> TrainState:
    """Returns all saved steps of a pre-trained source, leaves `[K, ...]`.

    Raises:
      ValueError: the saved steps do not fit the model.
    """
    with Checkpoints(folder, read_only=True) as checkpoints:
        return _read_parts(folder, start, lambda parts: load_trajectory(checkpoints, parts).parts)


def _permuted(key: jax.Array, leaf: Any) -> jax.Array:
    return jax.random.permutation(key, jnp.ravel(leaf)).reshape(leaf.shape)


def _normal(key: jax.Array, leaf: Any) -> jax.Array:
    # In float32: normal numbers that JAX draws in bfloat16 have 128 values.
    drawn = jax.random.normal(key, leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
    return (jnp.mean(leaf) + jnp.std(leaf) * drawn).astype(leaf.dtype)


def _source_folders(run: Path, seeds: range) -> dict[int, Path]:
    """Returns the checkpoint folders of the source of every seed."""
    folders = {seed: run / "checkpoints" / f"source-seed{seed}" for seed in seeds}
    missing = [folder.name for folder in folders.values() if not folder.is_dir()]
    if missing:
        raise ValueError(
            f"{run} has no checkpoints of {', '.join(missing)}: it must be the folder of a run that trained a source"
            " on its own (--source pretrained or trajectory) for the same seeds"
        )
    return folders


def _count_snapshots(run: Path, folders: Iterable[Path]) -> int:
    """Returns the number of saved steps, which is the same for every seed."""
    counts = []
    for folder in folders:
        with Checkpoints(folder, read_only=True) as checkpoints:
            counts.append(len(checkpoints.steps))
    if len(set(counts)) > 1 or counts[0] < 2:
        raise ValueError(
            f"a trajectory needs the same number of saved steps, 2 or more, of every seed; {run} has {counts}: train"
            " it with --source trajectory, which keeps them"
        )
    return counts[0]


def _read_last(folder: Path, start: TrainState) -> TrainState:
    with Checkpoints(folder, read_only=True) as checkpoints:
        if checkpoints.latest_step is None:
            raise ValueError(f"{folder} has no saved steps")
        return _read_parts(folder, start, partial(checkpoints.restore_parts, checkpoints.latest_step))


def _read_parts(folder: Path, start: TrainState, read: Callable[[dict[str, Any]], dict[str, Any]]) -> TrainState:
    """Returns the parts to read of a pre-trained source."""
    with error_context(f"the source in {folder} cannot be that of this run"):
        parts = read({_PARAMS: start.params, _MODEL_STATE: start.model_state})
    return TrainState(parts[_PARAMS], parts[_MODEL_STATE], None)


def _read_file(role: StudyModel, path: Path, start: TrainState, seed: int) -> TrainState:
    variables = _read_variables(role, path, start, seed)
    model_state = {name: jax.tree.map(jnp.asarray, variable) for name, variable in variables.items()}
    return TrainState(model_state.pop("params"), model_state, None)


def _read_variables(role: StudyModel, path: Path, start: TrainState, seed: int | None) -> dict[str, Any]:
    """Returns parameters and model state by name; without model state in the file, keeps the initial one."""
    variables = {"params": start.params, **start.model_state}
    try:
        leaves = weight_paths(path)
        ours = flatten(start.params).keys()
        found = {leaf.removeprefix("params/") for leaf in leaves}
        # Some names occur everywhere, such as fc/bias; big_vision uses params itself.
        if role.load_pretrained is not None and 2 * len(ours & found) < len(ours):
            return role.load_pretrained(path, variables, seed)
        if any(leaf.startswith("params/") for leaf in leaves):
            # With its model state, as written by `merge-jax export`.
            return dict(load_params(path, variables))
        return {**variables, "params": role.load(path, start.params)}
    except (OSError, ImportError) as error:
        raise ValueError(f"the source cannot be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"{error}; the source must be {role.name}") from None
