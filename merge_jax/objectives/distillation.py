"""Pure losses, per example."""

import math

import jax
import jax.numpy as jnp
import optax

from merge_jax.objectives.precision import at_least_float32

__all__ = ["check_labels", "cross_entropy", "distillation_loss", "dkd_loss", "nkd_loss", "rkd_loss", "tf_kd_loss"]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns `-log softmax(z)[y]` in nats, `[...]`, for logits `z [..., C]` and integer labels `y [...]` in [0, C).

    Like all losses here, it is computed in float32 if the logits are in bfloat16 or float16. For a label outside
    [0, C), such as Hugging Face's -100, it is NaN, and a joint step is skipped.

    Raises:
      ValueError: the shape of the labels is not that of the logits without the last axis.
    """
    check_labels(logits, labels)
    losses = optax.softmax_cross_entropy_with_integer_labels(at_least_float32(logits), labels)
    return jnp.where(labels < 0, jnp.nan, losses)  # Optax counts negative labels from the end.


def distillation_loss(
    logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
) -> jax.Array:
    """Returns the loss of knowledge distillation, in nats, `[...]`.

    `(1 - w) CE(z, y) + w t^2 KL(softmax(z_T / t) || softmax(z / t))`, with student logits `z [..., C]`, teacher
    logits `z_T [..., C]`, labels `y [...]`. The factor `t^2` makes the gradient's size independent of the temperature;
    the teacher gets no gradient. Source: Hinton et al., arXiv:1503.02531; 4 and 0.9 are usual in later work.

    Raises:
      ValueError: a temperature not above 0, a weight outside [0, 1], logits of different shapes or fewer than two
        classes, or labels that do not fit them.
    """
    _check_temperature(temperature)
    _check_fraction(weight)
    _check_logits(logits, teacher_logits, labels)
    log_student = jax.nn.log_softmax(at_least_float32(logits) / temperature)
    log_teacher = jax.nn.log_softmax(at_least_float32(jax.lax.stop_gradient(teacher_logits)) / temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
    of_labels = (1 - weight) * cross_entropy(logits, labels) if weight < 1 else 0  # Then no example needs a label.
    return of_labels + weight * temperature**2 * divergence


def dkd_loss(
    logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
    temperature: float = 4.0,
) -> jax.Array:
    """Returns the loss of decoupled knowledge distillation (DKD), in nats, `[...]`.

    `alpha t^2 KL(b_T || b_S) + beta t^2 KL(q_T || q_S)`, with student logits `z [..., C]`, teacher logits
    `z_T [..., C]` and labels `y [...]` in [0, C). `b` is the softmax of `z / t`, reduced to the probabilities of the
    label and of all other classes together. `q` is the softmax over the other classes only. `alpha` is `target_weight`,
    `beta` `nontarget_weight`. The label's cross entropy is not included, and the teacher gets no gradient. With two
    classes `q` is constant and its term is 0.

    Source: Zhao et al., arXiv:2203.08679, section 3.3, with the defaults of its code (megvii-research/mdistiller).
    That code takes logarithms of probabilities and subtracts 1000 from the label's logit, which fails for large
    logits. Here, everything is computed in log space, and the label is left out. The code averages over the batch and
    ramps the loss up from 0 over the first 20 epochs; both are left to the caller.

    Raises:
      ValueError: a temperature not above 0, a weight that is negative or not finite, logits of different shapes or
        fewer than two classes, or labels that do not fit them.
    """
    _check_temperature(temperature)
    _check_weights(target_weight=target_weight, nontarget_weight=nontarget_weight)
    _check_logits(logits, teacher_logits, labels)
    student = at_least_float32(logits) / temperature
    teacher = at_least_float32(jax.lax.stop_gradient(teacher_logits)) / temperature
    kl = optax.losses.kl_divergence_with_log_targets
    target = kl(_log_label_or_rest(student, labels), _log_label_or_rest(teacher, labels))
    nontarget = kl(_log_softmax_of_rest(student, labels), _log_softmax_of_rest(teacher, labels))
    return temperature**2 * (target_weight * target + nontarget_weight * nontarget)


def nkd_loss(
    logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    weight: float = 1.5,
    temperature: float = 1.0,
) -> jax.Array:
    """Returns the loss of normalised knowledge distillation (NKD), in nats, `[...]`.

    `-p_T[y] log p_S[y] - w t^2 sum_{i != y} q_T[i] log q_S[i]`, with student logits `z [..., C]`, teacher logits
    `z_T [..., C]` and labels `y [...]` in [0, C). `p` is the softmax of `z`, without the temperature, and `q` that of
    `z / t` over all classes but the label. Both terms are cross entropies, so the loss of a perfect student is not 0.
    The label's cross entropy is not included, and the teacher gets no gradient.

    Source: Yang et al., arXiv:2303.13005 (`w` is its gamma, `t` its lambda), with the defaults of its code
    (yzd-v/cls_KD), which averages over the batch. Between July and October 2023, a bug in that code included the label
    in `q`; here, as in the paper, it is excluded.

    Raises:
      ValueError: a temperature not above 0, a weight that is negative or not finite, logits of different shapes or
        fewer than two classes, or labels that do not fit them.
    """
    _check_temperature(temperature)
    _check_weights(weight=weight)
    _check_logits(logits, teacher_logits, labels)
    logits, teacher_logits = at_least_float32(logits), at_least_float32(jax.lax.stop_gradient(teacher_logits))
    target = jnp.exp(-cross_entropy(teacher_logits, labels)) * cross_entropy(logits, labels)
    log_student = _log_softmax_of_rest(logits / temperature, labels)
    log_teacher = _log_softmax_of_rest(teacher_logits / temperature, labels)
    nontarget = -(jnp.exp(log_teacher) * log_student).sum(axis=-1)
    return target + weight * temperature**2 * nontarget


def rkd_loss(
    features: jax.Array,
    teacher_features: jax.Array,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> jax.Array:
    """Returns the loss of relational knowledge distillation (RKD) on a batch, a dimensionless scalar.

    `v mean_ij H(d_S[i, j] - d_T[i, j]) + w mean_ijk H(a_S[i, j, k] - a_T[i, j, k])`, with student features
    `x [B, D]` and teacher features `[B, E]`. `d[i, j] = |x_i - x_j| / m`, with `m` the mean of all distances that
    are not 0; `a[i, j, k]` is the cosine of the angle at `x_i` between `x_j` and `x_k`; `H` is the Huber loss with
    delta 1. It needs memory for about `B^2 (B + D + E)` numbers. The teacher gets no gradient.

    Source: Park et al., arXiv:1904.05068, equations 5 to 10. Means are over the whole arrays with diagonals, as in its
    code (lenscloth/RKD); the paper sums over distinct examples. The default weights are those of that code for
    classification, which also scales features to length 1; that is left to the caller. Two examples with equal features
    have distance 0, angles of cosine 0 and no gradient (our choice): the code sets their distance to 1e-6, counts it in
    the mean and divides their gradient by 1e-12.

    Raises:
      ValueError: a weight that is negative or not finite, features that are not matrices or have different batch sizes,
        or fewer than two examples.
    """
    _check_weights(distance_weight=distance_weight, angle_weight=angle_weight)
    shape, teacher_shape = jnp.shape(features), jnp.shape(teacher_features)
    if len(shape) != 2 or len(teacher_shape) != 2 or shape[0] != teacher_shape[0]:
        raise ValueError(
            f"features and teacher_features must have shapes [B, D] and [B, E], got {shape} and {teacher_shape}"
        )
    if shape[0] < 2:
        raise ValueError(f"relations need at least 2 examples, got features of shape {shape}")
    distances, angles = _relations(features)
    teacher_distances, teacher_angles = _relations(jax.lax.stop_gradient(teacher_features))
    distance = optax.losses.huber_loss(distances, teacher_distances).mean()
    angle = optax.losses.huber_loss(angles, teacher_angles).mean()
    return distance_weight * distance + angle_weight * angle


def tf_kd_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float = 20.0,
    correct: float = 0.99,
    weight: float = 0.1,
    student_temperature: float = 1.0,
) -> jax.Array:
    """Returns the loss of teacher-free knowledge distillation by a designed teacher (Tf-KD reg), in nats, `[...]`.

    `(1 - w) CE(z, y) + w KL(softmax(u / t) || softmax(z / s))`, with logits `z [..., C]` and labels `y [...]` in
    [0, C). The teacher is not a network: `u` is `correct` at the label and `(1 - correct) / (C - 1)` elsewhere, and the
    softmax treats these probabilities as logits. `t` is `temperature`, `s` `student_temperature`; there is no factor
    `t^2`.

    Source: Yuan et al., arXiv:1909.11723, equation 9, and its code (yuanli2333/Teacher-free-Knowledge-Distillation)
    where they differ. The paper has `s = t`; the code for CIFAR-100 has `s = 1`, which its author (issue 3) found to
    work better there. The code divides the divergence by C and multiplies it by a factor for each model. The defaults
    here are those of its ResNet-18 on CIFAR-100, whose factor, 100, cancels C. The code's average over the batch is
    left to the caller.

    Raises:
      ValueError: a temperature not above 0, a weight outside [0, 1], `correct` outside [1 / C, 1], logits of fewer than
        two classes, or labels that do not fit them.
    """
    _check_temperature(temperature)
    _check_temperature(student_temperature, name="student_temperature")
    _check_fraction(weight)
    _check_logits(logits, logits, labels)
    classes = logits.shape[-1]
    if not 1 / classes <= correct <= 1:
        raise ValueError(f"correct must lie in [1/{classes}, 1] for {classes} classes, got {correct}")
    logits = at_least_float32(logits)
    teacher = _without_label(jnp.full_like(logits, (1 - correct) / (classes - 1)), labels, correct)
    log_teacher = jax.nn.log_softmax(teacher / temperature)
    log_student = jax.nn.log_softmax(logits / student_temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
    return (1 - weight) * cross_entropy(logits, labels) + weight * divergence


def _relations(features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns relative distances `[B, B]` and cosines of angles `[B, B, B]` of features `[B, D]`.

    The inner `where` keeps 0 out of the square root and the quotient, whose gradients would be NaN. The outer one sets
    the value, and gradient 0, for pairs with equal features.
    """
    features = at_least_float32(features)
    differences = features[None, :, :] - features[:, None, :]
    squares = (differences**2).sum(axis=-1)
    apart = squares > 0
    lengths = jnp.sqrt(jnp.where(apart, squares, 1))
    distances = jnp.where(apart, lengths, 0)
    mean = distances.sum() / jnp.maximum(apart.sum(), 1)
    directions = jnp.where(apart[..., None], differences / lengths[..., None], 0)
    return distances / jnp.where(mean > 0, mean, 1), jnp.einsum("ijd,ikd->ijk", directions, directions)


