"""Models of images with text in a scenario: tasks, data by name or folder, and scores."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from merge_jax.checkpoints.shards import beside, read_json
from merge_jax.checks import check_choice
from merge_jax.data import (
    Arrays,
    CaptionedImages,
    CaptionSet,
    Splits,
    Streamed,
    VisualQuestionSet,
    WordPiece,
    channel_statistics,
    class_captions,
    load_clevr,
    load_coco_captions,
    load_tfds_images,
    load_vqa,
    scene_captions,
    sort_of_clevr,
    take,
)
from merge_jax.objectives.vqa import normalize_answer
from merge_jax.paths import near_misses
from merge_jax.study.choices import ImageTextTaskName
from merge_jax.study.models.code import model_code
from merge_jax.study.models.images import make_vision_encoder
from merge_jax.study.models.model import SampleImages, StudyModel
from merge_jax.study.models.text_weights import check_weights, read_weights, with_weights
from merge_jax.study.models.texts import adamw, check_text_weights, describe_tokens, make_text_encoder, warn_of_cuts
from merge_jax.study.options import Architecture
from merge_jax.types import LossFn

__all__ = [
    "check_image_text_weights",
    "image_text_model",
    "load_image_text",
    "texts_with_images",
]

_ATTENTION = {"vision": "image_encoder/*/attention", "text": "text_encoder/*/attention"}
_EVALUATED_AT_ONCE = 100
_NUM_SHOWN = 6
_CANDIDATES = 200
_LARGEST_RANK = 10
# A study makes many scenarios of one set; none changes its images or texts.
_sort_of_clevr = lru_cache(maxsize=2)(sort_of_clevr)
_scene_captions = lru_cache(maxsize=2)(scene_captions)
_SEEN = 1000  # Images used for the pixels' mean and deviation, to avoid a pass over all streamed images.


def load_image_text(
    task: str, data: str, data_dir: Path | None, image_size: int, unreadable: str, num_shapes: int
) -> VisualQuestionSet | CaptionSet:
    """Returns images with questions or captions.

    Args:
      task: one of `ImageTextTaskName`.
      data: `synthetic` for rendered scenes; for vqa, TFDS's `clevr` or a folder of VQA v2.0 files; for retrieval, a
        TFDS set whose class names are the captions, or a folder of MSCOCO.
      data_dir: TFDS's folder.
      image_size: the height and width to resize images to.
      unreadable: how to handle missing or unreadable images, `error` or `skip`.
      num_shapes: the number of shapes on each rendered image for questions.

    Raises:
      ValueError: the task is unknown, or the data is unavailable.
    """
    check_choice("task", task, get_args(ImageTextTaskName))
    is_folder = "/" in data or Path(data).is_dir()
    if task == "vqa":
        if data == "synthetic":
            return _sort_of_clevr(
                4000, 500, 0, image_size=image_size, num_shapes=num_shapes, relational=2, non_relational=2
            )
        if data == "clevr":
            return load_clevr(data_dir, image_size=image_size, unreadable=unreadable)
        if not is_folder:
            names = near_misses(data, ("synthetic", "clevr"))
            raise ValueError(f"unknown data {data!r} of vqa; {names}, or give a folder of VQA v2.0 such as ./vqa")
        return load_vqa(data, image_size=image_size, unreadable=unreadable)
    if data == "synthetic":
        return _scene_captions(4000, 400, seed=0, image_size=image_size)
    if is_folder:
        return load_coco_captions(data, image_size=image_size, unreadable=unreadable)
    return class_captions(load_tfds_images(data, data_dir, image_size=image_size))


def check_image_text_weights(
    architecture: Architecture,
    text_weights: Path | None,
    vision_weights: Path | None,
    *,
    max_length: int,
    image_size: int | None,
) -> None:
    """Raises ValueError for other encoders' weights, before reading data: their header suffices."""
    if text_weights is not None:
        check_text_weights(text_weights, architecture.text, max_length, architecture.text_attributes)
    if vision_weights is not None and image_size is not None:
        encoder = make_vision_encoder(architecture.vision, image_size, architecture.vision_attributes)
        check_weights(vision_weights, encoder, np.zeros((1, image_size, image_size, 3), np.float32))


