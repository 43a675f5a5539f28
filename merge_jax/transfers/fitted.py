"""Refit: after an aligned write, every layer of the target is solved to compute what the source's does."""

import functools
import math
import string
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from merge_jax.checks import all_finite, check_at_least_one, error_context
from merge_jax.paths import flatten, replace, some_of
from merge_jax.transfers.aligned import aligned_transfer
from merge_jax.transfers.alignment_fit import ChannelChoice, directions
from merge_jax.transfers.alignment_plan import plan_alignment
from merge_jax.transfers.channel_trace import ChannelTrace
from merge_jax.transfers.channels import input_moments
from merge_jax.transfers.followed import FollowedModel
from merge_jax.transfers.merged_axes import apart
from merge_jax.transfers.pairing import resolve
from merge_jax.transfers.program import Program
from merge_jax.transfers.refit_plan import RefitPlan, Site, plan_refit
from merge_jax.transfers.refit_routes import routes_with_state
from merge_jax.transfers.refit_solve import (
    add_moments,
    batch_moments,
    channel_rows,
    end_rows,
    entering,
    matrix,
    no_moments,
    slope,
    solve,
    without,
    write,
)
from merge_jax.transfers.routes import Routes
from merge_jax.types import Adapter, Params

__all__ = ["FewRowsWarning", "Refit", "refit"]

_ALIGNED_ON = 512  # So many inputs suffice to estimate each layer's second moments.
_FEW_ROWS, _ROWS_OF_UNKNOWN = 4096, 200
_VIEWS = frozenset({"slice", "squeeze", "reshape", "transpose", "pad", "rev"})  # Free to compute again.

ModelFn = Callable[..., Any]
"""`(variables, *inputs) -> outputs`, in evaluation mode."""


class FewRowsWarning(UserWarning):
    """A layer has more unknowns than rows to solve them from, so that the ridge was raised."""


class Refit(NamedTuple):
    """The result of a refit.

    Attributes:
      variables: of the target, parameters and state.
      solved: `{leaf: R^2}`, the share of the source's variance, at the channels that were chosen, that the target has
        after the layer was solved, on the inputs of the fit; not a number where the source has none, as of one input.
      kept: `{leaf: why}` of the routed parameters that were aligned and not solved.
    """

    variables: Params
    solved: dict[str, jax.Array]
    kept: dict[str, str]


