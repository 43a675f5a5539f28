"""Text models of a scenario: tasks by name, data by name or file, and training."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import merge_jax as mj
from merge_jax.checkpoints.weights.load import weight_paths
from merge_jax.checks import check_choice
from merge_jax.data import (
    Arrays,
    Encoded,
    LabelledTexts,
    QuestionSet,
    Splits,
    TextSet,
    WordPiece,
    class_balanced,
    decode_spans,
    load_questions,
    load_text_set,
    load_texts,
    load_tfds_questions,
    load_tfds_texts,
    num_examples,
    split,
    synthetic_questions,
    synthetic_reviews,
    synthetic_topics,
)
from merge_jax.study.choices import PoolerName, TextModelName, TextTaskName
from merge_jax.study.models.code import model_code
from merge_jax.study.models.model import StudyModel, check_pool, draw_pool
from merge_jax.study.models.pretrained import fitted_head
from merge_jax.study.models.text_weights import check_weights, read_weights, weights_error, with_weights

__all__ = [
    "TEXT_ATTENTION",
    "TextData",
    "adamw",
    "check_text_weights",
    "describe_tokens",
    "learned_texts",
    "load_text",
    "make_text_encoder",
    "text_model",
    "vocabulary",
    "warn_of_cuts",
]

TEXT_ATTENTION = "encoder/*/attention"

# A study makes many scenarios of one set, created once per process. None of them changes it.
_SYNTHETIC: dict[str, Callable[[], TextSet | QuestionSet]] = {
    "sentiment": cache(partial(synthetic_reviews, 2000, 1000, seed=0)),
    "topic": cache(partial(synthetic_topics, 2000, 1000, seed=0)),
    "qa": cache(partial(synthetic_questions, 4000, 1000, seed=0)),
}
_TFDS = {
    "sentiment": partial(load_tfds_texts, "imdb_reviews"),
    "topic": partial(load_tfds_texts, "ag_news_subset", text=("title", "description")),
    "qa": partial(load_tfds_questions, "squad/v2.0"),
}
_WORDS = "encoder/embeddings/word/embedding"
_FILES = (".tsv", ".csv", ".jsonl", ".json")
_TEST_SHARE = 0.2
_EVALUATED_AT_ONCE = 200


@dataclass(frozen=True)
class TextData:
    """The source of one model's text.

    Attributes:
      data: `synthetic`, `tfds` for the task's standard TFDS set, another set's name, or a file's path.
      test_data: the test file, if `data` is a file; by default a fifth of that file.
      text: the text columns or features.
      label: the label column.
    """

    data: str
    test_data: Path | None = None
    text: tuple[str, ...] = ("text",)
    label: str = "label"


def load_text(task: str, data: TextData, data_dir: Path | None) -> TextSet | QuestionSet:
    """Returns the texts of a task.

    Raises:
      ValueError: the task is unknown, or the data is unavailable.
    """
    check_choice("task", task, get_args(TextTaskName))
    path = Path(data.data)
    if data.data == "synthetic":
        return _SYNTHETIC[task]()
    if data.data == "tfds":
        return _TFDS[task](data_dir=data_dir)
    if path.suffix not in _FILES and not path.exists():
        if task == "qa":
            return load_tfds_questions(data.data, data_dir)
        return load_tfds_texts(data.data, data_dir, text=data.text)
    if task == "qa":
        questions = load_questions(path)
        if data.test_data is not None:
            return QuestionSet(path.stem, questions, load_questions(data.test_data))
        order = np.random.default_rng(0).permutation(len(questions))
        cut = round(_TEST_SHARE * len(questions))
        return QuestionSet(path.stem, [questions[i] for i in order[cut:]], [questions[i] for i in order[:cut]])
    columns: Any = {"text": [_column(name) for name in data.text], "label": _column(data.label)}
    if data.test_data is not None:
        return load_text_set(path, data.test_data, name=path.stem, **columns)
    texts, classes = load_texts(path, **columns)
    _check_classes(path.stem, texts, classes)
    rows = {"row": np.arange(len(texts.texts)), "label": texts.labels}
    test, train = split(rows, round(_TEST_SHARE * len(texts.texts)), seed=0)

    def taken(part: Arrays) -> LabelledTexts:
        return LabelledTexts([texts.texts[int(row)] for row in part["row"]], part["label"])

    return TextSet(path.stem, taken(train), taken(test), classes)


def _column(name: str) -> str | int:
    return int(name) if name.isdigit() else name


def vocabulary(path: Path | None, words: Iterable[str], size: int) -> WordPiece:
    """Returns the vocabulary of a file, or one trained on texts.

    Raises:
      ValueError: the file is not a vocabulary, or the size is too small for all letters.
    """
    if path is not None:
        return WordPiece.from_vocabulary(path)
    return _learned(tuple(words), size)


_learned = lru_cache(maxsize=8)(WordPiece.train)


def learned_texts(texts: TextSet | QuestionSet) -> list[str]:
    """Returns all training texts."""
    if isinstance(texts, TextSet):
        return list(texts.train.texts)
    passages = dict.fromkeys(question.passage for question in texts.train)
    return [*passages, *(question.question for question in texts.train)]


def check_text_weights(
    path: Path, model: str, max_length: int, attributes: Mapping[str, Any], sizes: Path | None = None
) -> None:
    """Raises ValueError for another encoder's weights, before reading texts: their header suffices.

    Checks that depend on the vocabulary follow later.
    """
    encoder = make_text_encoder(model, None, max_length, attributes, sizes)
    check_weights(path, encoder, jnp.zeros((1, 1), jnp.int32))


def make_text_encoder(
    model: str,
    tokens: WordPiece | None,
    max_length: int,
    attributes: Mapping[str, Any] = MappingProxyType({}),
    sizes: Path | None = None,
    **options: Any,
) -> mj.models.TextEncoder:
    """Returns the named encoder, or one with the sizes of a Hugging Face file.

    Args:
      model: one of `TextModelName`.
      tokens: the vocabulary; None if not known yet, for the names and shapes of everything else.
      max_length: the maximum length of a text, in tokens.
      attributes: attributes of a small model, such as layers and width.
      sizes: the file or folder that sets its sizes, regardless of the name.
      options: attributes of any model.

    Raises:
      ValueError: the model is unknown, does not support the length, or has fixed sizes; a file without sizes, or with
        another vocabulary.
    """
    check_choice("text model", model, get_args(TextModelName))
    name, small = (model, model.startswith("small_")) if sizes is None else (str(sizes), False)
    if attributes and not small:
        hint = "" if sizes is not None else ", or take a small model"
        raise ValueError(f"{name} has fixed sizes: leave out {', '.join(attributes)}{hint}")
    vocab_size, separator = (2, 1) if tokens is None else (tokens.vocab_size, tokens.separator)
    if sizes is not None:
        with weights_error():
            encoder = mj.models.text_encoder_of(sizes, separator=separator, **options)
        if tokens is not None and encoder.vocab_size != vocab_size:
            raise ValueError(
                f"{sizes} has a vocabulary of {encoder.vocab_size} tokens, the texts are in one of {vocab_size}: "
                "--vocabulary names the one that the weights were trained with"
            )
    else:
        if small:
            # As in vision: BERT's deviation of 0.02 suits its width of 768. A small encoder with it learns slowly, and
            # gains from copying any larger numbers, even an untrained source's.
            options |= {"max_length": max_length, "kernel_init": nn.initializers.xavier_uniform(), **attributes}
        encoder = getattr(mj.models, model)(vocab_size, separator=separator, **options)
    if max_length > encoder.max_length:
        raise ValueError(f"max_length must be at most {encoder.max_length}, the positions of {name}, got {max_length}")
    return encoder


def adamw(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Returns AdamW as for fine-tuning BERT: warm-up for a tenth of the run, linear to 0, gradients clipped at 1."""
    warmup = max(1, round(0.1 * steps))
    rising = optax.linear_schedule(0.0, learning_rate, warmup)
    falling = optax.linear_schedule(learning_rate, 0.0, max(1, steps - warmup))
    rate = optax.join_schedules([rising, falling], [warmup])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))