def texts_with_images(found: VisualQuestionSet | CaptionSet) -> Sequence[str]:
    """Returns the training questions or captions."""
    return found.train.questions if isinstance(found, VisualQuestionSet) else found.train.captions


def image_text_model(
    task: str,
    found: VisualQuestionSet | CaptionSet,
    tokens: WordPiece,
    architecture: Architecture,
    *,
    max_length: int,
    too_long: str,
    validation: int,
    images: int | None,
    num_answers: int,
    uncovered: str,
    learning_rate: float,
    text_weights: Path | None = None,
    vision_weights: Path | None = None,
) -> StudyModel:
    """Returns a model for questions on images, or for retrieval of captions and images.

    Args:
      task: the task's name.
      found: the task's data.
      tokens: the vocabulary of its texts.
      architecture: the model.
      max_length: the maximum tokens of a text.
      too_long: how to handle longer ones, `truncate` or `error`.
      validation: the number of training images to hold out, with all their questions or captions, drawn for each seed.
      images: how many of the others to train on; None for all.
      num_answers: the number of answers to choose from.
      uncovered: how to handle training questions with none of these answers, `error` or `skip`.
      learning_rate: AdamW's learning rate.
      text_weights: a Hugging Face safetensors file or folder with the text encoder's initial weights.
      vision_weights: the same for its vision transformer; a preprocessor_config.json beside them sets the pixel
        normalisation.

    Raises:
      ValueError: the model does not fit the images, a text or weights do not fit the model, there are too few images,
        or training questions have none of the answers to choose from.
    """
    shape = found.train.images.shape
    rate, sizes = architecture.dropout, architecture.text_attributes
    vision = make_vision_encoder(architecture.vision, shape[1], architecture.vision_attributes, dropout_rate=rate)
    text = make_text_encoder(architecture.text, tokens, max_length, sizes, dropout_rate=rate)
    pixels = _scale_of_pixels(found, vision_weights)
    encode = partial(_encode, found.name, tokens, max_length, too_long)
    name = f"{architecture.vision} and {architecture.text} ({found.name} {task})"
    if isinstance(found, VisualQuestionSet):
        fusion = {"num_layers": architecture.fusion_layers, "dropout_rate": rate}
        make = partial(mj.models.VisualAnswerer, vision, text, **fusion)
        module, parts = _answerer(found, make, pixels, num_answers, uncovered, encode)
    else:
        module = mj.models.DualEncoder(vision, text, architecture.embedding_size)
        parts = _finder(found, module, pixels, encode)
    splits = _splits_by_image(found.name, *parts.arrays, validation, images, parts.learned)
    if isinstance(found, CaptionSet):
        _check_ranks(f"--validation: {found.name} has, held out of its training images,", splits(0).validation)
        _check_ranks(f"{found.name} has to test on", parts.arrays[1])

    def random_init(key: jax.Array) -> Any:
        inputs = np.zeros((1, *shape[1:]), np.float32), np.ones((1, max_length), np.int32)
        return mj.models.initialize(module, key, *inputs)["params"]

    weights = {"text_encoder": text_weights, "image_encoder": vision_weights}
    weights = {encoder: path for encoder, path in weights.items() if path is not None}
    drawn = jax.eval_shape(random_init, jax.random.key(0)) if weights else {}
    given = {encoder: read_weights(path, drawn[encoder]) for encoder, path in weights.items()}

    def init(key: jax.Array) -> tuple[Any, dict[str, Any]]:
        params = random_init(key)
        return {**params, **{encoder: with_weights(one, params[encoder]) for encoder, one in given.items()}}, {}

    inputs = {
        f"jnp.zeros({(1, *shape[1:])})": f"images [N, {', '.join(map(str, shape[1:]))}], uint8",
        f"jnp.zeros((1, {max_length}), jnp.int32)": describe_tokens(max_length),
    }
    return StudyModel(
        name=name,
        init=init,
        loss=parts.loss,
        optimizer=partial(adamw, learning_rate),
        splits=splits,
        evaluate=parts.evaluate,
        metric=parts.metric,
        apply=mj.on_pixels(module.apply, *pixels),
        inputs=("image", "tokens"),
        attention=_ATTENTION,
        sample_images=parts.sample_images,
        code=model_code(module, inputs, pixels),
    )


