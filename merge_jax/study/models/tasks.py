"""Models for named tasks on images, text or both, and the shared vocabulary of those with text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import merge_jax as mj
from merge_jax.checkpoints.shards import beside
from merge_jax.checkpoints.weights.load import find_weights, weight_paths
from merge_jax.checks import check_choice
from merge_jax.data import CaptionSet, QuestionSet, TextSet, VisualQuestionSet, WordPiece
from merge_jax.data.text.tokens import MODEL_VOCABULARIES
from merge_jax.study.choices import ImageTextTaskName, PoolerName, TextTaskName
from merge_jax.study.config import RunConfig
from merge_jax.study.models.image_text import (
    check_image_text_weights,
    image_text_model,
    load_image_text,
    texts_with_images,
)
from merge_jax.study.models.images import image_model
from merge_jax.study.models.model import StudyModel
from merge_jax.study.models.texts import TextData, check_text_weights, learned_texts, load_text, text_model, vocabulary
from merge_jax.study.options import BY_DEPTH, TASKS, Architecture, ImageTextOptions, TaskOptions

__all__ = ["TaskSpec", "make_models", "routes_by_depth", "routes_to_lower_half"]

_VOCABULARY = "vocabulary.json"
_TEXT_TASKS = get_args(TextTaskName)
_IMAGE_TEXT_TASKS = get_args(ImageTextTaskName)

Texts = TextSet | QuestionSet | VisualQuestionSet | CaptionSet


@dataclass(frozen=True)
class TaskSpec:
    """A model and its task.

    Attributes:
      task: the task's name.
      model: the model's name, or its parts; a task of one modality uses only that encoder.
      data: the source of a task's texts and images.
      weights: a Hugging Face safetensors file or folder that its text encoder starts from.
      vision_weights: the same for the vision transformer of a model of images with text.
      labels: the number of training examples; None for all.
      unlabelled: the number of additional unlabelled examples.
      validation: the number of training examples to hold out; None for the options' number.
      learning_rate: its optimizer's learning rate; None for the options' rate.
      sizes: a Hugging Face safetensors file or folder, with its config.json, that sets a text model's sizes.
      pooler: a text classifier's pooler, see `merge_jax.models.TextClassifier`; None for its architecture's.
      fit_head: whether to fit the last layer of a source read from a file to its training examples.
    """

    task: str
    model: str | Architecture
    data: TextData
    weights: Path | None = None
    vision_weights: Path | None = None
    labels: int | None = None
    validation: int | None = None
    learning_rate: float | None = None
    sizes: Path | None = None
    pooler: PoolerName | None = None
    fit_head: bool = False
    unlabelled: int = 0

    @property
    def encoder(self) -> tuple[str, dict[str, Any]]:
        """The name and attributes of the encoder of a task of one modality."""
        if isinstance(self.model, str):
            return self.model, {}
        if self.task in _TEXT_TASKS:
            return self.model.text, self.model.text_attributes
        return self.model.vision, self.model.vision_attributes


def make_models(config: RunConfig, specs: Sequence[TaskSpec]) -> tuple[list[StudyModel], Callable[[Path], None] | None]:
    """Returns the models, the target last, and a function that saves the text models' vocabulary into a folder.

    Args:
      config: `TaskOptions` and `RunConfig` in one class, with `ImageTextOptions` for images with text.
      specs: the specs of the models.

    Raises:
      ValueError: an unknown task or model, unavailable data, or a vocabulary that is not the source's.
      TypeError: a config without these options.
    """
    if not isinstance(config, TaskOptions):
        raise TypeError("the config of tasks by name has TaskOptions: class Config(TaskOptions, ..., RunConfig)")
    source_from = _with_its_files(config.source_from)
    specs = [replace(spec, weights=_with_its_files(spec.weights)) for spec in specs]
    specs = [_with_sizes(spec, source_from if number < len(specs) - 1 else None) for number, spec in enumerate(specs)]
    for spec in specs:
        _check_modality(spec)
        _check_weights(config, spec)
    if config.source == "frozen" and len(specs) == 2 and _is_huggingface(source_from):
        _check_weights(config, replace(specs[0], weights=source_from))
    texts = [_load_texts(config, spec) for spec in specs]
    if all(one is None for one in texts):
        return [_make_model(config, spec, None, None) for spec in specs], None
    words = [word for one in texts if one is not None for word in _words(one)]
    source_reads = any(one is not None for one in texts[:-1])
    tokens = _tokens(config, words, [spec.weights for spec in specs], source_from if source_reads else None)
    models = [_make_model(config, spec, one, tokens) for spec, one in zip(specs, texts, strict=True)]
    return models, lambda folder: tokens.save(folder / _VOCABULARY)


def routes_by_depth(
    source: StudyModel, target: StudyModel, giving: str | None = None, receiving: str | None = None
) -> list[mj.Route]:
    """Returns routes from all attention blocks of the source to all of the target, matched by depth.

    Args:
      source: the source model.
      target: the target model.
      giving: the modality of the source's blocks, `vision` or `text`; None for a model of one modality.
      receiving: the same for the target.

    Raises:
      ValueError: a model without such blocks.
    """
    patterns = {}
    for role, model, modality in (("source", source, giving), ("target", target, receiving)):
        attention = dict(model.attention)
        if len(attention) == 1 and modality is None:
            modality = next(iter(attention))
        if modality not in attention:
            needed = "attention" if modality is None else f"attention to {modality}"
            has = " and ".join(attention) or "none"
            raise ValueError(f"routes {BY_DEPTH} need a {role} with {needed}; {model.name} has {has}")
        patterns[role] = attention[modality]
    found = mj.match(source.shapes[0], target.shapes[0], **patterns, view="attention")
    return [mj.Route(target, source, view="attention") for target, source in found.items()]


def routes_to_lower_half(model: StudyModel) -> list[mj.Route]:
    """Returns routes within a text model, from attention blocks of its upper half to those of its lower.

    Raises:
      ValueError: a model without a text encoder.
    """
    shapes, _ = model.shapes
    if "encoder" not in shapes:
        raise ValueError(f'routes "{BY_DEPTH}" are for text models; name those of {model.name} as shallow=deep')
    layers = sum(name.startswith("layer_") for name in shapes["encoder"])
    blocks = [f"encoder/layer_{i}/attention" for i in range(layers)]
    pairs = zip(blocks[: layers // 2], blocks[layers - layers // 2 :], strict=True)
    return [mj.Route(lower, upper, view="attention") for lower, upper in pairs]


def _with_its_files(path: Path | None) -> Path | None:
    """Returns the folder of a package's weights, which also holds its vocabulary; any other path unchanged."""
    found = None if path is None else find_weights(path)
    return found if found is None or found == path else found.parent