def refit(
    routes: Routes,
    source: ModelFn,
    target: ModelFn,
    source_variables: Params,
    target_variables: Params,
    *inputs: jax.Array,
    ridge: float = 1e-2,
    batch_size: int = 256,
    max_rows: int = 40_000,
    key: jax.Array | None = None,
    choice: ChannelChoice = "moments",
    axis_name: str | None = None,
) -> Refit:
    """Returns a target that computes what the source does, layer by layer, in closed form and without labels.

    They are of one family, or of two whose layers can be paired: a MobileNetV2 has the blocks of an EfficientNet-lite
    with other windows, widths and numbers of them. A block more than the source's may have the route of its last one
    too: it is solved for what is still missing at the end of it.

    First `aligned_transfer` writes: channels are chosen, alike in all leaves, statistics of norms too. Then the layers
    are walked in the order of the computation. With `X [n, d]` what enters a layer **in the target as written so far**,
    one row for each input and place, and `T [n, m]` what the source has at the chosen channels just before what is not
    linear, minus what the target has there without the layer,

        W = (X'X/n + r I)^-1 (X'T/n + r W0),    r = ridge tr(X'X/n) / d max(1, d/n),    b = mean T - mean X W,

    centred, with `W0` the aligned kernel. So each layer makes up for what those before it got wrong. The intercept goes
    to the bias or the norm on the way. Running statistics become those of the same inputs, and gain and bias of the
    norm make up for them; a norm without both keeps the aligned ones.
    **Streams**: between the blocks of a MobileNetV2 or of a transformer nothing that is not solved for acts on single
    channels. Layers and embeddings write into the stream, layers read it, and norms divide by the size of the whole. So
    any directions would do as well as channels: there `T` is what the source has along as many orthonormal directions,
    those of its largest second moments, turned toward the channels that were chosen (for the choice `moments`).
    Embeddings are aligned to the same directions.
    Kernels that end in one sum, such as the last of a residual block and its shortcut, are solved jointly. What
    has its own numbers for each channel, the gain and bias of a LayerNorm or a depthwise kernel, is solved channel by
    channel. The last layer, where it is routed and labels are shared, is solved to the source's logits.

    Sources: least squares after matching (PLeaS, arXiv:2407.02447), from what enters in the merged model so far
    (RegMean++, arXiv:2508.03121). To walk any two computations by their channel graphs is our choice, and so are the
    directions: they keep more of such a stream than any choice of channels. (SliceGPT, arXiv:2401.15024, turns the
    stream of one transformer to its principal components, for RMSNorm exactly.)

    It may be jitted, and differentiated with respect to both variables. Moments are gathered over batches: memory for a
    layer is that of `X'X`, beside what all inputs are at two depths of both models, one after the other.

    Args:
      routes: as `aligned_transfer`, of parameters: `{"**": "**"}` is all leaves of one path. Leave out last layers of
        other labels.
      source: `(variables, *inputs) -> outputs`, such as `source_model.apply`, in evaluation mode.
      target: the same of the target.
      source_variables: `{"params": ..., "batch_stats": ...}`, as in Flax; a tree of parameters alone will do.
      target_variables: of the target; where nothing is routed they stay.
      *inputs: such as the target will see, `[N, ...]`, without labels.
      ridge: without unit; from 1e-3 to 1e-1 it changed nothing on digits.
      batch_size: inputs in a batch.
      max_rows: at most about so many rows of a layer are taken, drawn at random over inputs and places. Where each
        channel has `d` numbers of its own, as in a depthwise convolution, at most `max(4096, 200 d)`.
      key: for that; `jax.random.key(0)` by default.
      choice: of the channels, as in `aligned_transfer`.
      axis_name: the axis of `pmap` or `shard_map` whose devices share the inputs.

    Raises:
      ValueError: no inputs, or of unequal numbers; numbers that are not finite come out (under `jit` that is not
        checked); as `channel_graph` and `aligned_transfer`; nothing to solve.

    Warns:
      FewRowsWarning: a layer with more unknowns than rows, whose ridge is raised by as much.
    """
    count = _count(inputs)
    check_at_least_one(batch_size=batch_size, max_rows=max_rows)
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be above 0, got {ridge}")
    size = min(batch_size, count)
    batch = [jax.ShapeDtypeStruct((size, *jnp.shape(one)[1:]), jnp.result_type(one)) for one in inputs]
    models = [_followed(role, fn, variables, batch) for role, fn, variables in
              (("source", source, source_variables), ("target", target, target_variables))]  # fmt: skip
    named_routes = routes_with_state(routes, source_variables, target_variables)
    resolved = resolve(named_routes, source_variables, target_variables)
    alignment = plan_alignment(resolved, models[0].graph, models[1].graph)
    plan = plan_refit(alignment, *models)
    if not plan.sites:
        reasons = "; ".join(f"{path}: {why}" for path, why in plan.kept.items())
        raise ValueError(f"no layer of the target can be solved. {reasons}")
    key = jax.random.key(0) if key is None else key
    graphs = models[0].graph, models[1].graph
    transfer = aligned_transfer(named_routes, *graphs, choice=choice, key=key if choice == "random" else None)
    source_program, target_program = (one.trace.program for one in models)
    batches = math.ceil(count / size)
    walk = _Walk(source_program, target_program, plan, ridge, max_rows, axis_name, batches, count)
    walk.check_rows(size)

    fit_transfer = transfer.fit
    assert fit_transfer is not None  # The aligned one has it.

    def run(
        source_variables: Params, target_variables: Params, inputs: list[jax.Array], key: jax.Array
    ) -> tuple[Params, dict[str, jax.Array], jax.Array]:
        some = jax.random.permutation(key, count)[: min(_ALIGNED_ON, count)]
        moments = input_moments(source, source_variables, *(one[some] for one in inputs))
        if axis_name is not None:
            moments = lax.pmean(moments, axis_name)
        adapter = fit_transfer(moments, source_variables, target_variables)
        source_leaves = apart(flatten(source_variables), models[0].graph.factors)
        wanted = adapter
        if choice == "moments":
            adapter, wanted = directions(
                alignment, plan.streams.pairs, models[0].graph, moments, source_leaves, adapter
            )
        written = transfer.apply(adapter, source_variables, target_variables)
        if plan.streams.tables and wanted is not adapter:
            turned = flatten(transfer.apply(wanted, source_variables, target_variables))
            written = replace(written, {path: turned[path] for path in plan.streams.tables})
        apart_leaves = apart(flatten(written), models[1].graph.factors)
        leaves, solved = walk.run(
            wanted,
            {number: source_leaves[path] for path, number in walk.source.leaves.items()},
            {number: apart_leaves[path] for path, number in walk.target.leaves.items()},
            *_in_batches(inputs, size),
            key,
        )
        finite = all_finite(leaves)
        shapes = {path: jnp.shape(leaf) for path, leaf in flatten(written).items()}
        made = {path: leaves[number].reshape(shapes[path]) for path, number in walk.target.leaves.items()}
        return replace(written, made), solved, finite

    given = [jnp.asarray(one) for one in inputs]
    variables, solved, finite = jax.jit(run)(source_variables, target_variables, given, key)
    if not isinstance(finite, Tracer) and not finite:
        _explain(given, source_variables, target_variables)
    return Refit(variables, solved, dict(plan.kept))


