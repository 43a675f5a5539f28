"""Losses, pure and per example."""

import jax
import optax

__all__ = ["cross_entropy", "distillation_loss"]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns `-log softmax(z)[y]` in nats, `[...]`, for logits `z [..., C]` and integer labels `y [...]` in [0, C)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


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
    logits `z_T [..., C]`, labels `y [...]`. The factor `t^2` keeps the gradient's size over temperatures; the
    teacher gets no gradient. Source: Hinton et al., arXiv:1503.02531; 4 and 0.9 are usual in its followers.

    Raises:
      ValueError: a temperature that is not above 0, or a weight outside [0, 1].
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight}")
    log_student = jax.nn.log_softmax(logits / temperature)
    log_teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
    return (1 - weight) * cross_entropy(logits, labels) + weight * temperature**2 * divergence
