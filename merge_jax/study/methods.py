"""Scenarios of two models: methods from options and routes, every transfer with every objective."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import optax

import merge_jax as mj
from merge_jax.checks import check_choice
from merge_jax.data import num_examples
from merge_jax.objectives.features import can_be_averaged
from merge_jax.study.alignment import Alignment, align
from merge_jax.study.config import RunConfig
from merge_jax.study.models.model import StudyModel, pool_inputs
from merge_jax.study.options import TransferOptions, parse_pairs
from merge_jax.study.scenario import FitFn, Lengths, Method, Scenario, Schedule, StartFn
from merge_jax.study.starts import once_a_seed, prepare_start, refit_start
from merge_jax.transfers.adapters.adapter import OutputForm
from merge_jax.types import Batch, LossFn, ModelState, Params, TeacherFn

__all__ = [
    "Objective",
    "Routes",
    "adapter_optimizer",
    "choose_methods",
    "make_methods",
    "make_scenario",
    "parse_routes",
]

Routes = Sequence[mj.Route] | Mapping[str, Sequence[mj.Route]]
"""Routes from one source, or by name from each of several."""


class Objective(NamedTuple):
    """A target's objective, and the source outputs that it needs.

    Attributes:
      loss: the target's loss.
      teacher: adds the source's outputs to the target's batches; None if the loss needs none.
      pooled: whether they use the target's pool, see `Method`.
      each_alone: whether the teacher processes examples independently, see `Method`.
    """

    loss: LossFn
    teacher: TeacherFn | None = None
    pooled: bool = False
    each_alone: bool = False


class _Moves(NamedTuple):
    """A transfer, its fraction of the run, and functions that make the initial adapter and target."""

    transfer: mj.Transfer
    stop: float
    fit: FitFn | None = None
    start: StartFn | None = None


TransferFactory = Callable[[Sequence[mj.Route]], mj.Transfer]
StartFactory = Callable[[StudyModel, StudyModel, Sequence[mj.Route]], StartFn]
"""`(source, target, routes) -> start`."""


def make_scenario(
    name: str,
    config: RunConfig,
    source: StudyModel | None,
    target: StudyModel,
    routes: Routes | None = None,
    *,
    objectives: Mapping[str, Objective] = MappingProxyType({}),
    transfers: Mapping[str, TransferFactory] = MappingProxyType({}),
    starts: Mapping[str, StartFactory] = MappingProxyType({}),
    attach: Callable[[Path], None] | None = None,
) -> Scenario:
    """Returns the scenario of transfer from a source to a target, with the config's methods.

    Args:
      name: the scenario's name.
      config: `TransferOptions` and `RunConfig` in one class.
      source: the source model; None if the target is its own source.
      target: the target model.
      routes: the routes from source to target; by default those of the config.
      objectives: additional objectives of the target, by their name in methods.
      transfers: your own transfers, likewise by name; each makes a transfer from routes.
      starts: starts of targets, likewise by name; each makes a `StartFn` from source, target and routes.
      attach: writes additional files of a run into its folder.

    Raises:
      ValueError: an unknown method, or one that does not suit these models; a batch larger than the data.
      TypeError: a config without `TransferOptions`.
    """
    if not isinstance(config, TransferOptions):
        raise TypeError("the config of a scenario has TransferOptions: class Config(TransferOptions, RunConfig)")
    target = replace(target, head_penalty=config.head_penalty, head_floor=config.head_floor)
    if config.head_floor and not config.head_first:
        print("warning: --head-floor has no effect without --head-first", file=sys.stderr)
    if config.unlabelled and target.pool is None:
        raise ValueError(f"unlabelled is {config.unlabelled}, but {target.name} has no pool of unlabelled inputs")
    schedule = _make_schedule(config, *(num_examples(model.splits(0).train) for model in (source or target, target)))
    source_steps = (schedule.target if config.source == "live" else schedule.source).steps
    num_steps = schedule.target.steps
    methods = make_methods(
        config,
        source,
        target,
        parse_routes(config.routes) if routes is None else routes,
        num_steps,
        config.axis_name,
        objectives=objectives,
        transfers=transfers,
        starts=starts,
    )
    return Scenario(
        name=name,
        source=source,
        target=target,
        source_task=None if source is None else mj.Task(source.loss, source.optimizer(source_steps)),
        methods=choose_methods(methods, config.methods),
        schedule=schedule,
        adapter_optimizer=adapter_optimizer(config, config.cycle, num_steps),
        axis_name=config.axis_name,
        attach=attach,
        head_first=config.head_first,
    )


def _make_schedule(config: RunConfig, source_examples: int, target_examples: int) -> Schedule:
    """Returns the lengths in steps, for the given numbers of training examples.

    Raises:
      ValueError: a batch has more examples than the data.
    """
    for role, examples in (("target", target_examples), ("source", source_examples)):
        learns = role == "target" or config.source != "frozen"
        if learns and examples < config.batch_size:
            raise ValueError(
                f"batch_size is {config.batch_size}, but the {role} learns from {examples} examples: a batch would"
                " repeat some of them"
            )
    if config.epochs is None:
        source, target = (
            Lengths(steps, config.report_every, config.checkpoint_every)
            for steps in (config.source_steps, config.steps)
        )
        return Schedule(source, target)

    def lengths(epochs: int, examples: int) -> Lengths:
        epoch = math.ceil(examples / config.batch_size)
        return Lengths(epochs * epoch, config.report_every * epoch, config.checkpoint_every * epoch)

    source_epochs = config.epochs if config.source_epochs is None else config.source_epochs
    return Schedule(lengths(source_epochs, source_examples), lengths(config.epochs, target_examples))


def make_methods(
    options: TransferOptions,
    source: StudyModel | None,
    target: StudyModel,
    routes: Routes,
    num_steps: int,
    axis_name: str | None = None,
    *,
    objectives: Mapping[str, Objective] = MappingProxyType({}),
    transfers: Mapping[str, TransferFactory] = MappingProxyType({}),
    starts: Mapping[str, StartFactory] = MappingProxyType({}),
) -> dict[str, Callable[[], Method]]:
    """Returns the factory of each method: every transfer or start with every objective, with or without agreement.

    A method is named after its transfer or start and its objective (`share_kd_agree`), or after one of them if the
    other is absent (`share`, `kd`, `agree`); `vanilla` has neither. Arguments are those of `make_scenario`.
    """
    optimizer = target.optimizer(num_steps)
    if options.target_rate != 1:  # The rate scales the update, for SGD and AdamW.
        optimizer = optax.chain(optimizer, optax.scale(options.target_rate))

    def bind(make: TransferFactory) -> mj.Transfer:
        if isinstance(routes, Mapping):
            return mj.several_sources({name: make(own) for name, own in routes.items()})
        return make(routes) if source is not None else mj.self_transfer(make(routes))

    @cache  # Its models are traced and its fit compiled once for all methods.
    def alignment() -> Alignment:
        if source is None or source.apply is None or target.apply is None or isinstance(routes, Mapping):
            raise ValueError(
                "a method with aligned needs one source that is a separate model, and a target with `apply`"
            )
        return align(source, target, routes)

    def aligned() -> _Moves:
        return _Moves(alignment().transfer, 1 / num_steps, alignment().fit)

    def then_residual() -> _Moves:
        first, fit, *_ = alignment()
        once = mj.scheduled(first, optax.piecewise_constant_schedule(1.0, {1: 0.0}))
        both = mj.chain(once, bind(lambda routes: _lpka(options, "residual", _adapter_routes(options, routes))))
        return _Moves(both, options.stop, lambda adapter, *models: {**adapter, "0": fit(adapter["0"], *models)})

    @cache  # One start for all methods that begin from it.
    def started(name: str, make: StartFactory) -> _Moves:
        if source is None or isinstance(routes, Mapping):
            raise ValueError(f"a method with {name} needs one source that is a separate model")
        return _Moves(mj.identity_transfer(), 0.0, start=once_a_seed(make(source, target, routes)))

    def by_routes(make: TransferFactory) -> Callable[[], _Moves]:
        return lambda: _Moves(bind(make), options.stop)

    shipped: dict[str, Callable[[], _Moves]] = {
        "": lambda: _Moves(mj.identity_transfer(), 0.0),
        **{name: by_routes(make) for name, make in _transfers(options).items()},
        "aligned": aligned,
        # An alignment's opponent and control, both written once, before the first step.
        "pruned": lambda: _Moves(mj.identity_transfer(), 0.0, start=alignment().pruned),
        "random_channels": lambda: _Moves(mj.identity_transfer(), 0.0, start=alignment().random_channels),
        "mergenet_residual_aligned": then_residual,
        **{name: partial(started, name, make) for name, make in _starts(options, axis_name).items()},
    }
    _check_own_names(shipped, transfers, starts, objectives)
    moves = shipped | {name: by_routes(make) for name, make in transfers.items()}
    moves |= {name: partial(started, name, make) for name, make in starts.items()}
    learned = {"": Objective(target.loss), **objectives}

    @cache  # One teacher for all methods, so that its outputs are computed once.
    def objective_of(name: str, agree: str) -> Objective:
        return _with_agreement(options, axis_name, source, target, learned[name]) if agree else learned[name]

    def method(make: Callable[[], _Moves], name: str, agree: str) -> Method:
        objective = objective_of(name, agree)
        transfer, stop, fit, start = make()
        task = mj.Task(objective.loss, optimizer)
        return Method(task, transfer, stop, objective.teacher, fit, start, objective.pooled, objective.each_alone)

    return {
        "_".join(filter(None, (name, objective, agree))) or "vanilla": partial(method, moves[name], objective, agree)
        for name, objective, agree in product(moves, learned, ("", "agree"))
    }


def choose_methods(methods: Mapping[str, Callable[[], Method]], names: Sequence[str]) -> dict[str, Method]:
    """Returns the named methods in order; only these are created.

    Raises:
      ValueError: no names, an unknown name, or a repeated one.
    """
    if not names:
        raise ValueError(f"no methods: name one or more of {', '.join(methods)}")
    chosen: dict[str, Method] = {}
    for name in names:
        check_choice("method", name, methods)
        if name in chosen:
            raise ValueError(f"the method {name!r} is named twice")
        chosen[name] = methods[name]()
    return chosen


def _check_own_names(
    shipped: Iterable[str],
    transfers: Mapping[str, TransferFactory],
    starts: Mapping[str, StartFactory],
    objectives: Mapping[str, Objective],
) -> None:
    """Raises ValueError for a given name that would be ambiguous with another method's."""
    taken = {"", "vanilla", "agree", *shipped}
    for kind, names in (("transfer", transfers), ("start", starts), ("objective", objectives)):
        for name in names:
            if name in taken or any(name.startswith(f"{other}_") for other in taken if other):
                raise ValueError(f"the {kind} {name!r} has the name of an existing method: choose another")
        taken |= names.keys()
    for name, objective in objectives.items():
        if not isinstance(objective, Objective):
            raise ValueError(f"the objective {name!r} must be an Objective(loss, teacher), got {objective!r}")


