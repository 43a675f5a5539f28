"""An experiment that compiles in a second: a linear classifier of digits gives to another, or to itself."""

from dataclasses import dataclass

import jax
from flax import linen as nn

import merge_jax as mj
from merge_jax.study.cli import main
from merge_jax.study.config import make_schedule
from merge_jax.study.images import load_images, make_role
from merge_jax.study.methods import TransferConfig, parse_routes
from merge_jax.study.optimizers import sgd
from merge_jax.study.scenario import Method, Scenario, choose


class Linear(nn.Module):
    """With what a state holds beside parameters: statistics of BatchNorm, and dropout's key."""

    dropout: float
    deep: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        norm = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name, name="norm")
        x = nn.Dropout(self.dropout, deterministic=not train)(norm(x.reshape(len(x), -1)))
        if self.deep:
            x = x + nn.Dense(64, name="hidden")(x)
        return nn.Dense(10, name="fc")(x)


@dataclass(frozen=True, kw_only=True)
class Config(TransferConfig):
    """Options of the experiment."""

    methods: tuple[str, ...] = ("vanilla", "share")
    """Methods to compare."""
    labels: int | None = 100
    """Labelled images that the target learns from."""
    routes: tuple[str, ...] = ("fc/kernel=fc/kernel",)
    """Layers that take part."""
    dropout: float = 0.0
    """Of the pixels."""
    deep: bool = False
    """Whether the classifier has another layer."""
    inside: bool = False
    """Whether the target is its own source."""


PRESETS = {
    "default": Config(seeds=1, steps=4, source_steps=4, report_every=2, checkpoint_every=4, cycle=1, stop=1.0),
}


def build(config: Config) -> Scenario:
    data, model = load_images("digits", None, None, 200), Linear(config.dropout, config.deep, config.axis_name)
    schedule = make_schedule(config, 1197, config.labels or 1197)

    def task(loss=None):
        return mj.Task(mj.classification_loss(model.apply, loss), sgd(0.1, config.steps, "cosine"))

    def kd(logits, batch):
        return mj.distillation_loss(logits, batch["teacher_logits"], batch["label"])

    def giving(make):
        transfer = make(parse_routes(config.routes))
        return Method(task(), mj.self_transfer(transfer) if config.inside else transfer, config.stop)

    methods = {
        "vanilla": lambda: Method(task()),
        "kd": lambda: Method(task(kd), teacher=mj.logits_teacher(model.apply)),
        "share": lambda: giving(mj.share_transfer),
        "operators": lambda: giving(mj.linear_operator_transfer),
    }
    return Scenario(
        name="tiny",
        source=None if config.inside else make_role("linear", model, data),
        target=make_role("linear", model, data, labels=config.labels),
        source_task=None if config.inside else task(),
        methods=choose(methods, config.methods),
        schedule=schedule,
        adapter_optimizer=config.adapter_optimizer(schedule),
        axis_name=config.axis_name,
    )


if __name__ == "__main__":
    main(PRESETS, "tests.tiny", __doc__, build)