def _scale_of_pixels(found: VisualQuestionSet | CaptionSet, weights: Path | None) -> tuple[Sequence[float], ...]:
    """Returns the pixels' mean and deviation for normalisation: those of the weights, or of the images."""
    if weights is not None:
        config = beside(weights, "preprocessor_config.json")
        learned = read_json(config) if config.exists() else {}
        if {"image_mean", "image_std"} <= learned.keys():
            return tuple(_numbers(learned[key], f"{key} of {config}") for key in ("image_mean", "image_std"))
    images = found.train.images
    mean, std = channel_statistics(images[np.arange(min(_SEEN, images.shape[0]))])
    return mean, tuple(max(one, 1 / 255) for one in std)  # A channel may be constant.


def _numbers(values: Any, name: str) -> Sequence[float]:
    if not isinstance(values, list) or len(values) != 3 or not all(type(one) in (int, float) for one in values):
        raise ValueError(f"{name} must be three numbers, one of each channel, got {values!r}")
    return values


@dataclass(frozen=True)
class _Parts:
    """A task's processed data: all training and test examples, the trained entries, and the rest."""

    arrays: tuple[Arrays, Arrays]
    learned: tuple[str, ...]
    loss: LossFn
    evaluate: Any
    metric: str
    sample_images: SampleImages


def _answerer(
    found: VisualQuestionSet, make: Any, pixels: Any, num_answers: int, uncovered: str, encode: Any
) -> tuple[Any, _Parts]:
    vocabulary = mj.objectives.answer_vocabulary(found.train.answers, num_answers)
    questions = [*found.train.questions, *found.test.questions]
    answers = [*found.train.answers, *found.test.answers]
    kinds = None
    if found.train.kinds is not None and found.test.kinds is not None:
        kinds = [*found.train.kinds, *found.test.kinds]
    indices, _ = mj.objectives.answer_indices(answers, vocabulary)
    arrays: Arrays = {
        "tokens": encode(questions),
        "answers": indices,
        "example": np.arange(len(questions), dtype=np.int32),
    }
    size = len(found.train.questions)
    train = {**take(arrays, np.arange(size)), **_images(found.train.images, found.train.image)}
    test = {**take(arrays, np.arange(size, len(questions))), **_images(found.test.images, found.test.image)}
    covered = (indices[:size] >= 0).any(axis=1)
    if not covered.all():
        message = mj.objectives.answer_coverage(found.train.answers, vocabulary)
        if uncovered == "error":
            raise ValueError(f"{found.name}: {message}: take more by --num-answers, or --uncovered skip")
        print(f"{found.name}: {message}: not learned from", file=sys.stderr)
        train = take(train, np.flatnonzero(covered))
    module = make(len(vocabulary))
    apply = mj.on_pixels(module.apply, *pixels)
    evaluate = mj.objectives.evaluate_vqa(apply, vocabulary, answers, kinds, batch_size=_EVALUATED_AT_ONCE)
    shown = _one_an_image(test)
    few = take(test, shown)
    asked = [questions[i] for i in few["example"]]
    right = [_commonest_first(answers[i]) for i in few["example"]]
    predict = mj.objectives.predict_answers(apply, vocabulary)
    sample_images = SampleImages(partial(_read, few), asked, right, lambda params, state: predict(params, state, few))
    learned = ("image", "tokens", "answers")
    return module, _Parts((train, test), learned, mj.objectives.vqa_loss(apply), evaluate, "accuracy", sample_images)


