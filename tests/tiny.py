"""An experiment that compiles in a second: a linear classifier of digits gives to another, or to itself."""

from dataclasses import dataclass
from functools import partial

import jax
from flax import linen as nn

import merge_jax as mj
from merge_jax import study


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
class Config(study.TransferOptions, study.RunConfig):
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


def copied(key, source, target, examples):
    """Starts a target of the same structure as the source is."""
    del key, examples
    return target.replace(params=source.params, model_state=source.model_state)


PRESETS = {
    "default": Config(seeds=1, steps=4, source_steps=4, report_every=2, checkpoint_every=4, cycle=1, stop=1.0),
}


def build(config: Config) -> study.Scenario:
    data, network = study.load_images("digits", None, None, 200), Linear(config.dropout, config.deep, config.axis_name)
    classifier = partial(study.image_classifier, "linear", network, data, optimizer=partial(study.sgd, 0.1))
    source, target = None if config.inside else classifier(), classifier(labels=config.labels)

    def kd(logits, batch):
        return mj.distillation_loss(logits, batch["teacher_logits"], batch["label"])

    return study.make_scenario(
        "tiny",
        config,
        source,
        target,
        objectives={"kd": study.Objective(mj.classification_loss(network.apply, kd), mj.logits_teacher(network.apply))},
        transfers={"operators": mj.linear_operator_transfer},
        starts={"copied": lambda source, target, routes: copied},
    )


if __name__ == "__main__":
    study.main(PRESETS, "tests.tiny", __doc__, build)