def _starts(options: TransferOptions, axis_name: str | None) -> dict[str, StartFactory]:
    """Returns the starts of targets by name, as functions of source, target and routes."""
    prepare = partial(prepare_start, options, axis_name=axis_name)
    return {
        "refit": refit_start,
        "prepare": prepare,
        # Opponents and controls of these.
        "refit_random_channels": partial(refit_start, choice="random"),
        "prepare_rsd": partial(prepare, objective=mj.objectives.redundancy_suppression),
    }


def _transfers(options: TransferOptions) -> dict[str, TransferFactory]:
    """Returns the transfers by name, as functions of routes."""

    def lpka(output: OutputForm, routes: Sequence[mj.Route]) -> mj.Transfer:
        return _lpka(options, output, _adapter_routes(options, routes))

    def itself(routes: Sequence[mj.Route]) -> mj.Transfer:
        routes = [replace(route, source=route.target) for route in _adapter_routes(options, routes)]
        return mj.self_transfer(_lpka(options, "residual", routes))

    return {
        "share": mj.share_transfer,
        "mergenet": partial(lpka, "published"),
        "mergenet_residual": partial(lpka, "residual"),
        "mergenet_warm": partial(lpka, "warm"),
        "selection": mj.weight_selection_transfer,
        "linear_operators": mj.linear_operator_transfer,
        "generator": mj.parameter_generator_transfer,
        "transport": mj.optimal_transport_transfer,
        # Controls with as many parameters as mergenet_residual; they read nothing, or the target itself.
        "no_source": lambda routes: mj.without_source(lpka("residual", routes)),
        "itself": itself,
    }


