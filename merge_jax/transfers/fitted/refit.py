"""Refit: after an aligned write, every target layer is solved to reproduce the source's layer."""

import warnings
from typing import NamedTuple, NoReturn, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from merge_jax.checks import (
    all_finite,
    check_above_zero,
    check_apply,
    check_arrays,
    check_at_least_one,
    check_choice,
    check_key,
    check_numbers,
)
from merge_jax.paths import flatten, some_of
from merge_jax.transfers.alignment.fit import ChannelChoice
from merge_jax.transfers.fitted.compiled import ModelFn, RefitOptions, prepared
from merge_jax.transfers.fitted.routes import routes_with_state
from merge_jax.transfers.fitted.walk import FewRowsWarning
from merge_jax.transfers.host_leaves import any_on_host
from merge_jax.transfers.routes import Routes
from merge_jax.types import Params

__all__ = ["FewRowsWarning", "Refit", "refit"]


class Refit(NamedTuple):
    """The result of a refit.

    Attributes:
      variables: the target's parameters and state.
      solved: `{leaf: R^2}`, the share of the source's variance at the chosen channels that the target explains after
        the layer is solved, on the inputs of the fit; NaN if the source has no variance, e.g. on one input.
      kept: `{leaf: reason}` for routed parameters that were aligned but not solved.
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
    """Returns a target that reproduces the source's outputs, layer by layer, in closed form and without labels.

    Both models are from one family, or from two families whose layers can be paired: MobileNetV2 and EfficientNet-lite
    have the same blocks, with different windows, widths and counts. An extra target block may also have a route from
    the source's last block; it is solved for the remaining error at the end of that block.

    First, `aligned_transfer` writes the chosen channels, consistently in all leaves, statistics of norms included. Then
    the layers are solved in the order of the computation. `X [n, d]` is a layer's input **in the target as written so
    far**, one row for each input and position. `T [n, m]` is the source's value at the chosen channels just before the
    next nonlinearity, minus the target's value there without this layer. Then

        W = (X'X/n + r I)^-1 (X'T/n + r W0),    r = ridge tr(X'X/n) / d max(1, d/n),    b = mean T - mean X W,

    with centred `X` and `T` (not centred, and `b = 0`, without a bias or norm that takes `b`), and `W0` the aligned
    kernel. So each layer corrects the errors of those before it. The intercept goes to the bias or to the norm that
    follows. Running statistics become those of the same inputs, and gain and bias of the norm compensate for them; a
    norm without both, or of a sum, keeps the aligned statistics. What the target multiplies by 0 keeps its aligned
    values, and explains nothing.
    **Streams**: between the blocks of a MobileNetV2 or a transformer, only solved layers act on single channels. Layers
    and embeddings write into the stream, layers read it, and norms divide by its total size. So any directions serve as
    well as channels. There, `T` is the source's value along as many orthonormal directions, those of its largest second
    moments, rotated toward the chosen channels (for the choice `moments`). Embeddings are aligned to the same
    directions.
    Kernels whose outputs are added, such as the last one of a residual block and its shortcut, are solved jointly.
    Leaves with separate entries for each channel (gain and bias of a LayerNorm, depthwise kernels) are solved channel
    by channel. If the last layer has a route, it is solved for the source's logits.

    Sources: least squares after matching (PLeaS, arXiv:2407.02447), on the layer inputs of the model merged so far
    (RegMean++, arXiv:2508.03121). Our choices are to follow any two computations by their channel graphs, and the
    directions, which keep more of a stream than any choice of channels. (SliceGPT, arXiv:2401.15024, rotates the
    stream of one transformer to its principal components, exactly for RMSNorm.)

    It supports `jit`, and gradients with respect to both variables. Moments are accumulated over batches. A layer needs
    memory for `X'X`, and for the activations of all inputs at two depths of both models, one model after the other.

    Args:
      routes: as in `aligned_transfer`, for parameters: `{"**": "**"}` pairs all leaves with equal paths. Leave out last
        layers with other labels.
      source: `(variables, *inputs) -> outputs`, such as `source_model.apply`, in evaluation mode.
      target: the same for the target.
      source_variables: `{"params": ..., "batch_stats": ...}`, as in Flax, or a plain tree of parameters, as `source`
        expects.
      target_variables: those of the target; leaves without a route do not change, except bias and norm of a solved
        layer.
      *inputs: unlabelled inputs `[N, ...]`, such as the target will see.
      ridge: dimensionless penalty; values from 1e-3 to 1e-1 gave equal results on digits.
      batch_size: inputs per batch.
      max_rows: approximate maximum of rows per layer, drawn at random over inputs and positions. If each channel has
        `d` separate weights, as in a depthwise convolution, the maximum is at most `max(4096, 200 d)`.
      key: for drawing these rows; `jax.random.key(0)` by default.
      choice: how channels are chosen, as in `aligned_transfer`, on at most 512 of the inputs.
      axis_name: the axis of `pmap`, or of `shard_map` with `check_vma=False`, whose devices share the inputs.

    Raises:
      ValueError: no inputs, texts, or unequal numbers of them; a module instead of its `apply`; a result that is not
        finite (not checked under `jit`); variables or inputs that do not fit a model; no layer to solve; a `shard_map`
        that checks what varies over its devices; as `channel_graph` and `aligned_transfer`.

    Warns:
      FewRowsWarning: a layer has more unknowns than rows, so its ridge is raised by their ratio.
      UserWarning: a model does not read its running statistics, as in training mode.
    """
    count = _count(inputs)
    check_apply(source=source, target=target)
    check_at_least_one(batch_size=batch_size, max_rows=max_rows)
    check_above_zero(ridge=ridge)
    check_choice("choice of channels", choice, get_args(ChannelChoice))
    check_arrays("source's", source_variables)
    check_arrays("target's", target_variables)
    named_routes = routes_with_state(routes, source_variables, target_variables)
    given = [jnp.asarray(one) for one in inputs]
    if any(axis_name in jax.typeof(one).mat.varying for one in given):
        raise ValueError(f"a refit over {axis_name!r} needs jax.shard_map(..., check_vma=False), got check_vma=True")
    key = jax.random.key(0) if key is None else key
    check_key(key)
    arguments = source_variables, target_variables, given, key
    options = RefitOptions(ridge, batch_size, max_rows, choice, axis_name)
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments))
    made = prepared(source, target, named_routes, arguments[:3], options, keep=not traced)
    for role, signs in made.training.items():
        if signs:
            warnings.warn(
                f"the {role} {' and '.join(signs)}: it seems to be in training mode; give the model in evaluation mode",
                stacklevel=2,
            )
    made.walk.check_rows(min(batch_size, count), 1 if axis_name is None else lax.axis_size(axis_name))
    run = made.run if any_on_host(*arguments) else made.compiled
    variables, solved, finite = run(*arguments)
    if not isinstance(finite, Tracer) and not finite:
        _explain(given, source_variables, target_variables)
    return Refit(variables, solved, dict(made.kept))


def _count(inputs: tuple[jax.Array, ...]) -> int:
    wrong = [type(one).__name__ for one in inputs if not hasattr(one, "shape")]
    if wrong:
        found = ", ".join(wrong)
        raise ValueError(f"the refit takes its inputs as arrays, one after the other (texts as tokens), got {found}")
    for place, one in enumerate(inputs):
        check_numbers(f"input {place} of the refit", one)
    counts = {jnp.shape(one)[0] if jnp.ndim(one) else 0 for one in inputs}
    if len(counts) != 1 or not min(counts):
        raise ValueError(f"the refit needs inputs, as many of each, got {[jnp.shape(one) for one in inputs]}")
    return counts.pop()


def _explain(inputs: list[jax.Array], source: Params, target: Params) -> NoReturn:
    """Raises ValueError for a refit with non-finite results, naming inputs and variables that were not finite."""
    before = {f"input {place}": one for place, one in enumerate(inputs)}
    for role, variables in (("source", source), ("target", target)):
        before |= {f"the {role}'s {path}": leaf for path, leaf in flatten(variables).items()}
    wrong = [name for name, leaf in before.items() if not all_finite(leaf)]
    raise ValueError(
        "the refit is not finite: "
        + (
            f"there are non-finite values in {some_of(wrong, 3)}"
            if wrong
            else "the source or the target computes non-finite values, or the ridge is too small to solve in float32"
        )
    )
