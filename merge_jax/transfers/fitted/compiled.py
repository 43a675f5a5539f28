"""The compiled program of a refit, cached for the same functions and shapes."""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError, ModifyScopeVariableError, TraceContextError
from jax import lax
from jax.core import Tracer

from merge_jax.checks import all_finite, error_context, name_misfit, name_missing_collections
from merge_jax.paths import flatten, replace, some_of
from merge_jax.transfers.alignment.fit import ChannelChoice, choose
from merge_jax.transfers.alignment.plan import plan_alignment, traced_layout
from merge_jax.transfers.alignment.write import written_leaves
from merge_jax.transfers.channels.graph import LayerMoments, layer_moments
from merge_jax.transfers.channels.layer_sites import is_state
from merge_jax.transfers.channels.merged_axes import apart
from merge_jax.transfers.channels.program import Constant, Program
from merge_jax.transfers.channels.trace import ChannelTrace
from merge_jax.transfers.fitted.batches import in_batches
from merge_jax.transfers.fitted.followed import FollowedModel
from merge_jax.transfers.fitted.plan import plan_refit
from merge_jax.transfers.fitted.walk import Walk
from merge_jax.transfers.pairing import resolve
from merge_jax.transfers.routes import Route
from merge_jax.types import Params

__all__ = ["ModelFn", "Prepared", "RefitOptions", "prepared"]

_ALIGNED_ON = 512  # Inputs that suffice to estimate each layer's second moments.
_MOST_KEPT = 8
_MOST_CONSTANTS = 1_000_000
_DRAWS = ("random_bits", "random_gamma")

ModelFn = Callable[..., Any]
"""`(variables, *inputs) -> outputs`, in evaluation mode."""

_Run = Callable[[Params, Params, list[jax.Array], jax.Array], tuple[Params, dict[str, jax.Array], jax.Array]]


class RefitOptions(NamedTuple):
    """The options of `refit` on which its program depends."""

    ridge: float
    batch_size: int
    max_rows: int
    choice: ChannelChoice
    axis_name: str | None


class Prepared(NamedTuple):
    """A refit of two models: its walk, the leaves that it keeps, and the function, which may be compiled.

    Attributes:
      walk: the walk through both models.
      kept: as in `Refit`.
      compiled: `run` under `jax.jit`.
      run: maps source variables, target variables, inputs and a key to the target's variables, `solved`, and whether
        all are finite.
      training: what a model does as in training mode, by its role; empty in evaluation mode.
      constants: bytes of the arrays that the models contain as constants; infinite if one is traced.
    """

    walk: Walk
    kept: Mapping[str, str]
    run: _Run
    compiled: Any
    training: Mapping[str, Sequence[str]]
    constants: float


_programs: OrderedDict[Any, Prepared] = OrderedDict()
"""A cache by functions, routes, shapes and options; see `prepared`."""


