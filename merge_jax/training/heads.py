"""A linear head fitted in closed form or by L-BFGS: a probe of features, without training the model."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from merge_jax.checks import all_finite, check_above_zero, check_at_least_one, check_numbers, check_zero_or_more
from merge_jax.objectives.distillation import cross_entropy
from merge_jax.paths import some_of

__all__ = ["Head", "fit_head"]

_HIGHEST = lax.Precision.HIGHEST  # As on a CPU: a GPU multiplies with 10-bit mantissas by default.
_LEAST_VARIANCE = 1e-10  # Relative to the largest variance.


class Head(NamedTuple):
    """A linear layer: features `[N, d]` to logits `[N, C]`, as the leaves of a Dense layer.

    Attributes:
      kernel: `[d, C]`, float32.
      bias: `[C]`, float32.
    """

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, features: jax.Array) -> jax.Array:
        """Returns logits `[..., C]` of features `[..., d]`."""
        logits = jnp.matmul(features, self.kernel, precision=_HIGHEST)
        return logits + self.bias.reshape((1,) * (logits.ndim - 1) + (-1,))


def fit_head(
    features: Any,
    targets: Any,
    *,
    num_classes: int | None = None,
    penalty: float = 1.0,
    floor: float = 0.0,
    weights: Any = None,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
) -> Head:
    """Returns the linear head that fits labels (logistic regression) or logits (ridge regression) on features.

    `z_i` are the features, centred and divided by their standard deviation over the examples; `W` and `b` act on them:

    - labels `[N]`, integers: `min sum_i w_i CE(z_i W + b, y_i) + penalty / 2 |W|^2`, by L-BFGS from 0, until no
      entry of the gradient, divided by `sum_i w_i`, is above the tolerance;
    - logits `[N, C]`, floats: `min sum_i w_i |z_i W + b - y_i|^2 + penalty |W|^2`, in closed form.

    A penalty of 1 is scikit-learn's default for both (`C=1`, `alpha=1`), after a `StandardScaler`; the bias is not
    penalised. A feature whose deviation is below 1e-5 of the largest is ignored. Standardisation is folded into kernel
    and bias, so the head applies to the raw features. A feature that hardly varies then has large entries of the
    kernel, and training of the layers before it is unstable; a `floor` of 0.1 prevents both: `z_i` are divided by
    `sqrt(variance + floor * mean variance)` (our choice). Use it as a probe of features, or to initialise a last layer:
    write `kernel` and `bias` over its leaves with `replace`. Gradients with respect to the features pass through a head
    fitted to logits; one fitted to labels has derivatives in forward mode alone (`jax.jvp`).

    Args:
      features: `[N, d]`, such as the mean of a feature map over positions.
      targets: labels `[N]` in `[0, C)`, or logits `[N, C]`, such as another model's.
      num_classes: `C`; by default the largest label plus one, or the number of logits.
      penalty: weight of the penalty, above 0.
      floor: added to each feature's variance, in units of the mean variance of the features.
      weights: example weights `[N]`, 0 or more; 1 by default.
      tolerance: for labels, the largest entry of the gradient at convergence.
      max_steps: for labels, the maximum number of L-BFGS steps.

    Raises:
      ValueError: wrong shapes or types, non-finite values or results, fewer examples than classes, labels out of range.
        Under `jit`, values are not checked, and `num_classes` is required for labels.

    Warns:
      UserWarning: classes without an example of weight above 0, which the head never predicts; no convergence; or no
        feature that varies.
    """
    check_at_least_one(max_steps=max_steps)
    if not isinstance(penalty, Tracer):
        check_above_zero(penalty=penalty)
    if not isinstance(tolerance, Tracer):
        check_above_zero(tolerance=tolerance)
    if not isinstance(floor, Tracer):
        check_zero_or_more(floor=floor)
    check_numbers("features", features)
    check_numbers("targets", targets)
    if np.ndim(features) != 2 or 0 in np.shape(features):
        raise ValueError(f"features must be [N, d], a vector of each example, got {list(np.shape(features))}")
    if np.iscomplexobj(features):
        raise ValueError("features must be real numbers: give the real and imaginary parts side by side")
    size = np.shape(features)[0]
    if weights is not None:
        check_numbers("weights", weights)
    weights = jnp.ones(size, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    if weights.shape != (size,):
        raise ValueError(f"weights must be [{size}], one of each example, got {list(weights.shape)}")
    features = jnp.asarray(features, jnp.float32)
    _check_values("features", features)
    _check_values("weights", weights, smallest=0)
    if not isinstance(weights, Tracer) and not weights.any():
        raise ValueError("weights are all 0: no example counts")
    # On the host as given: on the device, JAX would cut labels of 64 bits to 32.
    classes = _check_targets(targets if isinstance(targets, jax.Array) else np.asarray(targets), weights, num_classes)
    options = [jnp.asarray(one, jnp.float32) for one in (penalty, floor, tolerance)]
    if np.ndim(targets) == 2:
        head = _ridge(features, jnp.asarray(targets, jnp.float32), weights, *options[:2])
    else:
        head, slope = _logistic(features, jnp.asarray(targets), weights, *options, classes, max_steps)
        if not isinstance(slope, Tracer) and not slope <= 10 * tolerance:  # Rounding may keep it slightly above.
            warnings.warn(
                f"logistic regression has not converged in {max_steps} steps: the largest entry of its gradient is "
                f"{float(slope):.2g}, the tolerance {float(tolerance):.2g}; give more max_steps, or raise the penalty",
                stacklevel=2,
            )
    if not isinstance(head.kernel, Tracer) and not all_finite(head):
        raise ValueError(
            f"the head is not finite: the numbers are too large for float32, or the penalty of {float(penalty):.3g} is"
            " too small to solve for it"
        )
    if not isinstance(head.kernel, Tracer) and not head.kernel.any():
        warnings.warn(
            "the head predicts the same of all examples: no feature varies in float32, or the targets do not",
            stacklevel=2,
        )
    return head


def _check_values(name: str, array: jax.Array | np.ndarray, smallest: float = -float("inf")) -> None:
    if not isinstance(array, Tracer) and not bool(jnp.all(jnp.isfinite(array) & (array >= smallest))):
        least = "" if smallest < 0 else f", each {smallest} or more"
        wrong = np.unique(np.argwhere(~np.asarray(jnp.isfinite(array) & (array >= smallest)))[:, 0])
        raise ValueError(f"{name} must be finite numbers{least}: those of {len(wrong)} examples are not ({wrong[0]})")


def _check_targets(targets: jax.Array | np.ndarray, weights: jax.Array, num_classes: int | None) -> int:
    """Returns the number of classes."""
    size = len(weights)
    labelled = jnp.issubdtype(targets.dtype, jnp.integer) and targets.ndim == 1
    if not labelled and not (jnp.issubdtype(targets.dtype, jnp.floating) and targets.ndim == 2):
        raise ValueError(
            "targets must be labels [N], whole numbers, or logits [N, C], floats (of one-hot labels, take argmax), got "
            f"{targets.dtype} {list(targets.shape)}"
        )
    if len(targets) != size:
        raise ValueError(f"there are {size} features and {len(targets)} targets")
    if num_classes is not None:
        check_at_least_one(num_classes=num_classes)
    if not labelled:
        if not targets.shape[1]:
            raise ValueError(f"targets must be logits [N, C] of a class at least, got {list(targets.shape)}")
        _check_values("logits", targets)
        if num_classes not in (None, targets.shape[1]):
            raise ValueError(f"num_classes is {num_classes}, and there are {targets.shape[1]} logits")
        return targets.shape[1]
    if isinstance(targets, Tracer):
        if num_classes is None:
            raise ValueError("num_classes must be given under jit, where labels have no values")
        return num_classes
    labels = np.asarray(targets)
    classes = num_classes or int(labels.max()) + 1
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.size:
        raise ValueError(f"labels must lie in [0, {classes}), got {outside[0]} ({outside.size} are outside)")
    if size < classes:
        raise ValueError(f"{size} examples cannot cover {classes} classes: give at least one of each")
    counted = labels if isinstance(weights, Tracer) else labels[np.asarray(weights) > 0]
    absent = sorted(set(range(classes)) - set(counted.tolist()))
    if absent:
        warnings.warn(
            f"no example has label {some_of(list(map(str, absent)), 5)}: the head will never predict it", stacklevel=3
        )
    return classes


def _standardised(features: jax.Array, weights: jax.Array, floor: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the standardised features with their scale and offset, both `[d]`; `floor` as in `fit_head`."""
    share = weights / jnp.sum(weights)
    mean = jnp.matmul(share, features, precision=_HIGHEST)
    variance = jnp.matmul(share, jnp.square(features - mean[None]), precision=_HIGHEST)
    # A feature that is constant up to rounding is uninformative and is not scaled up: with a weight of 1e9 it would
    # react to the smallest step of earlier layers.
    varies = variance > jnp.maximum(1e-12 * jnp.square(mean), _LEAST_VARIANCE * variance.max())
    scale = jnp.where(varies, lax.rsqrt(jnp.where(varies, variance + floor * jnp.mean(variance), 1)), 0)
    return (features - mean[None]) * scale[None], scale, -mean * scale