def _with_sizes(spec: TaskSpec, source_from: Path | None) -> TaskSpec:
    """Returns a text model's spec with the file that sets its sizes, if there is one."""
    file = source_from if spec.weights is None else spec.weights
    if spec.task not in _TEXT_TASKS or file is None:
        return spec
    is_run = beside(file, "checkpoints").is_dir()
    return spec if is_run or not beside(file, "config.json").exists() else replace(spec, sizes=file)


def _check_modality(spec: TaskSpec) -> None:
    """Raises ValueError for weights of an encoder or head that a task's model lacks."""
    if spec.fit_head and (spec.task not in _TEXT_TASKS or spec.task == "qa"):
        raise ValueError(f"a last layer is fitted to the labels of texts: {spec.task} has none to fit it to")
    if not isinstance(spec.model, Architecture) or spec.task in _IMAGE_TEXT_TASKS:
        return
    model = f"{spec.encoder[0]} ({spec.task})"
    if spec.weights is not None and spec.task not in _TEXT_TASKS:
        raise ValueError(f"the weights {spec.weights} are of a text encoder, which {model} does not have")
    if spec.vision_weights is not None:
        raise ValueError(
            f"the weights {spec.vision_weights} are for the vision transformer of a model of images with text, which"
            f" {model} is not"
        )


def _check_weights(options: TaskOptions, spec: TaskSpec) -> None:
    """Raises ValueError for another encoder's weights, before reading data: their header suffices."""
    name, attributes = spec.encoder
    if spec.task in _IMAGE_TEXT_TASKS and isinstance(spec.model, Architecture):
        sizes = {"max_length": options.max_length, "image_size": options.image_size}
        check_image_text_weights(spec.model, spec.weights, spec.vision_weights, **sizes)
    elif spec.weights is not None and spec.task in _TEXT_TASKS:
        check_text_weights(spec.weights, name, options.max_length, attributes, spec.sizes)