def _log_label_or_rest(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the log probabilities of the label and of all other classes together, `[..., 2]`.

    Both are computed from their log odds: rounding of `p` would lose small values of `1 - p`.
    """
    label = -cross_entropy(logits, labels)
    rest = jax.nn.logsumexp(_without_label(jax.nn.log_softmax(logits), labels, -jnp.inf), axis=-1)
    return jnp.stack([jax.nn.log_sigmoid(label - rest), jax.nn.log_sigmoid(rest - label)], axis=-1)


def _log_softmax_of_rest(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the log softmax over all classes but the label, `[..., C]`, with 0 (not `-inf`) at the label.

    So differences of two, and products with one, are 0 at the label, in value and in gradient.
    """
    return _without_label(jax.nn.log_softmax(_without_label(logits, labels, -jnp.inf)), labels, 0)


def _without_label(array: jax.Array, labels: jax.Array, value: float) -> jax.Array:
    """Returns the array `[..., C]` with the entry at the label `[...]` replaced by this value."""
    return jnp.where(jax.nn.one_hot(labels, array.shape[-1], dtype=bool), value, array)


def _check_temperature(temperature: float, *, name: str = "temperature") -> None:
    """Raises ValueError unless the temperature is above 0."""
    if not temperature > 0:
        raise ValueError(f"{name} must be above 0, got {temperature}")


def _check_fraction(weight: float) -> None:
    """Raises ValueError unless the weight is in [0, 1]."""
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight}")


def _check_weights(**weights: float) -> None:
    """Raises ValueError unless every weight is a finite number of at least 0."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {weight}")


def _check_logits(logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> None:
    """Raises ValueError unless both logits are `[..., C]` with at least two classes, and the labels `[...]`."""
    shape, teacher_shape = jnp.shape(logits), jnp.shape(teacher_logits)
    if shape != teacher_shape:
        raise ValueError(f"logits and teacher_logits must have one shape [..., C], got {shape} and {teacher_shape}")
    if not shape or shape[-1] < 2:
        raise ValueError(f"logits must have at least 2 classes on their last axis, got shape {shape}")
    check_labels(logits, labels)


def check_labels(logits: jax.Array, labels: jax.Array) -> None:
    """Raises ValueError unless logits are `[..., C]` and labels `[...]`."""
    shape, labels_shape = jnp.shape(logits), jnp.shape(labels)
    if not shape or labels_shape != shape[:-1]:
        raise ValueError(f"labels of logits {shape} must have shape {shape[:-1]}, got {labels_shape}")
