"""Runs a scenario: every method on every seed, paired, in one run folder that can be resumed."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.stages import Lowered
from rich.console import Console
from tqdm.auto import tqdm

from merge_jax.checkpoints.orbax import CheckpointError
from merge_jax.checkpoints.safetensors import leaf_paths
from merge_jax.runs import PLAN, Plan, Run, as_text, draw, followed, html_report, judged, notes, result_tables
from merge_jax.runs.folder import MetricsLog, RunFolder, check_space, numbered_folder
from merge_jax.study.config import RunConfig
from merge_jax.study.controls import controlled
from merge_jax.study.plan import make_plan
from merge_jax.study.samples import save_samples
from merge_jax.study.scenario import Scenario
from merge_jax.study.sources import Origin, origin_of, read_trajectory
from merge_jax.study.trainer import Compiled, RunStoppedError, Trainer, cell_name, compile_epoch, steps_per_call
from merge_jax.study.trial import Stage, make_stages
from merge_jax.training.compilation_cache import programs_read
from merge_jax.training.joint import TrainState
from merge_jax.training.nonfinite import NumericFaultError, check_finite
from merge_jax.training.sharding import Layout, data_mesh, jit_layout, pmap_layout
from merge_jax.training.signals import StopSignals

__all__ = ["Checked", "check_paths", "check_run", "prepare_run"]


class Checked(NamedTuple):
    """A run whose parts fit together.

    Attributes:
      origin: where the source comes from.
      stages: what is trained.
      layout: how it lies on devices.
      lowered: the traced epoch of each stage.
    """

    origin: Origin
    stages: Mapping[str, Stage]
    layout: Layout
    lowered: Mapping[str, Lowered]


def check_run(scenario: Scenario, config: RunConfig) -> Checked:
    """Checks all that can be checked without a run folder.

    Raises:
      ValueError: an option out of range, a route or a loss that does not fit the models, data or a source that cannot
        be had.
    """
    origin = origin_of(scenario, config)
    if origin.read is not None and not config.resume:  # Before what takes long; a run that goes on began with this.
        for seed in range(config.seeds):
            check_finite(f"the source of seed {seed}", origin.read(seed).params)
    stages = make_stages(scenario, config, origin)
    if config.axis_name != scenario.axis_name:
        raise ValueError(f"{scenario.name} is not made for --parallel pmap: take --parallel jit, which splits any run")
    if config.parallel == "pmap":
        layout = pmap_layout(config.devices)
    else:
        layout = jit_layout(data_mesh(config.devices), sharded=config.shard_state)
    # Shapes alone tell whether all fits together.
    side_by_side = config.seeds if _side_by_side(config) else None
    lowered = {name: stage.lower(layout, steps_per_call(stage), side_by_side) for name, stage in stages.items()}
    return Checked(origin, stages, layout, lowered)


def check_paths(config: RunConfig) -> None:
    """Raises ValueError for a run folder or a source that cannot be used, before models and data are made."""
    path = config.source_from
    if path is not None:
        if not path.exists():
            raise ValueError(f"the source cannot be read: there is no file or folder {path}")
        if config.source == "frozen" and not (path / "checkpoints").is_dir():
            try:
                leaf_paths(path)
            except OSError as error:
                raise ValueError(f"the source cannot be read: {error}") from None
    if config.run_dir is not None and jax.process_index() == 0:
        RunFolder.check(config.run_dir, config.identity(), resume=config.resume)


def prepare_run(scenario: Scenario, config: RunConfig, expected: str = "", caution: str = "") -> Callable[[], None]:
    """Checks all that can be checked, opens the run folder, and returns the function that trains.

    Args:
      scenario: what to run.
      config: how.
      expected: how long this took where it was measured; empty where it was not.
      caution: why its figures mean little; empty where they do not.

    Raises:
      ValueError: an option out of range, a route or a loss that does not fit the models, data that cannot be
        had, a run folder that cannot be used.
    """
    print("checking that models, data and routes fit together", file=sys.stderr)
    with Console(stderr=True).status("tracing"):
        checked = check_run(scenario, config)
    plan = make_plan(scenario, config, checked.origin, checked.layout, expected, caution)
    identity = config.identity()
    with numbered_folder(scenario.name, config.resume, given=config.run_dir) as run_dir:
        check_space(run_dir, _checkpoint_bytes(checked, config))
        folder = RunFolder.open(run_dir, identity, resume=config.resume)
    if scenario.attach is not None and jax.process_index() == 0:
        scenario.attach(folder.path)
    signals = StopSignals()
    where = "" if config.run_dir else f" --run-dir {folder.path}"
    go_on = f"the same command with --resume{where} goes on"

    def run() -> None:
        try:
            _run(scenario, config, checked, plan, folder, signals)
        except KeyboardInterrupt:
            print(f"\ninterrupted; {go_on} from the last checkpoint", file=sys.stderr)
            raise SystemExit(130) from None
        except RunStoppedError as stopped:
            print(f"\nstopped: {stopped}, which is saved; {go_on} from there", file=sys.stderr)
            raise SystemExit(128 + (signals.received or 0)) from None
        except CheckpointError as problem:
            print(f"\nerror: {problem}", file=sys.stderr)
            raise SystemExit(2) from None
        except NumericFaultError as fault:
            print(f"\nerror: {fault}; checkpoints of the steps before are in {folder.checkpoints}", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            folder.close()

    return run


def _checkpoint_bytes(checked: Checked, config: RunConfig) -> int:
    """Returns about how many bytes the checkpoints of a run take on the disk when it has ended."""
    total = 0
    for name, stage in checked.stages.items():
        state, *_ = checked.lowered[name].args_info[0]
        of_state = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        saves = math.ceil(stage.lengths.steps / stage.lengths.checkpoint_every)
        kept = saves if stage.keep is None else min(saves, stage.keep + 1)  # The best one too.
        total += of_state * kept * (1 if _side_by_side(config) else config.seeds)
    return total


def _run(
    scenario: Scenario,
    config: RunConfig,
    checked: Checked,
    plan: Plan,
    folder: RunFolder,
    signals: StopSignals,
) -> None:
    """Trains what is not done yet, then prints and saves what came out."""
    origin, stages, layout, lowered = checked
    log = MetricsLog(folder)
    results = folder.read_json("results.json", [])
    folder.write_json(PLAN, plan.to_json())
    print("\n".join(plan.lines()))
    print(f"expected time: {plan.expected or 'not measured for these options; the bar tells it once steps run'}")
    print(f"run folder: {folder.path}", flush=True)
    if len(results) == config.seeds * len(scenario.methods):
        print("all runs are done already: nothing to train")
    else:
        names = _to_train(stages, config, folder, results)
        if len(names) < len(stages):
            done = [name for name in stages if name not in names]
            print(f"done already: {', '.join(done)}; to train: {', '.join(names)}", flush=True)
        compiled = _compiled({name: lowered[name] for name in names})
        total = config.seeds * sum(stage.lengths.steps for stage in stages.values())
        # In a file, a line for each method and seed that has ended is what a reader can use.
        silent = jax.process_index() > 0 or not sys.stderr.isatty()
        with tqdm(total=total, unit="step", desc=scenario.name, mininterval=0.5, disable=silent) as bar, signals:
            trainer = Trainer(layout, lowered, compiled, folder, log, bar, signals)
            _train_all(scenario, config, origin, stages, trainer, log, folder, results)
    if jax.process_index() == 0:
        save_samples(scenario, results, folder)
        _show(Run.read(folder.path), folder)


def _to_train(
    stages: Mapping[str, Stage], config: RunConfig, folder: RunFolder, results: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Returns the stages that are not done yet for every seed."""
    seeds = range(config.seeds)
    done = {(result["method"], result["seed"]) for result in results}
    names = [name for name in stages if not {(name, seed) for seed in seeds} <= done]
    if "source" in stages:
        last = str(stages["source"].lengths.steps)
        groups = [seeds] if _side_by_side(config) else [[seed] for seed in seeds]
        if all((folder.checkpoints / cell_name(stages["source"], group) / last).is_dir() for group in groups):
            names.remove("source")
    return names


