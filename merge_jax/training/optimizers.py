"""Optimizers: the adapter's, and the joint step's requirements on the models'."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from merge_jax.checks import check_above_zero, check_zero_or_more
from merge_jax.paths import some_of
from merge_jax.training.packing import packed
from merge_jax.types import Params

__all__ = ["adapter_adamw", "holds_parameters", "optimizer_update", "warn_of_moments"]


def adapter_adamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    weight_decay: float = 5e-4,
    max_norm: float = 50.0,
) -> optax.GradientTransformation:
    """Returns the adapter's published optimizer: clip by global norm, then AdamW.

    Only kernels decay; biases, norms and gates do not. Small leaves are updated as one vector. A schedule counts the
    adapter's updates, one per transfer. The published grid of rates is 0.1, 0.01, 0.001, 0.0001; 0.001 is our choice
    among them.

    Raises:
      ValueError: a rate or a norm that is not finite and above 0, or a decay that is not finite and at least 0.
    """
    if not callable(learning_rate):
        check_above_zero(learning_rate=learning_rate)
    check_above_zero(max_norm=max_norm)
    check_zero_or_more(weight_decay=weight_decay)

    def decays(params: dict[str, Any]) -> dict[str, Any]:
        large = {path: path.endswith("kernel") for path in params["large"]}
        return {name: large if name == "large" else name == "kernel" for name in params}

    adamw = optax.adamw(learning_rate, weight_decay=weight_decay, mask=decays)
    return packed(optax.chain(optax.clip_by_global_norm(max_norm), adamw))


def optimizer_update(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: Any,
    params: Params,
    value: jax.Array,
    value_fn: Callable[[Params], jax.Array],
) -> tuple[Params, Any]:
    """Returns the update of an optimizer, which may also need the loss: `polyak_sgd`, `lbfgs`, `contrib.momo`.

    Raises:
      ValueError: it needs other arguments, or stores parameters itself.
    """
    extra = {"value": value, "grad": grads, "value_fn": value_fn}
    parameters = inspect.signature(optimizer.update).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        extra = {name: one for name, one in extra.items() if name in parameters}
    try:
        return optimizer.update(grads, opt_state, params, **extra)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            "the optimizer cannot update these parameters from gradients, parameters and the loss alone "
            f"({type(error).__name__}: {error})"
        ) from error


def holds_parameters(optimizer: optax.GradientTransformation, params: Params) -> bool:
    """Returns whether an optimizer's initial state depends on the parameters' values.

    If so, it stores parameters, or distances to them, and external writes to the model, such as a transfer's, do not
    update these. Determined from the trace of its `init`, without computing it.
    """
    try:
        jaxpr = jax.make_jaxpr(optimizer.init)(params).jaxpr
    except TypeError:  # It reads concrete values, which a trace lacks, so the answer is unknown.
        return False
    return any(_reached(jaxpr, [True] * len(jaxpr.invars)))


def warn_of_moments(*opt_states: Any) -> None:
    """Warns of second moments in 16 bits, and of vectors that Muon takes for matrices."""
    _warn_of_short_moments(opt_states)
    _warn_of_muon_vectors(opt_states)


def _warn_of_short_moments(opt_states: Any) -> None:
    """Warns of second moments in 16 bits: bfloat16 rounds away one step's decay, float16 the squares of gradients."""
    moments = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), getattr(leaf, "dtype", None))
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_states)
        if any(getattr(key, "name", None) == "nu" for key in path)
    ]
    for dtype, effect in (
        (jnp.bfloat16, "they do not fall again, and updates become too small for good"),
        (jnp.float16, "squares of small gradients are 0 there, as is Adam's epsilon, and updates are not finite"),
    ):
        short = [path for path, found in moments if found == dtype]
        if short:
            name = jnp.dtype(dtype).name
            warnings.warn(
                f"the optimizer's second moments of {name} parameters are {name} too ({some_of(short, 3)}): {effect}."
                " Keep parameters in float32, and cast them in the loss",
                stacklevel=4,
            )


def _warn_of_muon_vectors(opt_states: Any) -> None:
    """Warns of biases and norms with two axes, by heads or by layers, which Muon would orthogonalise like a matrix."""
    nodes = jax.tree.leaves(opt_states, is_leaf=lambda node: isinstance(node, optax.contrib.MuonState))
    states = [node for node in nodes if isinstance(node, optax.contrib.MuonState)]
    leaves = [path for state in states for path in jax.tree_util.tree_flatten_with_path(state.mu)[0]]
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    vectors = [path for path in paths if path.split("/")[-1] in ("bias", "scale")]
    if vectors:
        warnings.warn(
            f"Muon orthogonalises vectors, since they have an axis of heads or layers ({some_of(vectors, 3)}): a step"
            " in one of them depends on the others, and may increase the loss. Name the leaves that are matrices with"
            " muon_weight_dimension_numbers",
            stacklevel=4,
        )


def _reached(jaxpr: Any, from_inputs: Sequence[bool]) -> list[bool]:
    """Returns which outputs of a program depend on the values of the marked inputs."""
    reached = {var for var, marked in zip(jaxpr.invars, from_inputs, strict=True) if marked}

    def marks(variables: Sequence[Any]) -> list[bool]:
        return [isinstance(var, core.Var) and var in reached for var in variables]

    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
        outputs = (
            [any(marks(eqn.invars))] * len(eqn.outvars) if inner is None else _reached(inner.jaxpr, marks(eqn.invars))
        )
        reached.update(var for var, marked in zip(eqn.outvars, outputs, strict=True) if marked)
    return marks(jaxpr.outvars)
