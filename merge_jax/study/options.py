"""Options of scenarios, side by side: a scenario's `Config` names those it has, and `RunConfig`.

None of this imports JAX, so that `--help` and invalid options are fast.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from merge_jax.checks import check_above_zero, check_at_least_one, check_below_one, check_zero_or_more
from merge_jax.study.choices import ImageModelName, ImageTaskName, TextModelName, TextTaskName, VisionModelName

__all__ = [
    "BY_DEPTH",
    "TASKS",
    "Architecture",
    "ImageTextOptions",
    "ModelName",
    "TaskName",
    "TaskOptions",
    "TransferOptions",
    "parse_pairs",
]

TaskName = TextTaskName | ImageTaskName
ModelName = TextModelName | ImageModelName | VisionModelName
TASKS: tuple[str, ...] = (*get_args(TextTaskName), *get_args(ImageTaskName))
BY_DEPTH = "by depth"
"""A placeholder for routes: attention blocks are paired by depth."""


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """Options of the transfer, and of the target's other objectives from the source."""

    methods: tuple[str, ...] = ("vanilla", "share", "mergenet_warm")
    """Methods to compare: a transfer, an objective, or both, as in share_agree; see experiments/README.md."""
    routes: tuple[str, ...] = ("**=**",)
    """Routes, as target=source; merge_jax.Route explains patterns. By default, all leaves with equal names."""
    stop: float = 0.1
    """Fraction of the run after which share and mergenet stop, and the target learns alone."""
    adapter_routes: tuple[str, ...] = ()
    """Routes of mergenet's adapters, as target=source; by default, all of --routes."""
    num_layers: int = 1
    """Number of layers of each route's LPKA."""
    num_heads: int = 8
    """Heads of each attention in the LPKA."""
    capped: bool = True
    """Cap the widths of the LPKA, as lpka_transfer does; --no-capped uses the published widths."""
    attention_dropout: float = 0.1
    """Dropout on the attention weights of each LPKA."""
    feed_forward_dropout: float = 0.2
    """Dropout on the feed-forward block of each LPKA."""
    adapter_learning_rate: float = 1e-2
    """Learning rate of the adapter's AdamW."""
    adapter_schedule: Literal["constant", "cosine"] = "constant"
    """Schedule of the adapter's learning rate. Cosine is constant for 2 percent of the run, then falls to 0, as
    published."""
    agree: tuple[str, ...] = ()
    """Layers whose features should agree, as target=source, for methods with agree in their names; see
    merge_jax.feature_agreement."""
    agreement: float = 20.0
    """Weight of the feature disagreement in the target's loss."""
    unlabelled: int = 0
    """Number of unlabelled training inputs, in addition to the labelled ones. Methods that need no labels use both:
    aligned, refit and prepare, and the comparisons of agree, kd and kd_mixed."""
    head_first: bool = False
    """Before the first step, after any write, fit the target's last layer to its labelled examples by logistic
    regression. This applies to every method; transfers then leave out that layer."""
    head_penalty: float = 1.0
    """Penalty of the logistic regressions for fitted last layers, probes and baselines. Use more if features and
    classes are many and examples few."""
    head_floor: float = 0.0
    """Added to the variance of each feature, in units of their mean variance, before the last layer is fitted. 0.1
    prevents large weights of features that hardly vary, which make the steps after it unstable."""
    prepare_steps: int = 100
    """Steps of prepare, which pulls the target's features toward the source's before the first step."""
    prepare_rate: float = 1e-2
    """Initial learning rate of prepare."""
    target_rate: float = 1.0
    """Factor on the target's learning rate, for every method. To choose one for each method on validation, see
    `choose` in grids."""
    compare_on: Literal["mixed", "plain"] = "mixed"
    """Inputs on which features are compared: means of neighbouring images (for text, the batch itself), or the batch
    itself."""

    def check_options(self) -> None:
        """Raises ValueError for an option out of range."""
        check_at_least_one(num_layers=self.num_layers, num_heads=self.num_heads)
        check_below_one(attention_dropout=self.attention_dropout, feed_forward_dropout=self.feed_forward_dropout)
        rates = {name: getattr(self, name) for name in ("adapter_learning_rate", "head_penalty", "target_rate")}
        check_above_zero(**rates)
        check_zero_or_more(head_floor=self.head_floor)
        if not 0 <= self.stop <= 1:
            raise ValueError(f"stop must be a fraction in [0, 1], got {self.stop}")
        if self.unlabelled < 0:
            raise ValueError(f"unlabelled must be 0 or more, got {self.unlabelled}")
        if not 0 <= self.agreement < float("inf"):
            raise ValueError(f"agreement must be 0 or more, got {self.agreement}")
        self.agreeing_layers()

    def agreeing_layers(self) -> list[tuple[str, str]]:
        """Returns the pairs of target and source layers for feature agreement.

        Raises:
          ValueError: an argument that is not such a pair.
        """
        return parse_pairs(self.agree, "a pair of layers", "stage1_0=stage1_0")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of models that learn a task by its name."""

    labels: int | None = 200
    """Labelled training examples of the target, or None for all; a source has all."""
    validation: int = 300
    """Training examples held out for validation; digits always hold out 200."""
    data_dir: Path | None = None
    """Folder of TFDS; archives in its downloads/manual/ replace a download."""
    max_length: int = 40
    """Maximum number of tokens of a text, or of a question and its passage."""
    too_long: Literal["truncate", "error"] = "truncate"
    """What to do with longer texts: cut and count them, or raise an error."""
    vocabulary: Path | None = None
    """A BERT vocab.txt or a tokenizer.json. By default that of the run in --source-from, or one learned from all
    training texts. A run saves its vocabulary as vocabulary.json."""
    vocabulary_size: int = 1000
    """Number of tokens of a learned vocabulary."""
    image_size: int | None = None
    """Height and width to which images are scaled; None keeps their size."""
    stages: int = 3
    """Stages of small image networks, 1 to 3."""
    learning_rate: float = 1e-3
    """Learning rate of both models: AdamW for text, SGD for images."""

    def check_options(self) -> None:
        """Raises ValueError for an option out of range."""
        check_above_zero(learning_rate=self.learning_rate)
        if not 1 <= self.stages <= 3:
            raise ValueError(f"stages must lie in [1, 3], got {self.stages}")


@dataclass(frozen=True, kw_only=True)
class ImageTextOptions:
    """Options of models that learn a task of images with text."""

    num_shapes: int = 2
    """Shapes on each image of synthetic questions, 2 to 6; with 6, as published, small models take long to learn."""
    num_answers: int = 3129
    """Number of the most common training answers that a model chooses from."""
    uncovered: Literal["error", "skip"] = "error"
    """What to do with training questions that have none of these answers."""
    unreadable: Literal["error", "skip"] = "error"
    """What to do with missing or unreadable images: raise an error, or skip, name and count them."""

    def check_options(self) -> None:
        """Raises ValueError for an option out of range."""
        check_at_least_one(num_answers=self.num_answers)


@dataclass(frozen=True)
class Architecture:
    """A model's encoders and what joins them."""

    vision: VisionModelName = "tiny_vit"
    """The image encoder."""
    text: TextModelName = "small_distilbert"
    """The text encoder."""
    layers: int | None = None
    """Layers of a small encoder; by default its usual number."""
    width: int | None = None
    """Width of a small encoder; by default its usual width."""
    patch_size: int | None = None
    """Height and width of a small vision encoder's patches; a quarter of the image by default."""
    fusion_layers: int = 2
    """Cross-attention layers from words to the image, for vqa."""
    dropout: float = 0.0
    """Dropout in both encoders and in those layers."""
    embedding_size: int = 32
    """Size of the embeddings of images and captions, for retrieval."""

    @property
    def vision_attributes(self) -> dict[str, Any]:
        """Attributes of the vision encoder that differ from its defaults."""
        patch_size = {} if self.patch_size is None else {"patch_size": self.patch_size}
        return {**self.text_attributes, **patch_size}

    @property
    def text_attributes(self) -> dict[str, Any]:
        """Attributes of the text encoder that differ from its defaults."""
        sizes = {"num_layers": self.layers, "width": self.width}
        return {name: size for name, size in sizes.items() if size is not None}


def parse_pairs(words: Iterable[str], noun: str, example: str) -> list[tuple[str, str]]:
    """Returns the two sides of each argument.

    Raises:
      ValueError: an argument that is not `target=source`.
    """
    pairs = []
    for word in words:
        target, equals, source = word.partition("=")
        if not (target and equals and source):
            raise ValueError(f"{noun} must be target=source, such as {example}, got {word!r}")
        pairs.append((target, source))
    return pairs
