"""Across structures: a ResNet gives to a MobileNetV2, on handwritten digits.

    python -m experiments.cross_structure          # one and a half to two minutes on two cores
    python -m experiments.cross_structure smoke    # seconds; shows that it works, not what it gains
    python -m experiments.cross_structure --help

The source learns from all 1197 digits there are to learn from, the target from 100 of them. Nothing is shared but
numbers: five layers of the target, from its first block to its last layer, each receive from a layer of the source,
mostly of another shape. Methods: vanilla (no transfer), share (the overlapping block of the source's layer is copied
every few steps, at first), kd (distillation of the source's outputs), mergenet (share's start, changed by a learned
adapter). The expected numbers stand in the project's README.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

import merge_jax as mj
from experiments.cli import main
from experiments.config import RunConfig
from experiments.scenario import Method, Role, Scenario, choose
from merge_jax.checks import check_choice
from merge_jax.data import Splits, class_balanced, load_digits
from merge_jax.tasks import ClassificationLoss
from merge_jax.transfer import OutputForm

MethodName = Literal["vanilla", "share", "kd", "mergenet"]

ROUTES = {
    "stage1_0/expand/kernel": "stage1_0/conv1/kernel",
    "stage2_0/expand/kernel": "stage2_0/conv1/kernel",
    "stage3_0/expand/kernel": "stage3_0/conv1/kernel",
    "head/kernel": "stage3_0/conv2/kernel",
    "fc/kernel": "fc/kernel",
}


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Options of the experiment."""

    methods: tuple[MethodName, ...] = get_args(MethodName)
    """Methods to compare."""
    adapter_learning_rate: float = 1e-2
    """Learning rate of the adapter's AdamW."""
    stages: int = 3
    """Stages of both models, 1 to 3: fewer compile faster, and lack the routes of the others."""
    labels: int = 100
    """Labelled digits that the target learns from; the source has all 1197."""
    learning_rate: float = 0.1
    """Learning rate of both models' SGD (momentum 0.9, weight decay 5e-4), falling to 0 along a cosine."""
    routes: tuple[str, ...] = tuple(ROUTES)
    """Layers of the target that take part, each from the source's layer that ROUTES names."""
    stop: float = 0.1
    """Fraction of the run after which share and mergenet leave the target to itself."""
    num_layers: int = 1
    """Layers of each route's LPKA."""
    num_heads: int = 8
    """Heads of each attention."""
    attention_dropout: float = 0.1
    """Dropout on the attention weights of each LPKA."""
    feed_forward_dropout: float = 0.2
    """Dropout on the feed-forward block of each LPKA."""
    output: OutputForm = "warm"
    """How the adapter's output becomes the target's: see lpka_transfer."""
    temperature: float = 4.0
    """Temperature of the distillation in kd."""
    distillation_weight: float = 0.9
    """Weight of the distillation in kd; the labels have the rest."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        super().check()
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 1 <= self.stages <= 3:
            raise ValueError(f"stages must lie in [1, 3], got {self.stages}")
        for route in self.routes:
            check_choice("route", route, ROUTES)


PRESETS = {
    "default": Config(),
    # One stage, one route, no dropout, a transfer at every step: what compiles fastest.
    "smoke": Config(
        seeds=1,
        stages=1,
        source_steps=200,
        steps=100,
        routes=("fc/kernel",),
        cycle=1,
        stop=1.0,
        attention_dropout=0.0,
        feed_forward_dropout=0.0,
        report_every=25,
        checkpoint_every=100,
    ),
}


def build(config: Config) -> Scenario:
    """Returns the scenario: both models, their data and the methods.

    Raises:
      ValueError: an unknown method, or an option that a method refuses.
    """
    source = mj.models.small_resnet(num_stages=config.stages)
    target = mj.models.small_mobilenet_v2(num_stages=config.stages)
    source_steps = config.source_steps if config.source == "pretrained" else config.steps

    def target_task(loss: ClassificationLoss | None = None) -> mj.Task:
        loss_fn = mj.classification_loss(target.apply, loss)
        return mj.Task(loss_fn, _sgd(config.learning_rate, config.steps))

    def distil(logits: jax.Array, batch: mj.Batch) -> jax.Array:
        return mj.distillation_loss(
            logits,
            batch["teacher_logits"],
            batch["label"],
            temperature=config.temperature,
            weight=config.distillation_weight,
        )

    routes = [(path, ROUTES[path]) for path in config.routes]
    lpka = mj.lpka_transfer(
        routes,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        output=config.output,
        attention_dropout=config.attention_dropout,
        feed_forward_dropout=config.feed_forward_dropout,
    )
    methods = {
        "vanilla": Method(target_task()),
        "share": Method(target_task(), mj.share_transfer(routes), config.stop),
        "kd": Method(target_task(distil), teacher=mj.logits_teacher(source.apply)),
        "mergenet": Method(target_task(), lpka, config.stop),
    }
    return Scenario(
        name="cross_structure",
        source=_role("small ResNet", source, load_digits),
        target=_role("small MobileNetV2", target, partial(_few_labels, config.labels)),
        source_task=mj.Task(mj.classification_loss(source.apply), _sgd(config.learning_rate, source_steps)),
        methods=choose(methods, config.methods),
    )


def _role(name: str, model: mj.models.ResNet | mj.models.MobileNetV2, splits: Callable[[int], Splits]) -> Role:
    @jax.jit
    def init(key: jax.Array):
        variables = model.init(key, jnp.zeros((1, 8, 8, 1)))
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    splits = lru_cache(maxsize=1)(splits)  # One seed runs after the other.
    # Validation and test are 200 and 400 images: batches of 200 compile once for both.
    return Role(name, init, splits, mj.evaluate_classifier(model.apply, batch_size=200))


def _few_labels(labels: int, seed: int) -> Splits:
    splits = load_digits(seed)
    return replace(splits, train=class_balanced(splits.train, labels, seed))


def _sgd(learning_rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9))


if __name__ == "__main__":
    main(PRESETS, "experiments.cross_structure", __doc__, build)
