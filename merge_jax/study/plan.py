"""The plan of a run, printed before it starts, and the disk space that it needs."""

import math
from collections.abc import Mapping

import jax
from jax.stages import Lowered

from merge_jax.data import num_examples
from merge_jax.runs import Model, Plan, RouteStats
from merge_jax.study.config import RunConfig
from merge_jax.study.models.model import StudyModel
from merge_jax.study.scenario import Scenario
from merge_jax.study.sources import SourcePlan
from merge_jax.study.trial import Trial
from merge_jax.training.schedule import TransferSteps
from merge_jax.training.sharding import Layout
from merge_jax.types import Params

__all__ = ["checkpoint_bytes", "make_plan"]


def make_plan(
    scenario: Scenario, config: RunConfig, source_plan: SourcePlan, layout: Layout, expected: str, caution: str
) -> Plan:
    """Returns the plan of a run; `expected` and `caution` as in the plan."""
    target = scenario.target.shapes[0]
    source = {} if scenario.source is None else scenario.source.shapes[0]
    transfers = {}
    for name, method in scenario.methods.items():
        rows = method.transfer.describe(source, target)
        if rows:
            routes = tuple(f"{row.target} <- {row.source}" for row in rows if not row.left_out)
            transfers[name] = RouteStats(routes, sum(row.parameters for row in rows))
    devices = f"{layout.num_devices} x {jax.devices()[0].device_kind}"
    return Plan(
        experiment=scenario.name,
        source=None if scenario.source is None else _model(scenario.source, source),
        target=_model(scenario.target, target),
        origin=_describe_source(scenario, config, source_plan),
        steps=scenario.schedule.target.steps,
        batch_size=config.batch_size,
        methods=tuple(scenario.methods),
        seeds=config.seeds,
        first_seed=config.first_seed,
        transfers=transfers,
        devices=f"{devices} by {config.parallel}" if layout.num_devices > 1 else devices,
        control="" if config.source_control == "none" else config.source_control,
        expected=expected,
        caution=caution,
        moments=_count_transfers(scenario, config),
    )


def checkpoint_bytes(trials: Mapping[str, Trial], lowered: Mapping[str, Lowered], seeds: int) -> int:
    """Returns the approximate bytes on disk of a finished run's checkpoints."""
    total = 0
    for name, trial in trials.items():
        state, *_ = lowered[name].args_info[0]
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        saves = math.ceil(trial.lengths.steps / trial.lengths.checkpoint_every)
        kept = saves if trial.keep is None else min(saves, trial.keep + 1)  # The best one is kept too.
        total += size * kept * seeds
    return total


def _model(role: StudyModel, params: Params) -> Model:
    splits = role.splits(0)
    train, validation, test = (num_examples(split) for split in (splits.train, splits.validation, splits.test))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Model(role.name, parameters, role.metric, (train, validation, test), role.code)


def _count_transfers(scenario: Scenario, config: RunConfig) -> str:
    steps = scenario.schedule.target.steps
    counts = {
        name: TransferSteps(config.cycle, method.stop, steps).count()
        for name, method in scenario.methods.items()
        if method.stop
    }
    words = [f"{name} {count}" for name, count in counts.items()]
    return f"steps that transfer, of {steps}: {', '.join(words)} (every {config.cycle})" if words else ""


def _describe_source(scenario: Scenario, config: RunConfig, source_plan: SourcePlan) -> str:
    if scenario.source is None:
        return "is the target itself"
    if source_plan.live:
        return "is trained beside the target"
    trained = (
        f"is trained {source_plan.lengths.steps} steps"
        if source_plan.lengths is not None
        else f"is read from {config.source_from}"
    )
    if source_plan.snapshots is None:
        return f"{trained}, and frozen"
    return f"{trained}; {source_plan.snapshots} steps of its training are replayed"
