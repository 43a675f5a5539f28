"""Refit: after an aligned write, every layer of the target is solved to compute what the source's does."""

from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax.errors import ApplyScopeInvalidVariablesTypeError, ScopeCollectionNotFound
from jax.core import Tracer

from merge_jax.checks import all_finite, check_arrays, check_at_least_one
from merge_jax.paths import flatten, some_of
from merge_jax.transfers.alignment_fit import ChannelChoice
from merge_jax.transfers.host_leaves import any_on_host
from merge_jax.transfers.pairing import resolve
from merge_jax.transfers.refit_program import ModelFn, RefitOptions, prepared
from merge_jax.transfers.refit_routes import routes_with_state
from merge_jax.transfers.refit_walk import FewRowsWarning
from merge_jax.transfers.routes import Routes
from merge_jax.types import Params

__all__ = ["FewRowsWarning", "Refit", "refit"]


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
    check_arrays("source's", source_variables)
    check_arrays("target's", target_variables)
    named_routes = routes_with_state(routes, source_variables, target_variables)
    resolve(named_routes, source_variables, target_variables)  # Refuses and warns; the rest needs shapes alone.
    given = [jnp.asarray(one) for one in inputs]
    key = jax.random.key(0) if key is None else key
    arguments = source_variables, target_variables, given, key
    options = RefitOptions(ridge, batch_size, max_rows, choice, axis_name)
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments))
    try:
        made = prepared(source, target, named_routes, arguments[:3], options, keep=not traced)
    except (ScopeCollectionNotFound, ApplyScopeInvalidVariablesTypeError) as error:
        roles = (("source_variables", source_variables), ("target_variables", target_variables))
        found = " and ".join(f"{role} with {some_of(list(map(repr, tree)), 3)}" for role, tree in roles)
        raise ValueError(
            f"a model reads a collection that it was not given: pass variables as model.init returns them, "
            f"{{'params': ...}} and the model's state, got {found} ({error})"
        ) from None
    made.walk.check_rows(min(batch_size, count))
    run = made.run if any_on_host(*arguments) else made.compiled
    variables, solved, finite = run(*arguments)
    if not isinstance(finite, Tracer) and not finite:
        _explain(given, source_variables, target_variables)
    return Refit(variables, solved, dict(made.kept))


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
        "the refit is not finite: "
        + (
            f"there are non-finite values in {some_of(wrong, 3)}"
            if wrong
            else "the source or the target computes non-finite values"
        )
    )
