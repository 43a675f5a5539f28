"""Across modalities: transfer from the attention of a vision model to that of a text model, or the reverse.

    python -m experiments.cross_modal [PRESET] [OPTIONS]

    default                   questions on rendered scenes: vision to text
    smoke                     a minute; checks that all works, measures no gain
    text_to_vision            the same questions: text to vision
    within                    within one model: its vision to its text
    retrieval                 scenes and captions, each found by the other
    retrieval_text_to_vision  the same, text to vision
    paper                     VQA v2.0 with BERT and ViT, for a GPU
    paper_retrieval           MSCOCO with BERT and ViT, for a GPU

The target answers questions about images (vqa), or retrieves captions for images and images for captions (retrieval).
It may also be a model of one modality. The source is a model of images, of text or of both, or the target itself.
Routes lead from attention blocks of one modality to those of the other, matched by depth. The two share no input, label
or width.

Methods: vanilla (no transfer), share (copies the overlap of the source's layer every few steps), and mergenet_warm. All
methods, with results: experiments/README.md.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from merge_jax import study

Direction = Literal["vision_to_text", "text_to_vision"]
SourceTaskName = Literal["itself"] | study.ImageTextTaskName | study.TaskName


@dataclass(frozen=True, kw_only=True)
class Config(study.ImageTextOptions, study.TaskOptions, study.TransferOptions, study.RunConfig):
    """Options of the experiment."""

    target_task: study.ImageTextTaskName | study.TaskName = "vqa"
    """What the target learns."""
    source_task: SourceTaskName = "shapes"
    """What the source learns; with "itself", the target is its own source."""
    direction: Direction = "vision_to_text"
    """The direction of transfer between the attention blocks."""
    target_model: study.Architecture = field(default_factory=study.Architecture)
    """The target network; a task of one modality uses only its encoder."""
    source_model: study.Architecture = field(default_factory=lambda: study.Architecture("small_vit", "small_bert"))
    """The source network."""
    target_data: str = "synthetic"
    """Data of the target. For vqa: synthetic (Sort-of-CLEVR), clevr from TFDS, or a folder of VQA v2.0. For
    retrieval: synthetic (rendered scenes), a folder of MSCOCO, or a TFDS data set such as cifar100, with its classes
    as captions. For text: as in cross_task."""
    source_data: str = "synthetic"
    """Data of the source, as --target-data."""
    target_text_weights: Path | None = None
    """Hugging Face safetensors file or folder with the initial weights of the target's text encoder; needs
    --vocabulary."""
    source_text_weights: Path | None = None
    """The same for the source."""
    target_vision_weights: Path | None = None
    """Hugging Face safetensors file or folder with the initial weights of the vision transformer in a target of
    images with text. A preprocessor_config.json next to it sets the scale of the pixels."""
    source_vision_weights: Path | None = None
    """The same for the source."""
    labels: int | None = None
    """Training images (with all their questions or captions) or texts of the target, or None for all; a source has
    all."""
    validation: int = 100
    """Training images or texts of the target held out for validation; digits always hold out 200."""
    source_validation: int = 100
    """The same for the source."""
    image_size: int | None = 32
    """Height and width to which images are scaled; None keeps their size, if the data set of images alone allows it."""
    routes: tuple[str, ...] = (study.BY_DEPTH,)
    """Routes, as target=source, such as text_encoder/layer_0/attention=encoder/layer_1/attention. "by depth" pairs
    all attention blocks in the given direction."""

    def check_options(self) -> None:
        """Raises ValueError for an option out of range."""
        if self.source_task == "itself" and self.source != "pretrained":
            raise ValueError(f"a target that is its own source has none that is {self.source}: leave out --source")
        if self.source_task == "itself" and (self.source_text_weights or self.source_vision_weights):
            raise ValueError("a target that is its own source starts from its own weights: use --target-text-weights")


_VISION_AGREES = ("image_encoder/layer_0=encoder/layer_1", "image_encoder/layer_1=encoder/layer_3")
_TEXT_AGREES = ("text_encoder/layer_0=encoder/layer_1", "text_encoder/layer_1=encoder/layer_3")
# A rate that works for small transformers from scratch, and steps for five seeds in three minutes on two cores.
_SMALL = Config(
    agree=_VISION_AGREES,
    steps=400,
    source_steps=300,
    report_every=40,
    checkpoint_every=200,
    learning_rate=2e-3,
    max_length=16,
)
# With few images: with all 3,900, the target needs no help.
_RETRIEVAL = replace(_SMALL, target_task="retrieval", labels=500, max_length=24)
_PAPER = Config(
    seeds=3,
    source_task="itself",
    target_model=study.Architecture("vit_base", "bert_base", fusion_layers=6, embedding_size=256, dropout=0.1),
    target_data="./vqa",
    validation=2000,
    image_size=224,
    max_length=32,
    uncovered="skip",
    epochs=10,
    report_every=1,
    checkpoint_every=1,
    batch_size=64,
    learning_rate=5e-5,
    adapter_learning_rate=1e-3,
    num_layers=2,
)

PRESETS = {
    "default": _SMALL,
    "smoke": replace(
        _RETRIEVAL,
        seeds=1,
        target_model=study.Architecture(layers=1),
        source_model=study.Architecture("small_vit", "small_bert", layers=1),
        image_size=16,
        agree=("image_encoder/layer_0=encoder/layer_0",),
        source_steps=60,
        steps=60,
        report_every=20,
        checkpoint_every=60,
        cycle=1,
        attention_dropout=0.0,
        feed_forward_dropout=0.0,
    ),
    "text_to_vision": replace(
        _SMALL, source_task="sentiment", direction="text_to_vision", agree=_TEXT_AGREES, max_length=24
    ),
    "within": replace(_SMALL, source_task="itself", agree=()),
    "retrieval": _RETRIEVAL,
    "retrieval_text_to_vision": replace(
        _RETRIEVAL, source_task="sentiment", direction="text_to_vision", agree=_TEXT_AGREES
    ),
    "paper": _PAPER,
    "paper_retrieval": replace(_PAPER, target_task="retrieval", target_data="./coco"),
}


def build(config: Config) -> "study.Scenario":
    """Returns the scenario: the models, their data and the methods.

    Raises:
      ValueError: unavailable data, an unknown model or method, a model that lacks the transferred modality, or an
        option that a method refuses.
    """
    specs = []
    if config.source_task != "itself":
        specs.append(
            study.TaskSpec(
                config.source_task,
                config.source_model,
                study.TextData(config.source_data),
                config.source_text_weights,
                config.source_vision_weights,
                validation=config.source_validation,
            )
        )
    specs.append(
        study.TaskSpec(
            config.target_task,
            config.target_model,
            study.TextData(config.target_data),
            config.target_text_weights,
            config.target_vision_weights,
            labels=config.labels,
        )
    )
    (*sources, target), attach = study.make_models(config, specs)
    source = sources[0] if sources else None
    routes = None
    if config.routes == (study.BY_DEPTH,):
        giving, _, receiving = config.direction.partition("_to_")
        routes = study.routes_by_depth(source or target, target, giving, receiving)
    return study.make_scenario("cross_modal", config, source, target, routes, attach=attach)


if __name__ == "__main__":
    study.main(PRESETS, __spec__.name, __doc__, build, measured={"default": "3 to 4 minutes on two CPU cores"})