def _adapter_routes(options: TransferOptions, routes: Sequence[mj.Route]) -> Sequence[mj.Route]:
    """Returns the routes for learned adapters."""
    return parse_routes(options.adapter_routes) if options.adapter_routes else routes


def _lpka(options: TransferOptions, output: OutputForm, routes: Sequence[mj.Route]) -> mj.Transfer:
    """Returns the LPKA transfer in an output form."""
    return mj.lpka_transfer(
        routes,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        output=output,
        attention_dropout=options.attention_dropout,
        feed_forward_dropout=options.feed_forward_dropout,
        max_width=512 if options.capped else None,
        max_hidden=1024 if options.capped else None,
    )


def _with_agreement(
    options: TransferOptions,
    axis_name: str | None,
    source: StudyModel | None,
    target: StudyModel,
    objective: Objective,
) -> Objective:
    """Returns the objective with feature agreement added.

    Raises:
      ValueError: no layers that could agree, or a model whose features cannot be read.
    """
    if source is None or source.apply is None or target.apply is None:
        raise ValueError("a method with agree needs one source that is a separate model")
    if not options.agree:
        raise ValueError("a method with agree needs layers: --agree target=source, such as stage1_0=stage1_0")
    target_layers, source_layers = zip(*options.agreeing_layers(), strict=True)
    train = target.splits(0).train
    mixes = options.compare_on == "mixed" and any(can_be_averaged(train[name]) for name in target.inputs)
    compare_on = partial(mj.objectives.mixed, axis_name=axis_name) if mixes else None
    agreement = mj.feature_agreement(
        target.apply,
        target_layers,
        inputs=pool_inputs(target),
        weight=options.agreement,
        compare_on=compare_on,
        axis_name=axis_name,
    )
    source_inputs = pool_inputs(replace(source, pool=target.pool))
    show_features = mj.features_teacher(source.apply, source_layers, inputs=source_inputs, compare_on=compare_on)

    def teacher(params: Params, model_state: ModelState, batch: Batch) -> Batch:
        batch = show_features(params, model_state, batch)
        return batch if objective.teacher is None else objective.teacher(params, model_state, batch)

    pooled = target.pool is not None
    same = objective.teacher is None or (objective.each_alone and objective.pooled == pooled)
    return Objective(mj.sum_losses(objective.loss, agreement), teacher, pooled, each_alone=same and not mixes)


def adapter_optimizer(options: TransferOptions, cycle: int, num_steps: int) -> optax.GradientTransformation:
    """Returns the adapter's AdamW; its schedule counts the adapter's updates, one per transfer."""
    rate: optax.ScalarOrSchedule = options.adapter_learning_rate
    if options.adapter_schedule == "cosine":
        updates = max(2, mj.TransferSteps(cycle, options.stop, num_steps).count())
        held = max(1, round(0.02 * updates))
        falling = optax.cosine_decay_schedule(rate, updates - held)
        rate = optax.join_schedules([optax.constant_schedule(rate), falling], [held])
    return mj.adapter_adamw(rate)


def parse_routes(words: Iterable[str]) -> list[mj.Route]:
    """Returns the routes given as `target=source`, with paths or patterns as in `merge_jax.Route`.

    If both paths end in `attention`, they are attention blocks, which transfer head by head.

    Raises:
      ValueError: an argument that is not such a pair.
    """
    routes = []
    for target, source in parse_pairs(words, "a route", "fc/kernel=fc/kernel"):
        attention = target.endswith("attention") and source.endswith("attention")
        routes.append(mj.Route(target, source, view="attention" if attention else None))
    return routes
