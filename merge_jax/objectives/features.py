"""Agreement of two models' features on one batch: a training objective for transfers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.checks import check_entries, name_missing_collections
from merge_jax.objectives.device_axis import previous_example, whole_batch
from merge_jax.paths import near_misses
from merge_jax.types import Batch, LossFn, ModelApply, ModelState, Params, TeacherFn

__all__ = [
    "CompareOn",
    "FeatureObjective",
    "can_be_averaged",
    "centred",
    "cka",
    "disagreement",
    "feature_agreement",
    "features_teacher",
    "mixed",
    "with_features",
]

CompareOn = Callable[[jax.Array], jax.Array]
"""Maps an input of the target, `[B, ...]`, to the input on which both models are compared."""


class FeatureObjective(Protocol):
    """A distance between the features of two models, such as `disagreement` or `redundancy_suppression`."""

    def __call__(
        self, features: Sequence[jax.Array], others: Sequence[jax.Array], /, *, axis_name: str | None = None
    ) -> jax.Array:
        """Returns a scalar, smaller is better, from features `[B, ...]` of equally many layers of both models."""
        ...


_FEATURES = "source_features"
_HINT = " (see the option `inputs`)"
_EPSILON = 1e-12


def cka(features: jax.Array, other: jax.Array) -> jax.Array:
    """Returns the linear centred kernel alignment of two models' features on the same examples, in [0, 1].

    `<K, L> / (|K| |L|)` with `K = X X^T` and `L = Y Y^T`, where `X [B, ...]` and `Y [B, ...]` are flattened to rows and
    centred over the batch. It compares similarities between examples, so the models may differ in width, in resolution
    and in the meaning of their channels. It is invariant to rotation and scaling of features. With few examples and
    many features it is high for any two models, so compare only values for equal batches. It is 0 for features that are
    the same for all examples. Source: Kornblith et al., arXiv:1905.00414.

    Raises:
      ValueError: features with different numbers of examples.
    """
    if features.shape[0] != other.shape[0]:
        raise ValueError(f"features must be of the same examples, got {features.shape[0]} and {other.shape[0]}")
    kernel, other_kernel = _kernel(features), _kernel(other)
    norms = jnp.sqrt(jnp.sum(jnp.square(kernel)) * jnp.sum(jnp.square(other_kernel)) + _EPSILON)
    return jnp.sum(kernel * other_kernel) / norms


def _kernel(features: jax.Array) -> jax.Array:
    """Returns the inner products of all pairs of centred examples, `[B, B]`, with mean square 1."""
    rows = centred(features.reshape(features.shape[0], -1).astype(jnp.float32))
    # Scaled first, since squares of large features overflow float32.
    rows /= jnp.sqrt(jnp.mean(jnp.square(rows)) + _EPSILON)
    return rows @ rows.T / rows.shape[1]


def centred(rows: jax.Array) -> jax.Array:
    """Returns rows `[B, d]` minus their mean; constant columns are exactly 0, without rounding errors."""
    rows -= lax.stop_gradient(rows[:1])
    return rows - rows.mean(axis=0, keepdims=True)


def disagreement(
    features: Sequence[jax.Array], others: Sequence[jax.Array], *, axis_name: str | None = None
) -> jax.Array:
    """Returns `mean over layers (1 - cka(features, others))`; the others get no gradient.

    Args:
      features: of each layer, `[B, ...]`.
      others: of equally many layers of another model.
      axis_name: the axis of the devices that share the batch, if any; features are compared over the whole batch.

    Raises:
      ValueError: different numbers of layers.
    """
    if len(others) != len(features):
        raise ValueError(f"{len(features)} layers are to agree with {len(others)} of the source")
    own, other = whole_batch((tuple(features), tuple(map(lax.stop_gradient, others))), axis_name)
    agreements = [cka(*pair) for pair in zip(own, other, strict=True)]
    return 1 - sum(agreements[1:], agreements[0]) / len(agreements)


def mixed(inputs: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Returns the mean of each example and the one before it, `[B, ...]` to `[B, ...]`, float32.

    For `compare_on` of `feature_agreement`: points between the examples, different at every step as batches are
    redrawn, so that models are also compared where there is no data. With few examples, most of the source's knowledge
    lies there. Integers other than pixels (any type but uint8), such as tokens, cannot be averaged and stay
    as they are. Sources: mixup (Zhang et al., arXiv:1710.09412), and distillation on it (Beyer et al.,
    arXiv:2106.05237), with equal weights and neighbours in the batch as our choice: no key is needed. Devices that
    share a batch along `axis_name` exchange their last examples.
    """
    if not can_be_averaged(inputs):
        return inputs
    inputs = inputs.astype(jnp.float32)
    return (inputs + previous_example(inputs, axis_name)) / 2


def can_be_averaged(inputs: jax.Array) -> bool:
    """Returns whether the mean of two examples is a valid input: not for integers other than pixels, e.g. tokens."""
    return inputs.dtype == jnp.uint8 or not jnp.issubdtype(inputs.dtype, jnp.integer)