def _folded(kernel: jax.Array, bias: jax.Array, scale: jax.Array, shift: jax.Array) -> Head:
    return Head(kernel * scale[:, None], bias + jnp.matmul(shift, kernel, precision=_HIGHEST))


@jax.jit
def _ridge(features: jax.Array, logits: jax.Array, weights: jax.Array, penalty: Any, floor: Any) -> Head:
    features, scale, shift = _standardised(features, weights, floor)
    mean = jnp.matmul(weights / jnp.sum(weights), logits, precision=_HIGHEST)
    weighted = features.T * weights[None]
    products = jnp.matmul(weighted, features, precision=_HIGHEST) + penalty * jnp.eye(
        features.shape[1], dtype=jnp.float32
    )
    crossed = jnp.matmul(weighted, logits - mean[None], precision=_HIGHEST)
    return _folded(jax.scipy.linalg.solve(products, crossed, assume_a="pos"), mean, scale, shift)


@functools.partial(jax.jit, static_argnames="classes")
def _logistic(
    features: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    penalty: Any,
    floor: Any,
    tolerance: Any,
    classes: int,
    max_steps: Any,
) -> tuple[Head, jax.Array]:
    """Returns the head and the largest entry of its gradient."""
    features, scale, shift = _standardised(features, weights, floor)
    total = jnp.sum(weights)

    def loss(head: Head) -> jax.Array:
        return (
            jnp.sum(weights * cross_entropy(head(features), labels)) + penalty / 2 * jnp.sum(jnp.square(head.kernel))
        ) / total

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def slope(state: Any) -> jax.Array:
        return optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)

    def goes_on(carry: tuple[Head, Any]) -> jax.Array:
        count = optax.tree.get(carry[1], "count")
        return (count == 0) | ((count < max_steps) & (slope(carry[1]) > tolerance))

    def advance(carry: tuple[Head, Any]) -> tuple[Head, Any]:
        head, state = carry
        value, grad = value_and_grad(head, state=state)
        updates, state = optimizer.update(grad, state, head, value=value, grad=grad, value_fn=loss)
        return jax.tree.map(jnp.add, head, updates), state

    head = Head(jnp.zeros((features.shape[1], classes), jnp.float32), jnp.zeros(classes, jnp.float32))
    head, state = lax.while_loop(goes_on, advance, (head, optimizer.init(head)))
    return _folded(*head, scale, shift), slope(state)
