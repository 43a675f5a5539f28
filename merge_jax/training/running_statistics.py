"""Recomputes BatchNorm statistics from given inputs."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from merge_jax.checks import check_apply, check_at_least_one, check_numbers, name_misfit, name_missing_collections
from merge_jax.objectives.precision import at_least_float32
from merge_jax.paths import flatten, replace
from merge_jax.types import ModelApply

__all__ = ["bind_axis", "check_inputs", "check_variables", "evenly_split", "reset_statistics"]

_COLLECTION = "batch_stats"


def reset_statistics(
    apply: ModelApply, variables: Mapping[str, Any], *inputs: Any, batch_size: int = 512, axis_name: str | None = None
) -> dict[str, Any]:
    """Returns the variables with BatchNorm's running statistics recomputed from exactly these inputs.

    With batches `b` of `n_b` of the `N` inputs, `mean = sum_b n_b mean_b / N` and `var = sum_b n_b (var_b + (mean_b -
    mean)^2) / N`. These are mean and variance over all inputs, not an exponential average, whatever the momentum is. Up
    to `batch_size` inputs form one batch; evaluation mode then computes what training mode computes on it. With more
    inputs, layers after the first BatchNorm see batches that are normalised by their own statistics, so their
    statistics depend slightly on the batch size. Batch sizes differ by at most one. Dropout is off, as in evaluation
    mode, in attention too; other random numbers, such as of a stochastic depth, are drawn. Statistics that are no
    running averages, such as those of SpectralNorm, are updated once. Nothing else changes: other collections,
    statistics that training mode does not update (such as those of frozen layers), and models without statistics. Use
    it after writing weights by a transfer, averaging or pruning. It re-estimates statistics as SWA does (Izmailov et
    al., arXiv:1803.05407).

    Args:
      apply: `model.apply` of a Linen module called as `(*inputs, train=True)`.
      variables: `{"params": ..., "batch_stats": ..., ...}`; statistics under other names than `mean` and `var` are
        averaged.
      inputs: the model's inputs `[N, ...]`, in order; unlabelled. They may stay on the host.
      batch_size: the maximum number of examples per pass.
      axis_name: the axis that the model's BatchNorm averages over under `pmap`, if any; here each batch is whole.

    Raises:
      ValueError: no inputs or examples, different numbers of examples, no `params`, a module instead of its `apply`,
        a function without training mode, or a model that reads a missing collection.
    """
    check_apply(apply=apply)
    _check_trains(apply)
    size = check_inputs(inputs, batch_size=batch_size)
    check_variables("variables", variables)
    statistics = variables.get(_COLLECTION, {})
    with name_missing_collections(variables), name_misfit(inputs):
        if not jax.tree.leaves(statistics):
            jax.eval_shape(lambda *rows: _in_training(apply, variables, rows, axis_name), *(one[:1] for one in inputs))
            return dict(variables)
        parts = evenly_split(size, batch_size)
        found = [_moments(apply, axis_name, dict(variables), tuple(one[part] for one in inputs)) for part in parts]
    weights = np.array([part.stop - part.start for part in parts]) / size
    return {**variables, _COLLECTION: _pooled(statistics, found, weights)}


def _check_trains(apply: ModelApply) -> None:
    """Raises ValueError for a function without training mode, such as a refit takes."""
    options = {"train": True, "mutable": [], "rngs": {}}
    try:
        signature = inspect.signature(apply)
    except (TypeError, ValueError):  # Some callables have none.
        return
    try:
        signature.bind_partial({}, **options)
    except TypeError:
        raise ValueError(
            f"statistics are those of training mode: apply is called with {', '.join(options)}, and the given function "
            f"takes {signature}; give the `apply` of a Linen module that takes `train`"
        ) from None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(apply: ModelApply, axis_name: str | None, variables: dict[str, Any], inputs: tuple[Any, ...]) -> Any:
    """Returns the statistics of one batch, from the running average that training mode computes."""

    leaves = _floats(variables[_COLLECTION])  # Integers, such as counters, are not averages.

    def averaged(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        statistics = replace(variables[_COLLECTION], leaves)
        return _floats(_in_training(apply, {**variables, _COLLECTION: statistics}, inputs, axis_name))

    # new = momentum old + (1 - momentum) batch: the derivative is the momentum; starting from 0 yields the batch's
    # part. Whatever has another derivative, such as the vectors of a SpectralNorm, is no average: 0 would break it.
    _, derivative = jax.linearize(averaged, leaves)
    momentum = derivative(jax.tree.map(jnp.ones_like, leaves))
    steps = {path: jnp.cos(i + jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
             for i, (path, leaf) in enumerate(leaves.items())}  # fmt: skip
    along = derivative(steps)
    moves = {path: (m > 0) & (m < 1) & jnp.allclose(along[path], m * steps[path], atol=1e-4)
             for path, m in momentum.items()}  # fmt: skip
    new = averaged(jax.tree.map(lambda moved, leaf: jnp.where(moved, 0, leaf), moves, leaves))
    return jax.tree.map(
        lambda moved, m, one: jnp.where(moved, one / jnp.where(moved, 1 - m, 1), one), moves, momentum, new
    )


def _floats(statistics: Any) -> dict[str, jax.Array]:
    leaves = flatten(jax.tree.map(at_least_float32, statistics))  # In bfloat16, a momentum of 0.99 is 0.988.
    return {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def _in_training(apply: ModelApply, variables: Mapping[str, Any], inputs: Any, axis_name: str | None) -> Any:
    """Returns the statistics after a pass in training mode without dropout."""

    def without_dropout(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            return args[0] if args else kwargs["inputs"]
        if isinstance(context.module, nn.MultiHeadDotProductAttention):  # It drops weights itself.
            object.__setattr__(context.module, "dropout_rate", 0.0)
        return call(*args, **kwargs)

    def run() -> Any:
        with nn.intercept_methods(without_dropout):
            mutable = [name for name in variables if name != "params"]
            _, updates = apply(variables, *inputs, train=True, mutable=mutable, rngs={"dropout": jax.random.key(0)})
        return updates.get(_COLLECTION, {})

    return bind_axis(run, axis_name)


def _pooled(statistics: Any, found: list[dict[str, jax.Array]], weights: np.ndarray) -> Any:
    """Returns pooled mean and variance of all batches, and the mean of any other statistic."""
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    def mean(leaves: jax.Array) -> jax.Array:
        return jnp.tensordot(weights, leaves, 1, precision=lax.Precision.HIGHEST)

    pooled = {path: mean(leaves) for path, leaves in batches.items()}
    for path, leaves in batches.items():
        means = batches.get(f"{path.removesuffix('var')}mean")
        if path.rpartition("/")[2] == "var" and means is not None and means.shape == leaves.shape:
            pooled[path] += mean(jnp.square(means - mean(means)[None]))
    olds = flatten(statistics)
    return replace(statistics, {path: leaf.astype(olds[path].dtype) for path, leaf in pooled.items()})


def bind_axis(run: Callable[[], Any], axis_name: str | None) -> Any:
    """Calls a function with the axis bound to one device, so that averages are those of its batch."""
    if axis_name is None:
        return run()
    return jax.vmap(run, in_axes=(), out_axes=None, axis_size=1, axis_name=axis_name)()


def evenly_split(size: int, most: int) -> list[slice]:
    """Returns the fewest slices of at most that many examples, whose sizes differ by at most one."""
    count = math.ceil(size / most)
    bounds = [size * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def check_variables(name: str, variables: Any) -> None:
    """Raises ValueError unless these are a model's variables by collection."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f'{name} must be {{"params": ..., **model_state}}, as model.init gives them, got {found}')


def check_inputs(inputs: Any, **sizes: int) -> int:
    """Returns the number of examples.

    Raises:
      ValueError: no examples, different numbers of them, or an option that is not a positive integer.
    """
    check_at_least_one(**sizes)
    for place, one in enumerate(inputs):
        check_numbers(f"input {place}", one)
    counts = {len(one) if np.ndim(one) else 0 for one in inputs}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"inputs must be one or more arrays [N, ...] of as many examples, got {_shapes(inputs)}")
    return counts.pop()


def _shapes(inputs: Any) -> str:
    return ", ".join(str(list(np.shape(one))) for one in inputs) or "none"
