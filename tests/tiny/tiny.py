"""An experiment that compiles in a second: a linear classifier of digits gives to another."""

from dataclasses import dataclass

import jax
from flax import linen as nn

import merge_jax as mj
from experiments.cli import main
from experiments.images import load_images, make_role
from experiments.optimizers import sgd
from experiments.scenario import Method, Scenario, choose
from experiments.transfers import TransferConfig, parse_routes


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return nn.Dense(10, name="fc")(x.reshape(len(x), -1))


@dataclass(frozen=True, kw_only=True)
class Config(TransferConfig):
    """Options of the experiment."""

    methods: tuple[str, ...] = ("vanilla", "share")
    """Methods to compare."""
    labels: int | None = 100
    """Labelled images that the target learns from."""
    routes: tuple[str, ...] = ("fc/kernel=fc/kernel",)
    """Layers that take part."""


PRESETS = {
    "default": Config(seeds=1, steps=4, source_steps=4, report_every=2, checkpoint_every=4, cycle=1, stop=1.0),
}


def build(config: Config) -> Scenario:
    data, model = load_images("digits", None, None, 200), Linear()
    schedule = config.schedule(1197, config.labels or 1197)
    task = mj.Task(mj.classification_loss(model.apply), sgd(0.1, config.steps, "cosine"))
    methods = {
        "vanilla": lambda: Method(task),
        "share": lambda: Method(task, mj.share_transfer(parse_routes(config.routes)), config.stop),
    }
    return Scenario(
        name="tiny",
        source=make_role("linear", model, data),
        target=make_role("linear", model, data, labels=config.labels),
        source_task=task,
        methods=choose(methods, config.methods),
        schedule=schedule,
        adapter_optimizer=config.adapter_optimizer(schedule),
    )


if __name__ == "__main__":
    main(PRESETS, "experiments.tiny", __doc__, build)
