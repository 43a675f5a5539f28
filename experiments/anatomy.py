"""What a transfer did to the target: how far it moved, how much of the copy remains, how similar its layers are.

    python -m experiments.anatomy cross_structure runs/cross_structure-001

Reads the last checkpoints of a run of cross_structure or cross_task, without training. For each method, over seeds:

- moved: |T_end - T_start| / |T_start| over the leaves that have a route.
- kept: the cosine between T_end and the source over the entries that sharing would copy. It is 1 if the copy is
  unchanged, about 0 if none of it remains or nothing was copied.
- rank: the effective rank of T_end - T_start, as a fraction of full rank, averaged over its matrices.
- the cka of each layer in the run's --agree with the source's layer, on the validation images.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import merge_jax as mj
from merge_jax import study
from merge_jax.checks import check_choice
from merge_jax.study.cli import as_found, folded
from merge_jax.study.contents import current_options
from merge_jax.training.compilation_cache import CacheChoice, use_cache

from . import cross_structure, cross_task

__all__ = ["main", "measure"]

_MODULE = __spec__.name if __spec__ else __name__
_EXPERIMENTS: dict[str, Any] = {"cross_structure": cross_structure, "cross_task": cross_task}


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    experiment: Annotated[
        tyro.conf.Positional[Literal["cross_structure", "cross_task"]], tyro.conf.arg(metavar="EXPERIMENT")
    ]
    """Which experiment the run is of: cross_structure or cross_task."""
    run_dir: tyro.conf.Positional[Path]
    """Folder of a run that has ended."""
    methods: tuple[str, ...] = ()
    """Methods to measure; all of the run by default."""
    compilation_cache: CacheChoice = "default"
    """Where compiled programs are kept for later runs: none, or a folder, which may grow to 512 MiB. By default that of
    JAX_COMPILATION_CACHE_DIR, or one in the user's cache folder."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads a run and prints the table; errors are one line on standard error and exit code 2."""
    description = folded(as_found(__doc__ or "", _MODULE))
    options = tyro.cli(Options, args=arguments, prog=f"python -m {_MODULE}", description=description)
    try:
        use_cache(options.compilation_cache)
        scenario, config = _read(options)
        names = options.methods or tuple(scenario.methods)
        for name in names:
            check_choice("method of the run", name, scenario.methods)
        observers = _observers(scenario, config)
        rows = {name: _over_seeds(scenario, config, observers, options.run_dir, name) for name in names}
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1), title=f"anatomy of {options.run_dir}")
    table.add_column("method", no_wrap=True)
    for name in next(iter(rows.values())):
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in rows.items():
        table.add_row(name, *map(_format, values.values()))
    Console(width=max(140, Console().width)).print(table)


def measure(
    start: "mj.Params", end: "mj.Params", source: "mj.Params", routes: "Sequence[mj.Route]"
) -> dict[str, float]:
    """Returns `moved`, `kept` and `rank` of a target trained from `start` to `end`; see the module.

    Raises:
      ValueError: routes that do not fit the parameters.
    """
    import jax
    import jax.numpy as jnp

    copying = mj.share_transfer(routes)
    copied = mj.flatten(copying.apply({}, jax.tree.map(jnp.ones_like, source), jax.tree.map(jnp.zeros_like, end)))
    copy, before, after = (mj.flatten(tree) for tree in (copying.apply({}, source, end), start, end))
    routed = [path for path, mask in copied.items() if np.any(mask)]
    changes = {path: np.asarray(after[path] - before[path], np.float64) for path in routed}
    moved = _norm(changes.values()) / _norm(before[path] for path in routed)
    masks = {path: np.asarray(copied[path]) > 0 for path in routed}
    found, given = (
        np.concatenate([np.asarray(tree[path], np.float64)[masks[path]] for path in routed]) for tree in (after, copy)
    )
    kept = found @ given / max(_norm([found]) * _norm([given]), 1e-12)
    ranks = [_effective_rank(change.reshape(-1, change.shape[-1])) for change in changes.values() if change.ndim > 1]
    return {"moved": moved, "kept": float(kept), "rank": float(np.mean(ranks)) if ranks else float("nan")}