def text_model(
    task: str,
    texts: TextSet | QuestionSet,
    tokens: WordPiece,
    model: str,
    *,
    max_length: int,
    too_long: str = "truncate",
    validation: int,
    labels: int | None = None,
    unlabelled: int = 0,
    learning_rate: float,
    weights: Path | None = None,
    attributes: Mapping[str, Any] = MappingProxyType({}),
    sizes: Path | None = None,
    pooler: PoolerName | None = None,
    fit_head: bool = False,
) -> StudyModel:
    """Returns a model for a text task.

    Args:
      task: the task's name.
      texts: the task's data.
      tokens: the vocabulary.
      model: one of `TextModelName`.
      max_length: the maximum tokens of a text, or of a question and its passage.
      too_long: how to handle longer ones; the number of truncated ones is printed on standard error.
      validation: the number of training examples to hold out, redrawn for each seed.
      labels: how many of the others to train on; None for all.
      unlabelled: how many of the rest a classifier uses without labels, see `StudyModel.pool`.
      learning_rate: AdamW's learning rate.
      weights: a Hugging Face safetensors file or folder to start from; None for random ones.
      attributes: attributes of a small model, see `make_text_encoder`.
      sizes: the file or folder that sets its sizes, see `make_text_encoder`.
      pooler: a classifier's pooler; None for its architecture's.
      fit_head: whether to fit the last layer of a classifier read from a file, such as a source, to its training
        examples: logistic regression on its features.

    Raises:
      ValueError: the model is unknown, too few examples can be held out, a text does not fit, or weights do not fit the
        model and its vocabulary.
    """
    encoder = make_text_encoder(model, tokens, max_length, attributes, sizes)
    own: PoolerName = "tanh" if encoder.num_segments else "relu"
    pooler = own if pooler is None else pooler
    name = f"{model if sizes is None else sizes.name} ({texts.name} {task})"
    module: Any
    if isinstance(texts, QuestionSet):
        module = mj.models.SpanExtractor(encoder)
    else:
        module = mj.models.TextClassifier(encoder, len(texts.classes), pooler)
        if weights is not None:
            _warn_of_pooling(weights, pooler)

    def random_init(key: jax.Array) -> Any:
        return mj.models.initialize(module, key, np.zeros((1, max_length), np.int32))["params"]

    # Read once, and now, to refuse mismatches before anything else.
    given = None if weights is None else read_weights(weights, jax.eval_shape(random_init, jax.random.key(0)))
    if isinstance(texts, QuestionSet):
        train, test, evaluate = _questions(texts, tokens, max_length, too_long, module.apply)
        loss, metric = mj.objectives.span_loss(module.apply), "f1"
    else:
        _check_classes(texts.name, texts.train, texts.classes)
        train, test = (
            warn_of_cuts(name, tokens.encode_texts(part.texts, part.labels, max_length, too_long=too_long))
            for name, part in (
                (f"{texts.name}, to learn from", texts.train),
                (f"{texts.name}, to test on", texts.test),
            )
        )
        evaluate = mj.evaluate_classifier(module.apply, inputs="tokens", batch_size=_EVALUATED_AT_ONCE)
        loss, metric = mj.classification_loss(module.apply, inputs="tokens"), "accuracy"
    _check_sizes(texts.name, num_examples(train), validation, labels)
    if unlabelled and isinstance(texts, QuestionSet):
        raise ValueError(f"unlabelled texts are for classifiers, and {name} answers questions")
    if unlabelled:
        check_pool(split(train, validation, 0)[1], labels, unlabelled)

    def init(key: jax.Array) -> tuple[Any, dict[str, Any]]:
        params = random_init(key)
        return params if given is None else with_weights(given, params), {}

    def splits(seed: int) -> Splits:
        held_out, rest = split(train, validation, seed)
        if labels is not None:
            rest = class_balanced(rest, labels, seed) if "label" in rest else split(rest, labels, seed)[0]
        return Splits(_to_learn_from(rest), held_out, test)

    def pool(seed: int) -> Arrays:
        assert labels is not None  # check_pool
        return draw_pool(split(train, validation, seed)[1], labels, unlabelled, seed, ("tokens",))

    def load(path: Path, params: Any) -> Any:
        if _WORDS in weight_paths(path):  # With our names, as written by save_safetensors.
            return mj.load_params(path, params)
        return read_weights(path, params).params

    def load_and_fit(path: Path, variables: dict[str, Any], seed: int | None) -> dict[str, Any]:
        if seed is None:  # Before the first seed.
            _warn_of_pooling(path, pooler)
        params, kept = read_weights(path, variables["params"], fitted="classifier/")
        if kept and seed is not None:
            learned = splits(seed).train
            given = learned["tokens"], learned["label"], module.num_classes
            head = fitted_head(module.apply, {"params": params}, *given)
            params = {**params, "classifier": head._asdict()}
        return {**variables, "params": params}

    code = model_code(module, {f"jnp.zeros((1, {max_length}), jnp.int32)": describe_tokens(max_length)})
    return StudyModel(
        name=name,
        init=init,
        loss=loss,
        optimizer=partial(adamw, learning_rate),
        splits=lru_cache(maxsize=1)(splits),
        evaluate=evaluate,
        metric=metric,
        apply=module.apply,
        inputs=("tokens",),
        attention={"text": TEXT_ATTENTION},
        load=load,
        load_pretrained=load_and_fit if fit_head else None,
        code=code,
        pool=lru_cache(maxsize=1)(pool) if unlabelled else None,
    )