def _count(inputs: tuple[jax.Array, ...]) -> int:
    wrong = [type(one).__name__ for one in inputs if not hasattr(one, "shape")]
    if wrong:
        raise ValueError(f"the refit takes its inputs as arrays, one after the other, got {', '.join(wrong)}")
    counts = {jnp.shape(one)[0] if jnp.ndim(one) else 0 for one in inputs}
    if len(counts) != 1 or not min(counts):
        raise ValueError(f"the refit needs inputs, as many of each, got {[jnp.shape(one) for one in inputs]}")
    return counts.pop()


def _explain(inputs: list[jax.Array], source: Params, target: Params) -> NoReturn:
    """Raises ValueError for a refit that came to numbers that are not finite, naming what had them before."""
    before = {f"input {place}": one for place, one in enumerate(inputs)}
    for role, variables in (("source", source), ("target", target)):
        before |= {f"the {role}'s {path}": leaf for path, leaf in flatten(variables).items()}
    wrong = [name for name, leaf in before.items() if not all_finite(leaf)]
    raise ValueError(
        "the refit came to numbers that are not finite: "
        + (f"there are some in {some_of(wrong, 3)}" if wrong else "what the source or the target computes has some")
    )


def _followed(role: str, fn: ModelFn, variables: Params, batch: list[Any]) -> FollowedModel:
    with error_context(f"the {role}"):
        return FollowedModel(*ChannelTrace.followed(fn, variables, batch, strict=True))


def _in_batches(inputs: Sequence[jax.Array], size: int) -> tuple[list[jax.Array], jax.Array]:
    """Returns the inputs as `[batches, B, ...]` and weights `[batches, B]`; what fills the last batch has weight 0."""
    count = jnp.shape(inputs[0])[0]
    batches = math.ceil(count / size)
    places = jnp.arange(batches * size)
    weights = (places < count).astype(jnp.float32).reshape(batches, size)
    return [jnp.asarray(one)[places % count].reshape(batches, size, *jnp.shape(one)[1:]) for one in inputs], weights