def _finder(found: CaptionSet, module: Any, pixels: Any, encode: Any) -> _Parts:
    train, test = (_pairs(part, encode(part.captions)) for part in (found.train, found.test))
    apply = mj.on_pixels(module.apply, *pixels)
    embed_images = partial(apply, method="embed_images")
    embed_texts = partial(module.apply, method="embed_texts")
    evaluate = mj.objectives.evaluate_retrieval(embed_images, embed_texts, batch_size=_EVALUATED_AT_ONCE)
    _, shown = np.unique(test["group"], return_index=True)
    few = take(test, np.sort(shown)[:_NUM_SHOWN])
    captions = found.test.captions
    captions_of: dict[int, list[str]] = {}
    for group, caption in zip(found.test.caption_group, captions, strict=True):
        captions_of.setdefault(int(group), []).append(str(caption))
    _, first = np.unique(test["caption_id"], return_index=True)
    first = first[:_CANDIDATES]  # All on the device.
    candidates = test["tokens"][first]

    @jax.jit
    def best(params: Any, state: Any, images: jax.Array, tokens: jax.Array) -> jax.Array:
        variables = {"params": params, **state}
        embedded: Any = embed_texts(variables, tokens)
        return jnp.argmax(embed_images(variables, images) @ embedded.T, axis=1)

    def answer(params: Any, state: Any) -> list[str]:
        ids = test["caption_id"][first]
        return [str(captions[ids[int(i)]]) for i in best(params, state, few["image"][:], candidates)]

    fitting = [captions_of[int(group)] for group in few["group"]]
    sample_images = SampleImages(partial(_read, few), [""] * len(fitting), fitting, answer)
    learned = ("image", "tokens", "group")
    return _Parts((train, test), learned, mj.objectives.retrieval_loss(apply), evaluate, "mean_recall", sample_images)


def _check_ranks(what: str, arrays: Arrays) -> None:
    images, captions = (len(np.unique(arrays[name])) for name in ("image_id", "caption_id"))
    if min(images, captions) < _LARGEST_RANK:
        raise ValueError(
            f"{what} {images} images and {captions} captions; recall among the first {_LARGEST_RANK} needs as many of"
            " each"
        )


def _pairs(part: CaptionedImages, tokens: np.ndarray) -> Arrays:
    image, caption = part.pairs()
    return {
        **_images(part.images, image),
        "tokens": tokens[caption],
        "caption_id": caption,
        "group": part.image_group[image].astype(np.int32),
    }


def _images(images: Any, rows: np.ndarray) -> dict[str, Any]:
    return {"image": Streamed(images, rows), "image_id": rows.astype(np.int32)}


def _read(arrays: Arrays) -> np.ndarray:
    return arrays["image"][:]


def _one_an_image(arrays: Arrays) -> np.ndarray:
    """Returns one example for each of a few images, with varied questions."""
    images = np.unique(arrays["image_id"])[:_NUM_SHOWN]
    rows = [np.flatnonzero(arrays["image_id"] == image) for image in images]
    return np.array([own[i % len(own)] for i, own in enumerate(rows)])


def _commonest_first(answers: Sequence[str]) -> list[str]:
    """Returns the different answers as models give them."""
    return [normalize_answer(answer) for answer, _ in Counter(answers).most_common()]


def _encode(name: str, tokens: WordPiece, max_length: int, too_long: str, texts: Sequence[str]) -> np.ndarray:
    none = np.zeros(len(texts), np.int32)
    try:
        encoded = tokens.encode_texts(texts, none, max_length, too_long=too_long)
    except ValueError as error:
        raise ValueError(f"{name}: {error} (two are special): take a larger --max-length, or cut texts") from None
    return warn_of_cuts(name, encoded)["tokens"]


def _splits_by_image(
    name: str, train: Arrays, test: Arrays, validation: int, images: int | None, learned: Sequence[str]
) -> Any:
    """Returns `seed -> Splits`; no image is in two splits, and training examples have only the trained entries."""
    all_images = np.unique(train["image_id"])
    left = len(all_images) - validation
    if not 1 <= validation < len(all_images):
        raise ValueError(
            f"--validation must lie in [1, {len(all_images) - 1}], for {len(all_images)} training images of {name}, got"
            f" {validation}"
        )
    if images is not None and not 1 <= images <= left:
        raise ValueError(
            f"labels, the number of training images, must lie in [1, {left}], what {name} has beside {validation} to"
            f" validate, got {images}; None is all"
        )

    @lru_cache(maxsize=1)
    def splits(seed: int) -> Splits:
        order = np.random.default_rng(seed).permutation(all_images)
        held_out, rest = order[:validation], order[validation:][:images]

        def examples(part: np.ndarray) -> Arrays:
            return take(train, np.flatnonzero(np.isin(train["image_id"], part)))

        to_learn = {entry: array for entry, array in examples(rest).items() if entry in learned}
        return Splits(to_learn, examples(held_out), test)

    return splits