def _effective_rank(matrix: np.ndarray) -> float:
    """Returns the exponential of the entropy of the singular values, divided by full rank (Roy and Vetterli, 2007)."""
    values = np.linalg.svd(matrix, compute_uv=False)
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))) / len(values))


def _norm(arrays: Any) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(array, np.float64)).sum() for array in arrays)))


def _read(options: Options) -> "tuple[study.Scenario, Any]":
    """Returns the scenario of a run, from the options in its folder.

    Raises:
      ValueError: no such run, one of another experiment or version, or one whose routes are not named.
    """
    path = options.run_dir / "config.json"
    if not path.exists():
        raise ValueError(f"{options.run_dir} is not a run folder: it has no config.json")
    module = _EXPERIMENTS[options.experiment]
    saved = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in current_options(json.loads(path.read_text())).items()
        if name != "contents"
    }
    try:
        config = replace(module.PRESETS["default"], **{"adapter_routes": (), **saved})
    except TypeError as error:
        raise ValueError(f"{path} is of another experiment or version: {error}") from None
    if config.source_from is not None:
        config = replace(config, source_from=Path(config.source_from))
    if not config.agree:
        raise ValueError("the run has no layers that are to agree (--agree): nothing to compare features of")
    if not all("=" in word for word in config.routes):
        raise ValueError(f"the routes {', '.join(config.routes)} are not named by leaves: nothing to measure")
    return module.build(config), config


def _over_seeds(
    scenario: "study.Scenario", config: Any, observers: Sequence[Callable[..., Any]], run_dir: Path, method: str
) -> dict[str, list[float]]:
    """Returns a method's measurements, each a list over seeds."""
    found: dict[str, list[float]] = {}
    for seed in config.seed_range:
        folder = run_dir / "checkpoints" / f"{method}-seed{seed}"
        for name, value in _measure_seed(scenario, config, observers, folder, seed).items():
            found.setdefault(name, []).append(value)
    return found


def _observers(scenario: "study.Scenario", config: Any) -> list[Callable[..., Any]]:
    """Returns functions that compute the features of target and source in the agreement layers."""
    import jax

    models = (scenario.target, scenario.source)
    return [
        jax.jit(mj.features_teacher(model.apply, layers, inputs=model.inputs))
        for model, layers in zip(models, zip(*config.agreeing_layers(), strict=True), strict=True)
        if model is not None and model.apply is not None
    ]


def _measure_seed(
    scenario: "study.Scenario", config: Any, observers: Sequence[Callable[..., Any]], folder: Path, seed: int
) -> dict[str, float]:
    from merge_jax.study.sources import initial_key

    source, target = scenario.source, scenario.target
    assert source is not None  # Both experiments have one.
    source_params, source_state = source.init(initial_key(seed, "source"))
    start, target_state = target.init(initial_key(seed, "target"))
    shapes = {
        **{"source/params": source_params, "source/model_state": source_state},
        **{"target/params": start, "target/model_state": target_state},
    }
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint {folder}: the run has not ended")
    with mj.Checkpoints(folder) as checkpoints:
        step = checkpoints.latest_step
        if step is None:
            raise ValueError(f"{folder} has no saved steps")
        saved = checkpoints.restore_parts(step, shapes)
    params = {role: saved[f"{role}/params"] for role in ("source", "target")}
    found = measure(start, params["target"], params["source"], study.parse_routes(config.routes))
    batch = dict(target.splits(seed).validation)
    features = [
        observe(params[role], saved[f"{role}/model_state"], batch)["source_features"]
        for role, observe in zip(("target", "source"), observers, strict=True)
    ]
    for (layer, _), *pair in zip(config.agreeing_layers(), *features, strict=True):
        found[f"cka {layer}"] = float(mj.objectives.cka(*pair))
    return found


def _format(values: Sequence[float]) -> str:
    from merge_jax.runs import mean_and_error

    mean, error = mean_and_error(values)
    return f"{mean:.2f}" + ("" if error is None else f" ± {error:.2f}")


if __name__ == "__main__":
    main()
