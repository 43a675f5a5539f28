"""Runs a scenario: every method on every seed, paired, in one run folder that can be resumed."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.stages import Lowered
from rich.console import Console
from tqdm.auto import tqdm

from experiments.config import RunConfig
from experiments.report import print_plan, print_results, save_curves
from experiments.scenario import Scenario
from experiments.stages import Stage, make_stages
from merge_jax.checkpoint import Checkpoints
from merge_jax.joint import JointState, JointStep, TrainState
from merge_jax.loop import run_loop
from merge_jax.runs import MetricsLog, RunFolder

__all__ = ["prepare_run"]

_RUNS = Path("runs")


def prepare_run(scenario: Scenario, config: RunConfig) -> Callable[[], None]:
    """Checks all that can be checked, opens the run folder, and returns the function that trains.

    Raises:
      ValueError: an option out of range, a route or a loss that does not fit the models, data that cannot be
        had, a run folder that cannot be used.
    """
    stages = make_stages(scenario, config)
    # Shapes alone tell whether all fits together.
    lowered = {name: stage.lower() for name, stage in stages.items()}
    options = asdict(config)
    run_dir, resume = options.pop("run_dir"), options.pop("resume")
    folder = RunFolder.open(run_dir or _numbered_folder(scenario.name, resume), options, resume=resume)

    def run() -> None:
        try:
            _run(scenario, config, stages, lowered, folder)
        except KeyboardInterrupt:
            print(
                f"\ninterrupted; the same command with --resume --run-dir {folder.path} "
                "goes on from the last checkpoint",
                file=sys.stderr,
            )
            raise SystemExit(130) from None

    return run


def _numbered_folder(name: str, resume: bool) -> Path:
    """Returns the last folder `runs/<name>-<number>` to resume, or the next one to make."""
    suffixes = [path.name.removeprefix(f"{name}-") for path in _RUNS.glob(f"{name}-*")]
    last = max((int(suffix) for suffix in suffixes if suffix.isdigit()), default=0)
    return _RUNS / f"{name}-{max(last, 1) if resume else last + 1:03d}"


class _Compiled(NamedTuple):
    """A compiled joint step, and how long its compilation took, in seconds."""

    step: JointStep
    seconds: float


def _run(
    scenario: Scenario,
    config: RunConfig,
    stages: Mapping[str, Stage],
    lowered: Mapping[str, Lowered],
    folder: RunFolder,
) -> None:
    """Trains what is not done yet, then prints and saves what came out."""
    log = MetricsLog(folder)
    results = folder.read_json("results.json", [])
    print_plan(scenario, config, folder)
    if len(results) == config.seeds * len(scenario.methods):
        print("all runs are done already: nothing to train")
    else:
        with Console().status("compiling"):
            compiled = {name: _compile(stage) for name, stage in lowered.items()}
        total = config.seeds * sum(stage.num_steps for stage in stages.values())
        with tqdm(total=total, unit="step", desc=scenario.name, mininterval=0.5) as bar:
            trainer = _Trainer(config, compiled, folder, log, bar)
            _train_all(scenario, config, stages, trainer, folder, results)
    print_results(scenario, config, results, folder)
    save_curves(list(scenario.methods), log.records(), folder)
    print(f"run folder: {folder.path}")


def _train_all(
    scenario: Scenario,
    config: RunConfig,
    stages: Mapping[str, Stage],
    trainer: "_Trainer",
    folder: RunFolder,
    results: list[dict[str, Any]],
) -> None:
    """Trains every method on every seed that has no result yet, and adds its result to the list and the folder."""
    done = {(result["method"], result["seed"]) for result in results}
    for seed in range(config.seeds):
        source = _source(trainer, stages, seed)
        for name in scenario.methods:
            if (name, seed) in done:
                trainer.skip(stages[name])
                continue
            results.append(_result(trainer, stages[name], seed, source))
            folder.write_json("results.json", results)


def _source(trainer: "_Trainer", stages: Mapping[str, Stage], seed: int) -> TrainState:
    """Returns the source that all methods of a seed start from: trained first, or fresh where it is live."""
    if "source" not in stages:
        return next(iter(stages.values())).fresh_source(seed)
    alone = stages["source"]
    state, _ = trainer.train(alone, seed, alone.fresh_source(seed))
    return state.target


def _result(trainer: "_Trainer", stage: Stage, seed: int, source: TrainState) -> dict[str, Any]:
    """Trains one method on one seed and returns what the table says of it."""
    state, seconds = trainer.train(stage, seed, source)
    return {
        "method": stage.name,
        "seed": seed,
        "target_test_accuracy": stage.test_accuracy(state, seed, "target"),
        "source_test_accuracy": stage.test_accuracy(state, seed, "source"),
        "seconds": seconds,
        "compile_seconds": trainer.compile_seconds(stage),
        "adapter_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.adapter.params)),
    }


def _compile(lowered: Lowered) -> _Compiled:
    start = time.perf_counter()
    step = lowered.compile()
    return _Compiled(step, time.perf_counter() - start)


class _Trainer:
    """Trains a stage on a seed, from its newest checkpoint on."""

    def __init__(
        self,
        config: RunConfig,
        compiled: Mapping[str, _Compiled],
        folder: RunFolder,
        log: MetricsLog,
        bar: tqdm,
    ):
        self._config, self._compiled, self._folder = config, compiled, folder
        self._log, self._bar = log, bar

    def skip(self, stage: Stage) -> None:
        """Counts a stage that was trained before as done."""
        self._bar.update(stage.num_steps)

    def compile_seconds(self, stage: Stage) -> float:
        """Returns how long the stage's step compiled."""
        return self._compiled[stage.name].seconds

    def train(self, stage: Stage, seed: int, source: TrainState) -> tuple[JointState, float]:
        """Returns the state at the last step, and the seconds that this call trained."""
        cell = f"{stage.name}-seed{seed}"
        self._bar.set_postfix_str(cell)
        batches_at = stage.batches_at(seed)
        state = stage.initial_state(seed, source)
        with Checkpoints(self._folder.checkpoints / cell) as checkpoints:
            first, state = checkpoints.restore_latest(state) or (0, state)
            self._bar.update(first)
            start = time.perf_counter()
            with self._log.writer(cell, first) as writer:
                state = run_loop(
                    self._compiled[stage.name].step,
                    state,
                    batches_at,
                    num_steps=stage.num_steps,
                    report_every=self._config.report_every,
                    report=lambda step, metrics, state: writer.write(step, metrics | stage.validate(state, seed)),
                    checkpoints=checkpoints,
                    checkpoint_every=self._config.checkpoint_every,
                    on_step=self._bar.update,
                )
        return state, time.perf_counter() - start
