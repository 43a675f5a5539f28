"""Within one model: transfer from deep layers to shallow ones, or the reverse; the model is its own source.

    python -m experiments.self_transfer [PRESET] [OPTIONS]

    default   a small MobileNetV2 on handwritten digits
    smoke     a minute; checks that all works, measures no gain
    resnet    a small ResNet on the same
    text      a small BERT on synthetic reviews
    cifar100  MobileNetV2 at half width on CIFAR-100 at 16x16, for a CPU
    paper     MobileNetV2 on CIFAR-100, 200 epochs, for a GPU

There is no other model and no earlier training: parameters move between layers of one network while it learns.

Methods: vanilla (no transfer), share (copies the overlap of the source layer every few steps), tf_kd (distillation
without a teacher), and mergenet with two output forms, residual and warm. All methods, with results:
experiments/README.md.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from merge_jax import study

_MOBILENET = ("stage1_0/expand/kernel=stage3_0/expand/kernel", "stage2_0/expand/kernel=head/kernel")
_RESNET = ("stage1_0/conv2/kernel=stage3_0/conv2/kernel", "stage2_0/conv2/kernel=stage3_0/conv1/kernel")


@dataclass(frozen=True, kw_only=True)
class Config(study.TaskOptions, study.TransferOptions, study.RunConfig):
    """Options of the experiment."""

    methods: tuple[str, ...] = ("vanilla", "share", "tf_kd", "mergenet_residual", "mergenet_warm")
    """Methods to compare: a transfer, an objective, or both, as in share_agree; see experiments/README.md."""
    task: study.TaskName = "digits"
    """Task of the model."""
    model: study.ModelName = "small_mobilenet_v2"
    """The network."""
    labels: int | None = 100
    """Labelled training examples, or None for all."""
    data: str = "synthetic"
    """Text: synthetic; tfds for SQuAD v2 (qa), IMDb (sentiment) or AG News (topic); the name of another TFDS data
    set; or a .tsv, .csv or .jsonl file."""
    test_data: Path | None = None
    """Test file, if --data is a file; by default a fifth of that file."""
    text: tuple[str, ...] = ("text",)
    """Columns (or features) with the text, by name; by number from 0 in a file without a header."""
    label: str = "label"
    """Column with the label."""
    weights: Path | None = None
    """Hugging Face safetensors file or folder with the initial weights of a text model."""
    routes: tuple[str, ...] = _MOBILENET
    """Routes, as shallow=deep. "by depth" pairs a text model's attention blocks, the upper half with the lower."""
    direction: Literal["deep_to_shallow", "shallow_to_deep"] = "deep_to_shallow"
    """The direction of transfer along each route."""
    learning_rate: float = 0.1
    """Learning rate: AdamW for text, SGD for images."""
    # There is no source to choose, read or train.
    source: tyro.conf.Suppress[Literal["pretrained"]] = "pretrained"
    source_from: tyro.conf.Suppress[None] = None
    source_steps: tyro.conf.Suppress[int] = 400
    source_epochs: tyro.conf.Suppress[None] = None
    snapshots: tyro.conf.Suppress[int] = 8


_TEXT = Config(
    task="sentiment",
    model="small_bert",
    labels=None,
    batch_size=32,
    learning_rate=1e-3,
    steps=400,
    report_every=40,
    checkpoint_every=200,
    routes=(study.BY_DEPTH,),
)

PRESETS = {
    "default": Config(),
    "smoke": Config(
        seeds=1,
        steps=100,
        methods=("vanilla", "tf_kd", "mergenet_warm"),
        routes=_MOBILENET[:1],
        cycle=1,
        attention_dropout=0.0,
        feed_forward_dropout=0.0,
        report_every=25,
        checkpoint_every=100,
    ),
    "resnet": Config(model="small_resnet", routes=_RESNET),
    "text": _TEXT,
    "cifar100": Config(
        seeds=3,
        task="cifar100",
        model="mobilenet_v2_half",
        image_size=16,
        labels=5000,
        validation=1000,
        batch_size=128,
        epochs=10,
        report_every=1,
        checkpoint_every=5,
        routes=("stage2_0/expand/kernel=stage3_0/expand/kernel", "stage4_0/project/kernel=stage6_0/project/kernel"),
    ),
    "paper": Config(
        seeds=3,
        task="cifar100",
        model="mobilenet_v2",
        labels=None,
        validation=5000,
        batch_size=128,
        epochs=200,
        report_every=1,
        checkpoint_every=5,
        adapter_learning_rate=1e-3,
        num_layers=2,
        routes=("stage2_1/expand/kernel=stage6_2/expand/kernel", "stage4_0/project/kernel=stage6_2/project/kernel"),
    ),
}


def build(config: Config) -> "study.Scenario":
    """Returns the scenario: the model, its data and the methods.

    Raises:
      ValueError: unavailable data, an unknown model or method, or an option that a method refuses.
    """
    text = study.TextData(config.data, config.test_data, config.text, config.label)
    spec = study.TaskSpec(config.task, config.model, text, config.weights, labels=config.labels)
    (model,), attach = study.make_models(config, [spec])
    objectives = {} if config.task == "qa" else {"tf_kd": study.tf_kd_objective(model)}  # The others are classifiers.
    by_depth = config.routes == (study.BY_DEPTH,)
    routes = study.routes_to_lower_half(model) if by_depth else study.parse_routes(config.routes)
    if config.direction == "shallow_to_deep":
        routes = [replace(route, target=route.source, source=route.target) for route in routes]
    return study.make_scenario("self_transfer", config, None, model, routes, objectives=objectives, attach=attach)


if __name__ == "__main__":
    study.main(PRESETS, __spec__.name, __doc__, build, measured={"default": "56 s on two CPU cores"})