def prepared(
    source: ModelFn,
    target: ModelFn,
    routes: tuple[Route, ...],
    arguments: tuple[Params, Params, list[jax.Array]],
    options: RefitOptions,
    *,
    keep: bool,
) -> Prepared:
    """Returns the refit of two functions for arguments of these shapes.

    `keep` looks it up in a cache and stores it there, like `jax.jit`. Functions that cannot be hashed are not cached,
    nor those that contain arrays of more than 1 MB, which would stay in memory.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), arguments)
    leaves, tree = jax.tree.flatten(shapes)
    settings = tuple(getattr(jax.config, name) for name in ("jax_default_matmul_precision", "jax_enable_x64"))
    name = source, target, routes, tuple(leaves), tree, options, settings
    try:
        found = _programs.pop(name, None) if keep else None
    except TypeError:
        found, keep = None, False
    made = found or _prepare(source, target, routes, shapes, options)
    if keep and made.constants <= _MOST_CONSTANTS:
        _programs[name] = made
        while len(_programs) > _MOST_KEPT:
            _programs.popitem(last=False)
    return made


def _prepare(
    source: ModelFn,
    target: ModelFn,
    routes: tuple[Route, ...],
    shapes: tuple[Params, Params, list[jax.ShapeDtypeStruct]],
    options: RefitOptions,
) -> Prepared:
    ridge, batch_size, max_rows, choice, axis_name = options
    source_shapes, target_shapes, inputs = shapes
    count = inputs[0].shape[0]
    size = min(batch_size, count)
    batch = [jax.ShapeDtypeStruct((size, *one.shape[1:]), one.dtype) for one in inputs]
    models = _followed("source", source, source_shapes, batch), _followed("target", target, target_shapes, batch)
    graphs = models[0].graph, models[1].graph
    resolved = resolve(routes, source_shapes, target_shapes, layout=traced_layout(*graphs))
    alignment = plan_alignment(resolved, *graphs)
    plan = plan_refit(alignment, *models)
    if not plan.sites:
        reasons = "; ".join(f"{path}: {why}" for path, why in plan.kept.items())
        raise ValueError(f"no layer of the target can be solved. {reasons}")
    programs = models[0].trace.program, models[1].trace.program
    walk = Walk(*programs, plan, ridge, max_rows, axis_name, math.ceil(count / size), count)

    def run(
        source_variables: Params, target_variables: Params, inputs: list[jax.Array], key: jax.Array
    ) -> tuple[Params, dict[str, jax.Array], jax.Array]:
        some = jax.random.permutation(key, count)[: min(_ALIGNED_ON, count)]
        moments = layer_moments(source, source_variables, *(one[some] for one in inputs))
        if axis_name is not None:
            moments = _averaged(moments, axis_name)
        whole, drawn = flatten(source_variables), key if choice == "random" else None
        source_leaves, (streams, tables) = apart(whole, graphs[0].factors), plan.streams
        chosen = choose(alignment, graphs[0], moments, source_leaves, choice, drawn, streams)
        old = flatten(target_variables)
        leaves = old | written_leaves(alignment, chosen, graphs[0], moments, whole, old, tables)
        # A new dictionary, in which the walk replaces leaves: nothing else holds the aligned ones.
        leaves = {walk.target.leaves[path]: leaf for path, leaf in apart(leaves, graphs[1].factors).items()}
        solved = walk.run(
            chosen.values,
            {number: source_leaves[path] for path, number in walk.source.leaves.items()},
            leaves,
            *in_batches(inputs, size),
            key,
        )
        new = {path: leaves[number].reshape(jnp.shape(old[path])) for path, number in walk.target.leaves.items()}
        return replace(target_variables, new), solved, all_finite(new)

    operands = [one for program in programs for equation in program.equations for one in equation.inputs]
    constants = [one.value for one in operands if isinstance(one, Constant)]
    held = sum(math.prod(jnp.shape(one)) * jnp.result_type(one).itemsize for one in constants)
    of_a_trace = any(isinstance(one, Tracer) for one in constants)
    training = {role: _signs_of_training(one, size) for role, one in zip(("source", "target"), programs, strict=True)}
    return Prepared(walk, plan.kept, run, jax.jit(run), training, math.inf if of_a_trace else held)


def _signs_of_training(program: Program, size: int) -> list[str]:
    """Returns what a model does as in training mode: it leaves running statistics unread, or draws random numbers.

    Random features that all `size` examples share are part of a model; what is drawn for each example is not.
    """
    read = program.ancestors(one for one in program.outputs if not isinstance(one, Constant))
    paths = list(program.leaves)
    statistics = [path for path in paths if path.rpartition("/")[2] in ("mean", "var") and is_state(path, paths)]
    unread = [path for path in statistics if program.leaves[path] not in read]
    signs = [f"does not read its statistics {some_of(unread, 2)}"] if unread else []
    drawn = [out for one in program.equations if one.name in _DRAWS for out in one.outputs if out in read]
    if any(axis >= size and axis % size == 0 for out in drawn for axis in program.shapes[out].shape):
        signs.append("draws random numbers for each example, as dropout does")
    return signs


def _averaged(moments: LayerMoments, axis_name: str) -> LayerMoments:
    """Returns the moments over all devices."""

    def visit(names: Collection[str], take: Callable[[str, jax.Array], None]) -> None:
        moments.visit(names, lambda name, own: take(name, lax.pmean(own, axis_name)))

    return moments._replace(visit=visit)


def _followed(role: str, fn: ModelFn, variables: Params, batch: list[Any]) -> FollowedModel:
    # Of a plain tree of parameters, the names are layers, under which a model may return features.
    of_state = set(variables) - {"params"} if isinstance(variables, Mapping) and "params" in variables else set[str]()

    def apply(variables: Params, *inputs: Any) -> Any:
        outputs = fn(variables, *inputs)
        beside = outputs[1] if isinstance(outputs, tuple) and len(outputs) == 2 else None
        updated = sorted(of_state.intersection(beside)) if isinstance(beside, Mapping) else []
        if updated:
            raise ValueError(
                f"it returns new {some_of(updated, 3)} beside its outputs, as in training mode: give it in evaluation"
                " mode, such as functools.partial(model.apply, train=False)"
            )
        return outputs

    with error_context(f"the {role}"), name_missing_collections(variables), name_misfit(batch):
        try:
            return FollowedModel(*ChannelTrace.followed(apply, variables, batch, strict=True))
        except (InvalidRngError, ModifyScopeVariableError, TraceContextError) as error:
            raise ValueError(
                "it updates its state or draws random numbers, as in training mode: give it in evaluation mode, such as"
                f" functools.partial(model.apply, train=False), or of NNX after model.eval() ({error})"
            ) from None