@dataclass(frozen=True)
class _Walk:
    """Both computations, site after site: what all batches are at one depth is kept, and nothing else."""

    source: Program
    target: Program
    plan: RefitPlan
    ridge: float
    max_rows: int
    axis_name: str | None
    batches: int
    num_inputs: int

    def run(
        self,
        adapter: Adapter,
        source_leaves: dict[int, jax.Array],
        leaves: dict[int, jax.Array],
        inputs: list[jax.Array],
        weights: jax.Array,
        key: jax.Array,
    ) -> tuple[dict[int, jax.Array], dict[str, jax.Array]]:
        """Returns the target's leaves and how well each site was solved."""
        source_values = dict(zip(self.source.inputs, inputs, strict=True))
        values = dict(zip(self.target.inputs, inputs, strict=True))
        source_kept, kept, solved = self._source_kept(), self._target_kept(), {}
        after = jnp.zeros(())
        for number, site in enumerate(self.plan.sites):
            unknowns = [(one, slope(self.target, site, one, leaves)) for one in site.unknowns]
            priors = [matrix(self.target, one, leaves) * (scale[None] if site.dense else 1) for one, scale in unknowns]
            gather = functools.partial(
                self._gather, site, adapter, source_leaves, dict(leaves), source_kept[number], kept[number]
            )
            keys = jax.random.split(jax.random.fold_in(key, number), len(weights))
            # What was known before and is needed again stays where it is.
            known = [{one: rows for one, rows in of.items() if one in ones}
                     for of, ones in ((source_values, source_kept[number]), (values, kept[number]))]  # fmt: skip
            moments, made = _stacked(gather, no_moments(site), (source_values, values, weights, keys), after)
            source_values, values = ({**old, **new} for old, new in zip(known, made, strict=True))
            after = moments.weight
            solution = solve(site, moments, jnp.concatenate(priors), self._valid(site, adapter), self.ridge)
            leaves = write(self.target, site, leaves, solution, moments)
            solved |= {one.layer.leaf: solution.r2 for one in site.unknowns}
        return leaves, solved

    def _gather(
        self,
        site: Site,
        adapter: Adapter,
        source_leaves: dict[int, jax.Array],
        leaves: dict[int, jax.Array],
        source_kept: frozenset[int],
        kept: frozenset[int],
        moments: Any,
        batch: Any,
    ) -> tuple[Any, Any]:
        """Adds one batch to the moments of a site, and returns what is kept of it for the next."""
        source_values, values, weights, key = batch
        found = self.source.evaluate({**source_leaves, **source_values}, {site.source_end, *source_kept})
        entered = {one for unknown in site.unknowns for one in unknown.layer.meets.reads if one in self.target.data}
        needed = entered if site.dense else set[int]()
        known = self.target.evaluate({**leaves, **values}, {*needed, *kept})
        limit = math.ceil(self._most_rows(site) / self.batches)
        rows = jnp.arange(site.rows) if site.rows <= limit else jax.random.randint(key, (limit,), 0, site.rows)
        chosen = None if site.rows <= limit else rows
        x = entering(self.target, site, known, leaves, chosen)
        wanted = self._in_target(site, adapter, found[site.source_end].reshape(site.source_shape))
        wanted = channel_rows(wanted, site.channel_axes, chosen)
        rest = end_rows(self.target, site, without(self.target, site, known), chosen)
        of_rows = weights[rows // site.stride % len(weights)]
        total = (lambda one: one) if self.axis_name is None else functools.partial(lax.psum, axis_name=self.axis_name)
        moments = add_moments(moments, batch_moments(x, wanted - rest, wanted, of_rows, total))
        made = (source_kept - source_values.keys(), found), (kept - values.keys(), known)
        return moments, tuple({one: of[one] for one in ones} for ones, of in made)

    def _in_target(self, site: Site, adapter: Adapter, value: jax.Array) -> jax.Array:
        """Returns a value of the source at the channels that the target has."""
        letters, large = string.ascii_lowercase[: value.ndim], list(string.ascii_lowercase[: value.ndim])
        matrices, names = [], []
        for axis, place in zip(site.pairs, site.channel_axes, strict=True):
            if axis.name is not None:
                large[place] = letters[place].upper()
                around = "" if axis.around is None else letters[site.channel_axes[axis.around]]
                matrices.append(adapter["outputs"][axis.name])
                names.append(f"{around}{letters[place]}{large[place]}")
        equation = f"{','.join([*names, ''.join(large)])}->{letters}"
        return jnp.einsum(equation, *matrices, value.astype(jnp.float32), precision=lax.Precision.HIGHEST)

    def _valid(self, site: Site, adapter: Adapter) -> jax.Array:
        """Returns which channels of a site have one of the source, bool `[m]`."""
        valid = jnp.ones(site.channels, bool)
        for number, axis in enumerate(site.pairs):
            if axis.name is not None:
                chosen = jnp.any(adapter["outputs"][axis.name] != 0, -1)
                places = [number] if axis.around is None else [axis.around, number]
                chosen = chosen if places == sorted(places) else chosen.T
                valid &= jnp.expand_dims(chosen, [i for i in range(valid.ndim) if i not in places])
        return valid.reshape(-1)

    def check_rows(self, size: int) -> None:
        """Warns of sites with fewer rows than unknowns; a batch has so many inputs."""
        for site in self.plan.sites:
            rows = min(self._most_rows(site), site.rows // size * self.num_inputs)
            if rows < site.num_unknowns:
                warnings.warn(
                    f"{site.name} has {site.num_unknowns} unknowns and {rows} rows to solve them from: the ridge is "
                    f"raised {site.num_unknowns / rows:.3g} times; give more inputs",
                    FewRowsWarning,
                    stacklevel=3,
                )

    def _most_rows(self, site: Site) -> int:
        """Returns how many rows are taken at most; of a channel with a few numbers of its own, fewer are enough."""
        few = max(_FEW_ROWS, _ROWS_OF_UNKNOWN * site.num_unknowns)
        return self.max_rows if site.dense else min(self.max_rows, few)

    def _target_kept(self) -> list[frozenset[int]]:
        """Returns for each site the target's values that later sites need."""
        program, sites = self.target, self.plan.sites
        written = {path: number for number, site in enumerate(sites) for path in site.leaves}

        def level(value: int) -> int:
            return max((written[path] for path in program.leaves_of[value] if path in written), default=-1)

        levels = {value: level(value) for equation in program.equations for value in equation.outputs}
        found = []
        for number in range(len(sites)):
            needed = program.ancestors(site.end for site in sites[number:])
            kept = {
                value
                for equation in program.equations
                if needed.intersection(equation.outputs) and levels[equation.outputs[0]] >= number
                for value in equation.reads
                if value in program.data and levels.get(value, -1) < number
            }
            found.append(_without_views(program, kept))
        return found

    def _source_kept(self) -> list[frozenset[int]]:
        """Returns the same of the source: what was computed by the end of a site and is read after it."""
        program, ends = self.source, [site.source_end for site in self.plan.sites]
        found, reached = [], -1
        for number, end in enumerate(ends):
            reached, later = max(reached, program.makers[end]), ends[number + 1 :]
            needed = program.ancestors(later)
            kept = {
                value
                for place, equation in enumerate(program.equations)
                if place > reached and needed.intersection(equation.outputs)
                for value in equation.reads
            } | set(later)
            kept = {value for value in kept & program.data if program.makers.get(value, -1) <= reached}
            found.append(_without_views(program, kept))
        return found


def _stacked(fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any, after: jax.Array) -> tuple[Any, Any]:
    """Returns what `lax.scan(fn, carry, rows)` does; memory for its stacks is taken once the number `after` is known.

    Of scans in a row XLA takes the memory of all at once on a CPU, since the zeros that stacks start as can be had
    before all else.
    """
    count = len(jax.tree.leaves(rows)[0])
    first = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape[1:], one.dtype), rows)
    made = jax.eval_shape(fn, carry, first)[1]
    start = lax.stop_gradient(after)  # All of it is overwritten.
    stacks = jax.tree.map(lambda one: jnp.full((count, *one.shape), start, one.dtype), made)

    def step(i: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, stacks = state
        carry, made = fn(carry, jax.tree.map(lambda one: one[i], rows))
        return carry, jax.tree.map(lambda stack, one: stack.at[i].set(one), stacks, made)

    return lax.fori_loop(0, count, step, (carry, stacks))


def _without_views(program: Program, kept: set[int]) -> frozenset[int]:
    """Returns the values to keep. Those cut out of one value are replaced by it, where together they are larger.

    A depthwise convolution reads its input once for each place of its window, each time sliced again.
    """
    kept, changes = set(kept), True
    while changes:
        changes = False
        views: dict[int, set[int]] = {}
        for value in kept:
            place = program.makers.get(value)
            equation = None if place is None else program.equations[place]
            if equation is not None and equation.name in _VIEWS:
                (whole,) = (one for one in equation.reads if one in program.data)
                views.setdefault(whole, set()).add(value)
        for whole, cut in views.items():
            if whole in kept or sum(map(program.size, cut)) > program.size(whole):
                kept, changes = (kept - cut) | {whole}, True
    return frozenset(kept)