def _questions(
    texts: QuestionSet, tokens: WordPiece, max_length: int, too_long: str, apply: Any
) -> tuple[Arrays, Arrays, Callable[..., dict[str, float]]]:
    """Returns the encoded training and test questions, and the scorers of their answers."""
    questions = [*texts.train, *texts.test]
    encoded = tokens.encode_questions(questions, max_length, too_long=too_long)
    if encoded.truncated:
        _warn(f"{texts.name}: {encoded.truncated} of {len(questions)} passages were longer, and lost their end")
    size = len(texts.train)
    # A question with a truncated answer would wrongly teach "no answer".
    learned = np.flatnonzero(encoded.arrays["kept"][:size])
    if len(learned) < size:
        _warn(f"{texts.name}: {size - len(learned)} of {size} questions lost their answer: not learned from")
    rows = (learned, np.arange(size, len(questions)))
    train, test = ({name: array[part] for name, array in encoded.arrays.items()} for part in rows)
    passages = [question.passage for question in questions]
    answers = [question.answers for question in questions]

    def decode(logits: np.ndarray, arrays: Arrays) -> Sequence[str]:
        return decode_spans(logits, arrays, passages)

    return train, test, mj.objectives.evaluate_spans(apply, decode, answers, batch_size=_EVALUATED_AT_ONCE)


