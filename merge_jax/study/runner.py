"""Runs a scenario: every method on every seed, paired, in one resumable run folder."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.stages import Lowered
from rich.console import Console
from tqdm.auto import tqdm

from merge_jax.checkpoints.orbax import CheckpointError
from merge_jax.checkpoints.weights.load import find_weights, weight_paths
from merge_jax.checks import check_finite
from merge_jax.runs import OPPONENTS, PLAN, Plan, Run
from merge_jax.runs.folder import RunFolder, check_space, numbered_folder
from merge_jax.study.config import RunConfig
from merge_jax.study.contents import extended_options, run_identity
from merge_jax.study.measures import make_opponents
from merge_jax.study.plan import checkpoint_bytes, make_plan
from merge_jax.study.results import save_sample_images, show_results, trial_result
from merge_jax.study.scenario import Scenario
from merge_jax.study.sources import SourcePlan, control_source, plan_source, read_trajectory
from merge_jax.study.trainer import Programs, RunStoppedError, Trainer
from merge_jax.study.trial import Trial, make_trials
from merge_jax.training.joint import TrainState
from merge_jax.training.nonfinite import NumericFaultError
from merge_jax.training.sharding import Layout, data_mesh, jit_layout, pmap_layout
from merge_jax.training.signals import StopSignals

__all__ = ["Checked", "check_paths", "check_run", "prepare_run"]


class Checked(NamedTuple):
    """A validated run.

    Attributes:
      source_plan: where the source comes from.
      trials: the trials, by name.
      layout: its placement on devices.
      lowered: the traced epoch of each trial.
    """

    source_plan: SourcePlan
    trials: Mapping[str, Trial]
    layout: Layout
    lowered: Mapping[str, Lowered]


def prepare_run(scenario: Scenario, config: RunConfig, expected: str = "", caution: str = "") -> Callable[[], None]:
    """Checks everything checkable, opens the run folder, and returns the training function.

    Args:
      scenario: the scenario to run.
      config: the options of the run.
      expected: the measured duration; empty if not measured.
      caution: why its figures mean little, if so; otherwise empty.

    Raises:
      ValueError: an option out of range, a route or a loss that does not fit the models, unavailable data, or an
        unusable run folder.
    """
    print("checking that models, data and routes fit together", file=sys.stderr)
    with Console(stderr=True).status("tracing"):
        checked = check_run(scenario, config)
    plan = make_plan(scenario, config, checked.source_plan, checked.layout, expected, caution)
    identity = run_identity(config)
    needed = checkpoint_bytes(checked.trials, checked.lowered, config.seeds)
    with numbered_folder(scenario.name, config.resume, given=config.run_dir) as run_dir:
        check_space(run_dir, needed)
        folder = RunFolder.open(
            run_dir, identity, resume=config.resume, translate=partial(extended_options, config=config)
        )
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


def check_paths(config: RunConfig) -> None:
    """Raises ValueError for an unusable run folder or source, before creating models and data."""
    if config.source_from is not None:
        path = find_weights(config.source_from)
        if not path.exists():
            raise ValueError(f"the source cannot be read: there is no file or folder {path}")
        if config.source == "frozen" and not (path / "checkpoints").is_dir():
            try:
                weight_paths(path)
            except (OSError, ImportError) as error:
                raise ValueError(f"the source cannot be read: {error}") from None
    if config.run_dir is not None and jax.process_index() == 0:
        RunFolder.check(
            config.run_dir,
            run_identity(config),
            resume=config.resume,
            translate=partial(extended_options, config=config),
        )


def check_run(scenario: Scenario, config: RunConfig) -> Checked:
    """Checks everything that does not need a run folder.

    Raises:
      ValueError: an option out of range, a route or a loss that does not fit the models, or unavailable data or source.
    """
    source_plan = plan_source(scenario, config)
    if source_plan.read is not None and not config.resume:  # Before slow work; a resumed run started with this.
        for seed in config.seed_range:
            check_finite(f"the source of seed {seed}", source_plan.read(seed).params)
    trials = make_trials(scenario, config, source_plan)
    if config.axis_name != scenario.axis_name:
        raise ValueError(
            f"{scenario.name} does not support --parallel pmap: use --parallel jit, which can split any run"
        )
    if config.parallel == "pmap":
        layout = pmap_layout(config.devices)
    else:
        layout = jit_layout(data_mesh(config.devices), sharded=config.shard_state)
    # Shapes suffice to check that everything fits.
    return Checked(source_plan, trials, layout, {name: trial.lower(layout) for name, trial in trials.items()})


def _run(
    scenario: Scenario, config: RunConfig, checked: Checked, plan: Plan, folder: RunFolder, signals: StopSignals
) -> None:
    """Trains unfinished trials, then prints and saves the results."""
    results = folder.read_json("results.json", [])
    folder.write_json(PLAN, plan.to_json())
    print("\n".join(plan.lines()))
    print(f"expected time: {plan.expected or 'not measured for these options; the bar tells it once steps run'}")
    print(f"run folder: {folder.path}", flush=True)
    done = {(result["method"], result["seed"]) for result in results}
    missing = {seed: [name for name in scenario.methods if (name, seed) not in done] for seed in config.seed_range}
    if any(missing.values()):
        _train(scenario, config, checked, missing, folder, signals, results)
    else:
        print("all runs are done already: nothing to train")
    if jax.process_index() == 0:
        save_sample_images(scenario, results, folder)
        show_results(Run.read(folder.path), folder)


def _compile(checked: Checked, missing: Mapping[int, Sequence[str]], folder: RunFolder) -> Programs:
    """Returns the programs; compiles those of trials with unfinished seeds."""
    wanted = {name for names in missing.values() for name in names}
    if "source" in checked.trials:
        source = checked.trials["source"]
        last = str(source.lengths.steps)
        if not all((folder.checkpoints / source.run_name(seed) / last).is_dir() for seed in missing):
            wanted.add("source")
    names = [name for name in checked.trials if name in wanted]
    if len(names) < len(checked.trials):
        ended = [name for name in checked.trials if name not in wanted]
        print(f"done already: {', '.join(ended)}; to train: {', '.join(names)}", flush=True)
    programs = Programs(checked.lowered)
    for number, name in enumerate(names, start=1):
        programs.compile(name, f", {number} of {len(names)}")
    return programs


def _train(
    scenario: Scenario,
    config: RunConfig,
    checked: Checked,
    missing: Mapping[int, Sequence[str]],
    folder: RunFolder,
    signals: StopSignals,
    results: list[dict[str, Any]],
) -> None:
    """Trains every method on every seed without a result, and adds the results to the list and the folder."""
    programs = _compile(checked, missing, folder)
    controlled = config.source_control != "none"
    measure = make_opponents(scenario, checked.source_plan, controlled=controlled)
    opponents = folder.read_json(OPPONENTS, [])
    with _progress(scenario, checked, missing) as bar, signals:
        trainer = Trainer(checked.layout, programs, folder, bar, signals)
        for seed, names in missing.items():
            if not names:  # So its source is not needed.
                continue
            source = control_source(config.source_control, _source(trainer, checked, seed, folder), seed)
            known = {entry["opponent"] for entry in opponents if entry["seed"] == seed}
            if wanted := set(config.opponents) - known:
                found = measure(source, seed, wanted)
                opponents += [{"opponent": name, "seed": seed, "target_test": value} for name, value in found.items()]
                folder.write_json(OPPONENTS, opponents)
            for name in names:
                trial = checked.trials[name]
                trained = trainer.train(trial, seed, source)
                tested = (result["test_metrics"]["source"] for result in results if result["seed"] == seed)
                result = trial_result(trial, seed, trained, next(tested, None) if trial.source_task is None else None)
                results.append(result)
                folder.write_json("results.json", results)
                trainer.announce(f"{name}-seed{seed}: {100 * result['target_test']:.1f} %")


def _progress(scenario: Scenario, checked: Checked, missing: Mapping[int, Sequence[str]]) -> tqdm:
    """Returns the progress bar of all steps, starting with finished ones.

    In a file, one line for each finished method and seed is more useful.
    """
    steps = {name: trial.lengths.steps for name, trial in checked.trials.items()}
    # If no method of a seed is missing, its source is not needed.
    done = [scenario.methods.keys() - names if names else steps.keys() for names in missing.values()]
    return tqdm(
        total=len(missing) * sum(steps.values()),
        initial=sum(steps[name] for names in done for name in names),
        unit="step",
        desc=scenario.name,
        mininterval=0.5,
        disable=jax.process_index() > 0 or not sys.stderr.isatty(),
    )


def _source(trainer: Trainer, checked: Checked, seed: int, folder: RunFolder) -> TrainState:
    """Returns the source that all methods of a seed start from: read, pre-trained, or fresh if live."""
    source_plan, trials = checked.source_plan, checked.trials
    if source_plan.read is not None:
        return source_plan.read(seed)
    if "source" not in trials:
        return next(iter(trials.values())).fresh_source(seed)
    trial = trials["source"]
    trained = trainer.train(trial, seed, trial.fresh_source(seed)).state.target
    if source_plan.snapshots is None:
        return trained
    return read_trajectory(folder.checkpoints / trial.run_name(seed), trained)