def _compiled(lowered: Mapping[str, Lowered]) -> dict[str, Compiled]:
    """Returns the programs compiled, and says how far it is: on a CPU it may take longer than the training."""
    compiled: dict[str, Compiled] = {}
    for number, (name, program) in enumerate(lowered.items(), start=1):
        with Console(stderr=True).status(f"compiling {name}, {number} of {len(lowered)}"):
            before = programs_read()
            compiled[name] = compile_epoch(program)
        read = " (read from the compilation cache)" if programs_read() > before else ""
        print(f"compiled {name}, {number} of {len(lowered)}: {compiled[name].seconds:.0f} s{read}", file=sys.stderr)
    return compiled


def _show(run: Run, folder: RunFolder) -> None:
    """Prints and saves the table, the pictures and the report."""
    text = as_text(result_tables(run), notes(run))
    print(text, end="")
    folder.write_text("table.txt", text)
    print("drawing curves and writing the report", file=sys.stderr)
    curves, label = judged(run)
    draw(curves, label).savefig(folder.path / "curves.png", dpi=150)
    gates, label = followed(run)
    if gates:
        draw(gates, label).savefig(folder.path / "gates.png", dpi=150)
    folder.write_text("report.html", html_report(run))
    print(f"run folder: {run.path}; all of it on one page: {run.path / 'report.html'}")
    export = "" if run.trained is None else f", or merge-jax export {run.trained} FILE.safetensors"
    print(f"next: merge-jax compare {run.path} ANOTHER_RUN, merge-jax summary {run.path}{export}")


