"""What the models of the experiments are trained with."""

import optax

from merge_jax.study.choices import LearningRateSchedule

__all__ = ["adamw", "sgd"]


def sgd(
    learning_rate: float, steps: int, schedule: LearningRateSchedule, momentum: float = 0.9
) -> optax.GradientTransformation:
    """Returns the models' published optimizer: SGD with momentum, and weight decay 5e-4 on all parameters."""
    if schedule == "steps":
        rate = optax.piecewise_constant_schedule(
            learning_rate, {round(fraction * steps): 0.2 for fraction in (0.3, 0.6, 0.8)}
        )
    else:
        rate = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=momentum))


def adamw(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Returns AdamW as BERT is fine-tuned: a tenth of the run to warm up, then evenly to 0; gradients clipped at 1."""
    warmup = max(1, round(0.1 * steps))
    rising = optax.linear_schedule(0.0, learning_rate, warmup)
    falling = optax.linear_schedule(learning_rate, 0.0, max(1, steps - warmup))
    rate = optax.join_schedules([rising, falling], [warmup])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))
