"""Runs a scenario: every method on every seed, paired, in one run folder that can be resumed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

from experiments.config import RunConfig
from experiments.report import print_plan, print_results, save_curves
from experiments.scenario import Method, Role, Scenario
from merge_jax.checkpoint import Checkpoints
from merge_jax.data import Splits, batches_of
from merge_jax.joint import (
    JointState,
    JointStep,
    Task,
    TrainState,
    adapter_adamw,
    init_joint_state,
    make_joint_step,
)
from merge_jax.loop import run_loop
from merge_jax.runs import MetricsLog, RunFolder
from merge_jax.types import Batch

__all__ = ["prepare_run"]

_RUNS = Path("runs")
_SOURCE = "source"  # The name of the cells that train a source on its own.


def prepare_run(scenario: Scenario, config: RunConfig) -> Callable[[], None]:
    """Checks all that can be checked, opens the run folder, and returns the function that trains.

    Raises:
      ValueError: an option out of range, a route that does not fit the models, a folder that cannot be used.
    """
    config.check()
    steps = _make_steps(scenario, config)
    _check_routes(scenario)
    options = asdict(config)
    run_dir, resume = options.pop("run_dir"), options.pop("resume")
    folder = RunFolder.open(
        run_dir or _numbered_folder(scenario.name, resume), options, resume=resume
    )
    return lambda: _run(scenario, config, steps, folder)


def _make_steps(scenario: Scenario, config: RunConfig) -> dict[str, JointStep]:
    """Returns the step of every method, and of the source's own training.

    That too is a joint step: the source in the target's place, with nothing to receive from.
    """

    def make_step(source_task: Task | None, method: Method) -> JointStep:
        return make_joint_step(
            source_task,
            method.task,
            method.transfer,
            cycle=config.cycle,
            stop=method.stop,
            num_steps=config.steps,
            update=config.update,
            teacher=method.teacher,
            adapter_optimizer=adapter_adamw(config.adapter_learning_rate),
        )

    live_task = scenario.source_task if config.source == "live" else None
    steps = {name: make_step(live_task, method) for name, method in scenario.methods.items()}
    return {_SOURCE: make_step(None, Method(scenario.source_task)), **steps}


def _check_routes(scenario: Scenario) -> None:
    """Raises ValueError where a transfer does not fit the models; nothing but shapes is computed."""
    key = jax.random.key(0)
    source, _ = jax.eval_shape(scenario.source.init, key)
    target, _ = jax.eval_shape(scenario.target.init, key)
    for method in scenario.methods.values():
        jax.eval_shape(method.transfer.init, key, source, target)


def _numbered_folder(name: str, resume: bool) -> Path:
    """Returns the last folder `runs/<name>-<number>` to resume, or the next one to make."""
    suffixes = [path.name.removeprefix(f"{name}-") for path in _RUNS.glob(f"{name}-*")]
    last = max((int(suffix) for suffix in suffixes if suffix.isdigit()), default=0)
    return _RUNS / f"{name}-{max(last, 1) if resume else last + 1:03d}"


def _run(
    scenario: Scenario, config: RunConfig, steps: Mapping[str, JointStep], folder: RunFolder
) -> None:
    """Trains what is not done yet, then prints and saves what came out."""
    log = MetricsLog(folder)
    results = folder.read_json("results.json", [])
    done = {(result["method"], result["seed"]) for result in results}
    print_plan(scenario, config, folder)
    total = len(scenario.methods) * config.steps
    total += config.source_steps if config.source == "pretrained" else 0
    with tqdm(total=config.seeds * total, unit="step", desc=scenario.name) as bar:
        trainer = _Trainer(steps, config, folder, log, bar)
        for seed in range(config.seeds):
            source = _source(scenario, config, trainer, seed)
            for name, method in scenario.methods.items():
                if (name, seed) in done:
                    bar.update(config.steps)
                    continue
                results.append(_result(scenario, config, trainer, name, method, seed, source))
                folder.write_json("results.json", results)
    print_results(scenario, config, results, folder)
    save_curves(list(scenario.methods), log.records(), folder)
    print(f"run folder: {folder.path}")


class _Trainer:
    """Trains cells; a cell is one method on one seed, or the source of one seed."""

    def __init__(
        self,
        steps: Mapping[str, JointStep],
        config: RunConfig,
        folder: RunFolder,
        log: MetricsLog,
        bar: tqdm,
    ):
        self._config, self._folder, self._log, self._bar = config, folder, log, bar
        self._steps = {name: jax.jit(step, donate_argnums=0) for name, step in steps.items()}
        self._compiled: dict[str, Any] = {}

    def train(
        self,
        name: str,
        seed: int,
        state: JointState,
        batches_at: Callable[[int], Mapping[str, Batch]],
        num_steps: int,
        validate: Callable[[JointState], dict[str, float]],
    ) -> tuple[JointState, float, float]:
        """Returns the state at the last step, the seconds of training and those of compilation before it."""
        cell = f"{name}-seed{seed}"
        self._bar.set_postfix_str(cell)
        with Checkpoints(self._folder.checkpoints / cell) as checkpoints:
            first, state = checkpoints.restore_latest(state) or (0, state)
            self._bar.update(first)
            start = time.perf_counter()
            if name not in self._compiled and first < num_steps:
                self._compiled[name] = self._steps[name].lower(state, batches_at(first)).compile()
            compiled = time.perf_counter()
            with self._log.writer(cell, first) as writer:
                state = run_loop(
                    self._compiled.get(name, self._steps[name]),
                    state,
                    batches_at,
                    num_steps=num_steps,
                    report_every=self._config.report_every,
                    report=lambda step, metrics, state: writer.write(
                        step, {**metrics, **validate(state)}
                    ),
                    checkpoints=checkpoints,
                    checkpoint_every=self._config.checkpoint_every,
                    on_step=self._bar.update,
                )
        return state, time.perf_counter() - compiled, compiled - start


def _source(scenario: Scenario, config: RunConfig, trainer: _Trainer, seed: int) -> TrainState:
    """Returns the source that the methods of a seed start from: trained, or fresh where it is to be live."""
    key, *_ = _keys(seed)
    params, model_state = scenario.source.init(key)
    if config.source == "live":
        return TrainState(params, model_state, ())
    method = Method(scenario.source_task)
    state = init_joint_state(
        key,
        None,
        method.task,
        method.transfer,
        source_params={},
        target_params=params,
        target_state=model_state,
    )
    splits = scenario.source.splits(seed)
    batch_at = batches_of(splits.train, config.batch_size, seed)
    state, *_ = trainer.train(
        _SOURCE,
        seed,
        state,
        lambda step: {"target": batch_at(step)},
        config.source_steps,
        lambda state: _validate("target", scenario.source, state.target, splits),
    )
    return state.target


def _result(
    scenario: Scenario,
    config: RunConfig,
    trainer: _Trainer,
    name: str,
    method: Method,
    seed: int,
    source: TrainState,
) -> dict[str, Any]:
    """Trains one method on one seed and reads the test split, once, after the last step."""
    live = config.source == "live"
    _, target_key, run_key = _keys(seed)
    target_params, target_state = scenario.target.init(target_key)
    state = init_joint_state(
        run_key,
        scenario.source_task if live else None,
        method.task,
        method.transfer,
        source_params=source.params,
        source_state=source.model_state,
        target_params=target_params,
        target_state=target_state,
        adapter_optimizer=adapter_adamw(config.adapter_learning_rate),
    )
    splits = {"source": scenario.source.splits(seed), "target": scenario.target.splits(seed)}
    batches = {
        role: batches_of(splits[role].train, config.batch_size, seed)
        for role in (("source", "target") if live else ("target",))
    }

    def validate(state: JointState) -> dict[str, float]:
        metrics = _validate("target", scenario.target, state.target, splits["target"])
        if live:
            metrics |= _validate("source", scenario.source, state.source, splits["source"])
        return metrics

    state, seconds, compile_seconds = trainer.train(
        name,
        seed,
        state,
        lambda step: {role: batch_at(step) for role, batch_at in batches.items()},
        config.steps,
        validate,
    )
    return {
        "method": name,
        "seed": seed,
        "target_test_accuracy": _test_accuracy(scenario.target, state.target, splits["target"]),
        "source_test_accuracy": _test_accuracy(scenario.source, state.source, splits["source"]),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "adapter_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.adapter.params)),
    }


def _keys(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the keys of the source, of the target's start, and of the joint run: paired over methods."""
    source_key, target_key, run_key = jax.random.split(jax.random.key(seed), 3)
    return source_key, target_key, run_key


def _validate(name: str, role: Role, state: TrainState, splits: Splits) -> dict[str, float]:
    metrics = role.evaluate(state.params, state.model_state, splits.validation)
    return {f"{name}/validation_{metric}": value for metric, value in metrics.items()}


def _test_accuracy(role: Role, state: TrainState, splits: Splits) -> float:
    return role.evaluate(state.params, state.model_state, splits.test)["accuracy"]