def _train_all(
    scenario: Scenario,
    config: RunConfig,
    origin: Origin,
    stages: Mapping[str, Stage],
    trainer: Trainer,
    log: MetricsLog,
    folder: RunFolder,
    results: list[dict[str, Any]],
) -> None:
    """Trains every method on every seed that has no result yet, and adds its results to the list and the folder."""
    done = {(result["method"], result["seed"]) for result in results}
    groups = [range(config.seeds)] if _side_by_side(config) else [[seed] for seed in range(config.seeds)]
    for seeds in groups:
        missing = [name for name in scenario.methods if not {(name, seed) for seed in seeds} <= done]
        for name in stages if not missing else scenario.methods.keys() - missing:
            trainer.skip(stages[name], seeds)
        if not missing:  # So its source is not needed.
            continue
        sources = [
            controlled(config.source_control, source, seed)
            for seed, source in zip(seeds, _sources(trainer, origin, stages, seeds, folder), strict=True)
        ]
        for name in missing:
            new = _results(trainer, stages[name], seeds, sources, log)
            results += new
            folder.write_json("results.json", results)
            for result in new:
                trainer.tell(f"{name}-seed{result['seed']}: {100 * result['target_test']:.1f} %")


def _side_by_side(config: RunConfig) -> bool:
    return config.vectorized and config.seeds > 1


def _sources(
    trainer: Trainer,
    origin: Origin,
    stages: Mapping[str, Stage],
    seeds: Sequence[int],
    folder: RunFolder,
) -> list[TrainState]:
    """Returns the source that all methods of a seed start from: read, trained first, or fresh where it is live."""
    if origin.read is not None:
        return [origin.read(seed) for seed in seeds]
    if "source" not in stages:
        return [next(iter(stages.values())).fresh_source(seed) for seed in seeds]
    alone = stages["source"]
    outcomes = trainer.train(alone, seeds, [alone.fresh_source(seed) for seed in seeds])
    if origin.snapshots is None:
        return [outcome.state.target for outcome in outcomes]
    return [
        read_trajectory(folder.checkpoints / f"source-seed{seed}", outcome.state.target)
        for seed, outcome in zip(seeds, outcomes, strict=True)
    ]


def _results(
    trainer: Trainer, stage: Stage, seeds: Sequence[int], sources: Sequence[TrainState], log: MetricsLog
) -> list[dict[str, Any]]:
    """Trains one method on some seeds and returns what the table says of each."""
    outcomes = trainer.train(stage, seeds, sources)
    records = log.records()
    validation, faults = _validation(stage, records), _faults(stage, records)
    results = []
    for seed, (state, seconds) in zip(seeds, outcomes, strict=True):
        metrics = {role: stage.test(state, seed, role) for role in ("target", "source")}
        rows = stage.method.transfer.describe(state.source.params, state.target.params)
        results.append(
            {
                "method": stage.name,
                "seed": seed,
                "target_metric": stage.roles["target"].metric,
                "target_test": metrics["target"][stage.roles["target"].metric],
                "target_validation": validation[seed][-1] if seed in validation else None,
                "target_best_validation": max(validation[seed]) if seed in validation else None,
                "source_test": metrics["source"][stage.roles["source"].metric] if metrics["source"] else None,
                "test_metrics": metrics,
                "answers": stage.answers(state) if seed == 0 else {},
                "faults": faults.get(seed, {}),
                "seconds": seconds,
                "compile_seconds": trainer.compile_seconds(stage),
                # Without the zeros around padded ones.
                "adapter_parameters": sum(row.parameters for row in rows),
            }
        )
    return results


def _faults(stage: Stage, records: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, int]]:
    """Returns how many updates of each seed were skipped, and transfers rejected, by role; none where there were none.

    Steps of a report that was cut short by a stop are not counted.
    """
    counts: dict[int, dict[str, int]] = {}
    last: dict[str, int] = {}
    for record in records:
        name, _, seed = record["run"].rpartition("-seed")
        steps = record["step"] - last.get(record["run"], 0)
        last[record["run"]] = record["step"]
        for metric, mean in record.items():
            if name == stage.name and metric.endswith(("/skipped", "/rejected")) and mean:
                of_seed = counts.setdefault(int(seed), {})
                of_seed[metric] = of_seed.get(metric, 0) + round(mean * steps)
    return counts


def _validation(stage: Stage, records: Sequence[Mapping[str, Any]]) -> dict[int, list[float]]:
    """Returns the target's validation metric of each seed, report by report."""
    values: dict[int, list[float]] = {}
    metric = f"target/validation_{stage.roles['target'].metric}"
    for record in records:
        name, _, seed = record["run"].rpartition("-seed")
        if name == stage.name and metric in record:
            values.setdefault(int(seed), []).append(record[metric])
    return values