def _is_huggingface(path: Path | None) -> bool:
    """Returns whether a source is read from a Hugging Face file, not from one of ours or from a run."""
    if path is None or not path.exists() or (path / "checkpoints").is_dir():
        return False
    return not any(leaf.startswith(("encoder/embeddings/", "params/")) for leaf in weight_paths(path))


def _load_texts(options: TaskOptions, spec: TaskSpec) -> Texts | None:
    """Returns the data of a task with text; None for images alone.

    Raises:
      ValueError: the task is unknown, or its data is unavailable.
    """
    if spec.task in _TEXT_TASKS:
        return load_text(spec.task, spec.data, options.data_dir)
    if spec.task not in _IMAGE_TEXT_TASKS or not isinstance(options, ImageTextOptions):
        check_choice("task", spec.task, TASKS)
        return None
    if options.image_size is None:
        raise ValueError(f"{spec.task} needs --image-size, which its images are scaled to")
    return load_image_text(
        spec.task, spec.data.data, options.data_dir, options.image_size, options.unreadable, options.num_shapes
    )


def _words(texts: Texts) -> Sequence[str]:
    """Returns all training texts."""
    return texts_with_images(texts) if isinstance(texts, VisualQuestionSet | CaptionSet) else learned_texts(texts)


def _make_model(options: TaskOptions, spec: TaskSpec, texts: Texts | None, tokens: WordPiece | None) -> StudyModel:
    """Returns a model of texts in these tokens, or of images alone.

    Raises:
      ValueError: the model is unknown, or does not fit its data.
    """
    validation = options.validation if spec.validation is None else spec.validation
    learning_rate = options.learning_rate if spec.learning_rate is None else spec.learning_rate
    name, attributes = spec.encoder
    if texts is None or tokens is None:
        return image_model(
            spec.task,
            name,
            data_dir=options.data_dir,
            image_size=options.image_size,
            validation=validation,
            labels=spec.labels,
            unlabelled=spec.unlabelled,
            stages=options.stages,
            learning_rate=learning_rate,
            attributes=attributes,
        )
    if isinstance(texts, VisualQuestionSet | CaptionSet):
        assert isinstance(options, ImageTextOptions)  # Otherwise they would not have loaded.
        assert isinstance(spec.model, Architecture)
        return image_text_model(
            spec.task,
            texts,
            tokens,
            spec.model,
            max_length=options.max_length,
            too_long=options.too_long,
            validation=validation,
            images=spec.labels,
            num_answers=options.num_answers,
            uncovered=options.uncovered,
            learning_rate=learning_rate,
            text_weights=spec.weights,
            vision_weights=spec.vision_weights,
        )
    return text_model(
        spec.task,
        texts,
        tokens,
        name,
        max_length=options.max_length,
        too_long=options.too_long,
        validation=validation,
        labels=spec.labels,
        unlabelled=spec.unlabelled,
        learning_rate=learning_rate,
        weights=spec.weights,
        attributes=attributes,
        sizes=spec.sizes,
        pooler=spec.pooler,
        fit_head=spec.fit_head,
    )


def _tokens(
    options: TaskOptions, words: Iterable[str], weights: Sequence[Path | None], source: Path | None
) -> WordPiece:
    """Returns the vocabulary: the named one, the source's, or a trained one."""
    files = [path for path in (source, *weights) if path is not None]
    known = next(filter(None, map(_vocabulary_in, files)), None)
    # Weights are meaningless under other word ids, yet their shapes would fit.
    if known is None:
        if files and options.vocabulary is None:
            raise ValueError(
                f"the weights in {files[0]} need the vocabulary they were trained with: --vocabulary, or name a folder"
                f" that has {' or '.join(MODEL_VOCABULARIES)} beside them"
            )
        return vocabulary(options.vocabulary, words, options.vocabulary_size)
    tokens = WordPiece.from_vocabulary(known)
    if options.vocabulary is not None and WordPiece.from_vocabulary(options.vocabulary).words != tokens.words:
        raise ValueError(f"the vocabulary {options.vocabulary} is not that of the source, {known}: leave it out")
    return tokens


def _vocabulary_in(folder: Path) -> Path | None:
    """Returns the vocabulary in a run's or model's folder; None for a file, which may lie anywhere."""
    files = (folder / name for name in (_VOCABULARY, *MODEL_VOCABULARIES))
    return next((file for file in files if file.is_file()), None)
