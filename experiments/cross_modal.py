"""Across modalities: attention that has learned to see gives to attention that reads, or the reverse.

    python -m experiments.cross_modal                  # questions on rendered scenes: a vision model gives to words
    python -m experiments.cross_modal smoke            # about a minute; shows that it works, not what it gains
    python -m experiments.cross_modal text_to_vision   # the same questions: a text model gives to vision
    python -m experiments.cross_modal within           # inside one model: its vision gives to its words
    python -m experiments.cross_modal retrieval        # scenes and captions, find one by the other
    python -m experiments.cross_modal retrieval_text_to_vision
    python -m experiments.cross_modal paper            # VQA v2.0 with BERT and ViT, for a GPU
    python -m experiments.cross_modal paper_retrieval  # MSCOCO with BERT and ViT, for a GPU
    python -m experiments.cross_modal --help

The target answers questions on images (vqa) or finds captions and images by each other (retrieval); it may also be a
model of one modality. The source is a model of images, of text, or of both, or the target itself. Blocks of attention
of one modality give to blocks of the other, matched by depth: the two share no input, no label and no width.

Methods: vanilla (no transfer), share (the overlapping block of the source's layer is copied every few steps), and
mergenet. What was measured stands in experiments/README.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import merge_jax as mj
from merge_jax.checks import check_at_least_one
from merge_jax.study.architecture import Architecture
from merge_jax.study.choices import ImageTextTaskName, TextTaskName
from merge_jax.study.cli import main
from merge_jax.study.config import make_schedule
from merge_jax.study.methods import parse_routes
from merge_jax.study.tasks import Spec, TaskConfig, TaskName

if TYPE_CHECKING:
    from merge_jax.data import WordPiece
    from merge_jax.study.scenario import Learner, Scenario

Direction = Literal["vision_to_text", "text_to_vision"]
SourceTaskName = Literal["itself"] | ImageTextTaskName | TaskName

_BY_DEPTH = "by depth"
_IMAGE_TEXT_TASKS = get_args(ImageTextTaskName)


@dataclass(frozen=True)
class _Spec(Spec):
    """A model of images with text, or of either, and what it is to learn."""

    architecture: Architecture = field(default_factory=Architecture)
    vision_weights: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Options of the experiment."""

    methods: tuple[str, ...] = ("vanilla", "share", "mergenet")
    """Methods to compare: a transfer, an objective, or both as in share_agree; see experiments/README.md."""
    target_task: ImageTextTaskName | TaskName = "vqa"
    """What the target learns."""
    source_task: SourceTaskName = "shapes"
    """What the source learns; with "itself", the target is its own source."""
    direction: Direction = "vision_to_text"
    """Which attention gives to which."""
    target_model: Architecture = field(default_factory=Architecture)
    """The network that receives; a task of one modality has the encoder of that."""
    source_model: Architecture = field(default_factory=lambda: Architecture("small_vit", "small_bert"))
    """The network that gives."""
    target_data: str = "synthetic"
    """Data of the target. Of vqa: synthetic (Sort-of-CLEVR), clevr of TFDS, or a folder of VQA v2.0. Of retrieval:
    synthetic (rendered scenes), a folder of MSCOCO, or a set of TFDS such as cifar100, whose classes are the captions.
    Of text: as in cross_task."""
    source_data: str = "synthetic"
    """Data of the source, as --target-data."""
    target_text_weights: Path | None = None
    """Hugging Face safetensors file or folder that the target's text encoder starts from; needs --vocabulary."""
    source_text_weights: Path | None = None
    """The same for the source."""
    target_vision_weights: Path | None = None
    """Hugging Face safetensors file or folder that the vision transformer of a target of images with text starts from;
    a preprocessor_config.json beside it scales the pixels."""
    source_vision_weights: Path | None = None
    """The same for the source."""
    labels: int | None = None
    """Training images (with all their questions or captions) or texts that the target learns from, or None for all; a
    source has all."""
    validation: int = 100
    """Training images or texts of the target held out to validate on; digits always hold out 200."""
    source_validation: int = 100
    """The same of the source."""
    image_size: int | None = 32
    """Height and width to scale images to; None for as they are, where data of images alone allow it."""
    num_shapes: int = 2
    """Shapes on each image of synthetic questions, 2 to 6; with 6, as published, small models learn for long."""
    num_answers: int = 3129
    """How many of the commonest training answers a model chooses from."""
    uncovered: Literal["error", "skip"] = "error"
    """What to do with training questions none of whose answers are among these."""
    unreadable: Literal["error", "skip"] = "error"
    """What to do with images that are missing or cannot be read: refuse, or leave out, name and count them."""
    routes: tuple[str, ...] = (_BY_DEPTH,)
    """Layers that take part, as target=source, such as text_encoder/layer_0/attention=encoder/layer_1/attention; "by
    depth" are all attention blocks of the direction."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        super().check()
        check_at_least_one(num_answers=self.num_answers)
        if self.source_task == "itself" and self.source != "pretrained":
            raise ValueError(f"a target that is its own source has none that is {self.source}: leave out --source")
        if self.source_task == "itself" and (self.source_text_weights or self.source_vision_weights):
            raise ValueError("a target that is its own source starts from its own weights: use --target-text-weights")

    def check_weights(self, spec: Spec) -> None:
        """Raises ValueError for weights of other encoders; see `TaskConfig`."""
        if not isinstance(spec, _Spec) or spec.task not in _IMAGE_TEXT_TASKS:
            return super().check_weights(spec)
        architecture = spec.architecture
        if spec.weights is not None:
            from merge_jax.study.texts import check_text_weights

            check_text_weights(spec.weights, architecture.text, self.max_length, architecture.text_attributes)
        if spec.vision_weights is not None and self.image_size is not None:
            import numpy as np

            from merge_jax.study.images import make_vision_encoder
            from merge_jax.study.texts import check_weights

            encoder = make_vision_encoder(architecture.vision, self.image_size, architecture.vision_attributes)
            check_weights(spec.vision_weights, encoder, np.zeros((1, self.image_size, self.image_size, 3), np.float32))

    def load_texts(self, spec: Spec) -> Any | None:
        """Returns the data of a task with text in it; see `TaskConfig`."""
        if spec.task not in _IMAGE_TEXT_TASKS:
            return super().load_texts(spec)
        if self.image_size is None:
            raise ValueError(f"{spec.task} needs --image-size, which its images are scaled to")
        from merge_jax.study.image_text import load_image_text

        return load_image_text(
            spec.task, spec.text.data, self.data_dir, self.image_size, self.unreadable, self.num_shapes
        )

    def words_of(self, texts: Any) -> Iterable[str]:
        """Returns all texts there are to learn from; see `TaskConfig`."""
        from merge_jax.data import CaptionSet, VisualQuestionSet
        from merge_jax.study.image_text import words_with_images

        if isinstance(texts, VisualQuestionSet | CaptionSet):
            return words_with_images(texts)
        return super().words_of(texts)

    def learner(self, spec: Spec, texts: Any | None, tokens: "WordPiece | None") -> "Learner":
        """Returns a model that is to learn; see `TaskConfig`."""
        from merge_jax.data import CaptionSet, VisualQuestionSet
        from merge_jax.study.image_text import Reading, image_text_learner

        if not isinstance(texts, VisualQuestionSet | CaptionSet) or not isinstance(spec, _Spec) or tokens is None:
            return super().learner(spec, texts, tokens)
        validation = self.validation if spec.validation is None else spec.validation
        reading = Reading(self.max_length, self.too_long, validation, self.num_answers, self.uncovered)
        weights = {"text_weights": spec.weights, "vision_weights": spec.vision_weights}
        return image_text_learner(spec.task, texts, tokens, spec.architecture, reading, images=spec.labels, **weights)


_VISION_AGREES = ("image_encoder/layer_0=encoder/layer_1", "image_encoder/layer_1=encoder/layer_3")
_TEXT_AGREES = ("text_encoder/layer_0=encoder/layer_1", "text_encoder/layer_1=encoder/layer_3")
# A rate that small transformers from scratch bear, and steps that fit five seeds into three minutes on two cores.
_SMALL = Config(
    agree=_VISION_AGREES,
    steps=400,
    source_steps=300,
    report_every=40,
    checkpoint_every=200,
    learning_rate=2e-3,
    max_length=16,
)
# With few images: of all 3,900, the target needs no help.
_RETRIEVAL = replace(_SMALL, target_task="retrieval", labels=500, max_length=24)
_PAPER = Config(
    seeds=3,
    source_task="itself",
    target_model=Architecture("vit_base", "bert_base", fusion_layers=6, embedding_size=256, dropout=0.1),
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
        target_model=Architecture(layers=1),
        source_model=Architecture("small_vit", "small_bert", layers=1),
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


def build(config: Config) -> "Scenario":
    """Returns the scenario: the models, their data and the methods.

    Raises:
      ValueError: data that cannot be had, an unknown model or method, a model that lacks the modality it is to give or
        receive by, or an option that a method refuses.
    """
    from merge_jax.data import num_examples
    from merge_jax.study.scenario import Scenario, choose

    specs: list[Spec] = []
    if config.source_task != "itself":
        weights = (config.source_text_weights, config.source_vision_weights)
        source = _spec(config.source_task, config.source_model, config.source_data, *weights, None)
        specs.append(replace(source, validation=config.source_validation))
    weights = (config.target_text_weights, config.target_vision_weights)
    specs.append(_spec(config.target_task, config.target_model, config.target_data, *weights, config.labels))
    (*sources, target), attach = config.learners(specs)
    source = sources[0] if sources else target
    lengths = [num_examples(learner.role.splits(0).train) for learner in (source, target)]
    schedule = make_schedule(config, *lengths)
    source_steps = (schedule.target if config.source == "live" else schedule.source).steps
    num_steps = schedule.target.steps
    routes = _routes(config, source, target)
    optimizer = target.optimizer(config.learning_rate, num_steps)
    objectives = config.objectives_of(source if sources else None, target, optimizer)

    def bind(make: Any) -> "mj.Transfer":
        return make(routes) if sources else mj.self_transfer(make(routes))

    methods = config.methods_of(bind, num_steps, objectives)
    source_task = mj.Task(source.loss_fn, source.optimizer(config.learning_rate, source_steps))
    return Scenario(
        name="cross_modal",
        source=source.role if sources else None,
        target=target.role,
        source_task=source_task if sources else None,
        methods=choose(methods, config.methods),
        schedule=schedule,
        adapter_optimizer=config.adapter_optimizer(schedule),
        attach=attach,
    )


def _spec(
    task: str,
    architecture: Architecture,
    data: str,
    weights: Path | None,
    vision_weights: Path | None,
    labels: int | None,
) -> Spec:
    from merge_jax.study.texts import TextSource

    reads = task in get_args(TextTaskName)
    model = architecture.text if reads else architecture.vision
    attributes = architecture.text_attributes if reads else architecture.vision_attributes
    if weights is not None and task not in (*get_args(TextTaskName), *_IMAGE_TEXT_TASKS):
        raise ValueError(f"the weights {weights} are of a text encoder, which {model} ({task}) has not")
    if vision_weights is not None and task not in _IMAGE_TEXT_TASKS:
        raise ValueError(
            f"the weights {vision_weights} are for the vision transformer of a model of images with text, which {model}"
            f" ({task}) is not"
        )
    return _Spec(
        task,
        model,
        TextSource(data),
        weights,
        labels,
        attributes=attributes,
        architecture=architecture,
        vision_weights=vision_weights,
    )


def _routes(config: Config, source: "Learner", target: "Learner") -> "list[mj.Route]":
    """Returns the routes: all attention blocks of the direction by depth, or those that are given."""
    if config.routes != (_BY_DEPTH,):
        return parse_routes(config.routes)
    giving, _, receiving = config.direction.partition("_to_")
    for role, learner, modality in (("source", source, giving), ("target", target, receiving)):
        if modality not in learner.attention:
            raise ValueError(
                f"{config.direction} needs a {role} with attention to {modality}; {learner.role.name} has"
                f" {' and '.join(learner.attention) or 'none'}"
            )
    import jax

    shapes = (jax.eval_shape(learner.role.init, jax.random.key(0))[0] for learner in (source, target))
    blocks = {"source": source.attention[giving], "target": target.attention[receiving]}
    found = mj.match(*shapes, **blocks, view="attention")
    return [mj.Route(target, source, view="attention") for target, source in found.items()]


if __name__ == "__main__":
    main(PRESETS, __spec__.name, __doc__, build, measured={"default": "3 to 4 minutes on two CPU cores"})