def _to_learn_from(arrays: Arrays) -> Arrays:
    """Returns the arrays for the device, without those that only scores need."""
    return {name: array for name, array in arrays.items() if name in ("tokens", "label", "start", "end")}


def warn_of_cuts(name: str, encoded: Encoded) -> Arrays:
    """Returns the arrays of texts, and prints the number of truncated ones on standard error."""
    if encoded.truncated:
        _warn(f"{name}: {encoded.truncated} of {num_examples(encoded.arrays)} texts were longer, and lost their end")
    return encoded.arrays


def describe_tokens(max_length: int) -> str:
    """Returns a description of a text model's inputs."""
    return f"tokens [N, {max_length}] of vocabulary.json, int32"


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def _warn_of_pooling(path: Path, pooler: PoolerName) -> None:
    """Warns of a sentence transformer that was trained with another vector of a text."""
    try:
        own = mj.models.pooler_of(path)
    except ValueError as error:
        _warn(f"warning: {error}; the run takes --pooler {pooler}")
        return
    if own not in (None, pooler):
        _warn(f"warning: {path} was trained with another vector of a text: --pooler {own}, not {pooler}")


def _check_classes(name: str, texts: LabelledTexts, classes: Sequence[str]) -> None:
    """Raises ValueError for a class without a text for each of training, validation and test."""
    counts = np.bincount(texts.labels, minlength=len(classes))
    rare = [f"{one!r} has {count}" for one, count in zip(classes, counts, strict=True) if count < 3]
    if rare:
        raise ValueError(f"each class of {name} needs at least three texts; {', '.join(rare)}")


def _check_sizes(name: str, size: int, validation: int, labels: int | None) -> None:
    if not 1 <= validation < size:
        raise ValueError(
            f"validation must lie in [1, {size - 1}], for {size} training examples of {name}, got {validation}"
        )
    if labels is not None and not 1 <= labels <= size - validation:
        raise ValueError(
            f"labels, the number of labelled training examples, must lie in [1, {size - validation}], as {name} keeps"
            f" {validation} for validation, got {labels}; None is all"
        )