def with_features(apply_fn: ModelApply, layers: Sequence[str] = ("features",)) -> ModelApply:
    """Returns an apply function that outputs a pair: the model's outputs, and the features `[B, ...]` of these layers.

    `per_example` of `model_loss` then receives this pair, from one pass.

    Args:
      apply_fn: `model.apply` of a Linen module.
      layers: paths of submodules, such as `stage1_0` or `encoder/layer_0`, or of values that the model sows, such as
        `features`, the input of the last layer in `merge_jax.models`.

    Raises:
      ValueError: no layers; while tracing, a missing layer.
    """
    _check_layers(layers)

    def apply(variables: Any, *inputs: jax.Array, mutable: Any = False, **options: Any) -> Any:
        collections = (mutable,) if isinstance(mutable, str) else tuple(mutable or ())
        outputs, updates = apply_fn(
            variables, *inputs, mutable=[*collections, "intermediates"], capture_intermediates=True, **options
        )
        updates = dict(updates)
        found = _outputs_by_path(updates.pop("intermediates", {}))
        for layer in layers:
            if layer not in found:
                hint = near_misses(layer, found)
                raise ValueError(f"the model has no layer {layer!r} to compare features of; {hint}")
        both = outputs, tuple(found[layer] for layer in layers)
        return both if mutable is False else (both, updates)

    return apply


def feature_agreement(
    apply_fn: ModelApply,
    layers: Sequence[str],
    *,
    inputs: Sequence[str] = ("image",),
    weight: float = 20.0,
    objective: FeatureObjective = disagreement,
    compare_on: CompareOn | None = None,
    axis_name: str | None = None,
) -> LossFn:
    """Returns a loss term that pulls the target's features toward those of the source, for `sum_losses`.

    `w mean_l (1 - cka(F_l, G_l))`, where `F_l` are the features of the target's layer `l`, and `G_l` those of the
    source on the same batch, from `features_teacher`. The metric `agreement` is the mean cka. The model state does not
    change. The adapter follows the gradient of the target's loss, so it also learns from the features. Labels need not
    be shared, but the source must be able to read the target's inputs. Our choice of a functional objective, beyond
    arXiv:2404.13322.

    Args:
      apply_fn: `model.apply` of the target, a Linen module called as `(*inputs, train=True)`.
      layers: paths of its submodules, as in `with_features`.
      inputs: names of the batch entries that are its inputs, in order.
      weight: weight of the disagreement, 0 or more; 0 only measures the agreement.
      objective: compares features, instead of `1 - cka`, such as `merge_jax.objectives.redundancy_suppression`; the
        metric is 1 minus its value.
      compare_on: changes the inputs on which features are compared, such as `mixed`; None for no change. The teacher
        must use the same.
      axis_name: that of `make_joint_step`, under `pmap` or `shard_map`; features are compared over the whole batch.

    Raises:
      ValueError: no layers, or a weight that is negative or not a number; while tracing, a missing layer or entry, or a
        different number of source layers.
    """
    if not 0 <= weight < float("inf"):
        raise ValueError(f"the weight of the disagreement must be 0 or more, got {weight}")
    observe = with_features(apply_fn, layers)

    def loss_fn(
        params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, dict[str, jax.Array]]]:
        check_entries(batch, *inputs, hint=_HINT)
        check_entries(batch, _FEATURES, hint=" (features_teacher adds them)")
        with name_missing_collections(model_state, "target"):
            (_, features), _ = observe(
                {"params": params, **model_state},
                *_compared(batch, inputs, compare_on),
                train=True,
                mutable=list(model_state),
                rngs={"dropout": key},
            )
        difference = objective(features, batch[_FEATURES], axis_name=axis_name)
        return weight * difference, (model_state, {"agreement": 1 - difference})

    return loss_fn


def features_teacher(
    apply_fn: ModelApply,
    layers: Sequence[str],
    *,
    inputs: Sequence[str] = ("image",),
    compare_on: CompareOn | None = None,
) -> TeacherFn:
    """Returns a teacher for `make_joint_step`: it adds the source's features of these layers to the target's batch.

    They are `batch["source_features"]`, an array `[B, ...]` for each layer. The source runs in evaluation mode.
    `inputs` are the entries of the target's batch that the source reads, after `compare_on` as in `feature_agreement`.

    Raises:
      ValueError: no layers; while tracing, a missing layer or entry.
    """
    observe = with_features(apply_fn, layers)

    def teacher(params: Params, model_state: ModelState, batch: Batch) -> Batch:
        check_entries(batch, *inputs, hint=_HINT)
        with name_missing_collections(model_state, "source"):
            read = _compared(batch, inputs, compare_on)
            _, features = observe({"params": params, **model_state}, *read, train=False)
        return {**batch, _FEATURES: features}

    return teacher


def _compared(batch: Batch, inputs: Sequence[str], compare_on: CompareOn | None) -> list[jax.Array]:
    """Returns the inputs on which the models are compared."""
    return [batch[name] if compare_on is None else compare_on(batch[name]) for name in inputs]


def _check_layers(layers: Sequence[str]) -> None:
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers must be one or more paths of submodules, got {layers!r}")


def _outputs_by_path(intermediates: Mapping[str, Any], prefix: str = "") -> dict[str, jax.Array]:
    found: dict[str, jax.Array] = {}
    for name, node in intermediates.items():
        path = f"{prefix}{name}"
        if isinstance(node, Mapping):
            found |= _outputs_by_path(node, f"{path}/")
        elif isinstance(node[-1], jax.Array):  # The last call, if the module is called several times.
            found[path.removesuffix("/__call__")] = node[-1]
    return found
