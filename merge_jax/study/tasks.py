"""Tasks by name, of text and of images: the options that experiments on them have, and the models that learn them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from merge_jax.checks import check_choice
from merge_jax.study.choices import ImageModelName, ImageTaskName, TextModelName, TextTaskName, VisionModelName
from merge_jax.study.methods import TransferConfig

if TYPE_CHECKING:
    from merge_jax.data import WordPiece
    from merge_jax.study.scenario import Learner
    from merge_jax.study.texts import TextSource

__all__ = ["TASKS", "ModelName", "Spec", "TaskConfig", "TaskName"]

TaskName = TextTaskName | ImageTaskName
Attach = Callable[[Path], None]
ModelName = TextModelName | ImageModelName | VisionModelName

_VOCABULARY = "vocabulary.json"
_TEXT_TASKS = get_args(TextTaskName)
TASKS: tuple[str, ...] = (*_TEXT_TASKS, *get_args(ImageTaskName))


@dataclass(frozen=True)
class Spec:
    """A model and what it is to learn.

    Attributes:
      task: by name.
      model: by name.
      text: where the text of a text task comes from.
      weights: a Hugging Face safetensors file or folder that a text model starts from.
      labels: how many training examples it learns from; None for all.
      validation: how many training examples to hold out, where it is not the config's number.
      attributes: of a small transformer, such as layers and width, where they are not its usual ones.
      sizes: a Hugging Face safetensors file or folder, with its config.json, whose sizes a text model has.
    """

    task: str
    model: str
    text: TextSource
    weights: Path | None
    labels: int | None
    validation: int | None = None
    attributes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    sizes: Path | None = None


_SpecOrMore = TypeVar("_SpecOrMore", bound=Spec)


@dataclass(frozen=True, kw_only=True)
class TaskConfig(TransferConfig):
    """Options of experiments on tasks that are named."""

    labels: int | None = 200
    """Training examples that the target learns from, or None for all; a source has all."""
    validation: int = 300
    """Training examples held out to validate on; digits always hold out 200."""
    data_dir: Path | None = None
    """Folder of TFDS; archives in its downloads/manual/ are used instead of a download."""
    max_length: int = 40
    """Tokens of a text, or of a question and its passage."""
    too_long: Literal["truncate", "error"] = "truncate"
    """What to do with longer ones: cut and count them, or refuse."""
    vocabulary: Path | None = None
    """BERT's vocab.txt or a tokenizer.json; by default that of the run in --source-from, or one that is learned from
    the training texts of all models. A run keeps its own as vocabulary.json."""
    vocabulary_size: int = 1000
    """Tokens of a vocabulary that is learned."""
    image_size: int | None = None
    """Height and width to scale images to; None for as they are."""
    stages: int = 3
    """Stages of small image networks, 1 to 3."""
    learning_rate: float = 1e-3
    """Learning rate of the models: of AdamW for text, of SGD for images."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        super().check()
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 1 <= self.stages <= 3:
            raise ValueError(f"stages must lie in [1, 3], got {self.stages}")

    def learners(self, specs: Sequence[Spec]) -> tuple[list[Learner], Attach | None]:
        """Returns the models that are to learn, the target last, and what saves the one vocabulary of those of text.

        Raises:
          ValueError: an unknown task or model, data that cannot be had, or a vocabulary that is not the source's.
        """
        specs = [self._sized(spec, gives=number < len(specs) - 1) for number, spec in enumerate(specs)]
        for spec in specs:
            self.check_weights(spec)
        self._check_source(specs)
        texts = [self.load_texts(spec) for spec in specs]
        if all(one is None for one in texts):
            return [self.learner(spec, None, None) for spec in specs], None
        words = [word for one in texts if one is not None for word in self.words_of(one)]
        source_reads = any(one is not None for one in texts[:-1])
        tokens = self._tokens(words, [spec.weights for spec in specs], source_reads)
        learners = [self.learner(spec, one, tokens) for spec, one in zip(specs, texts, strict=True)]
        return learners, lambda folder: tokens.save(folder / _VOCABULARY)

    def _sized(self, spec: _SpecOrMore, *, gives: bool) -> _SpecOrMore:
        """Returns the spec of a text model with the file that tells its sizes, where there is one."""
        file = self.source_from if gives and spec.weights is None else spec.weights
        if spec.task not in _TEXT_TASKS or file is None:
            return spec
        folder = file if file.is_dir() else file.parent
        is_run = (folder / "checkpoints").is_dir()
        return spec if is_run or not (folder / "config.json").exists() else replace(spec, sizes=file)

    def check_weights(self, spec: Spec) -> None:
        """Raises ValueError for weights of another encoder, before data is read: their header is enough."""
        from merge_jax.study.texts import check_text_weights

        if spec.weights is not None and spec.task in _TEXT_TASKS:
            check_text_weights(spec.weights, spec.model, self.max_length, spec.attributes, spec.sizes)

    def _check_source(self, specs: Sequence[Spec]) -> None:
        """Does the same for a frozen source that is read from a file of Hugging Face."""
        from merge_jax.checkpoints.safetensors import leaf_paths

        path = self.source_from
        if self.source != "frozen" or path is None or not path.exists() or (path / "checkpoints").is_dir():
            return
        ours = any(leaf.startswith(("encoder/embeddings/", "params/")) for leaf in leaf_paths(path))
        if len(specs) == 2 and not ours:
            self.check_weights(replace(specs[0], weights=path))

    def load_texts(self, spec: Spec) -> Any | None:
        """Returns the data of a task that has text in it; None for one of images alone.

        Raises:
          ValueError: the task is unknown, or its data cannot be had.
        """
        from merge_jax.study.texts import load_text

        check_choice("task", spec.task, TASKS)
        return load_text(spec.task, spec.text, self.data_dir) if spec.task in _TEXT_TASKS else None

    def words_of(self, texts: Any) -> Iterable[str]:
        """Returns all texts there are to learn from in what `load_texts` gave."""
        from merge_jax.study.texts import words_of

        return words_of(texts)

    def learner(self, spec: Spec, texts: Any | None, tokens: WordPiece | None) -> Learner:
        """Returns a model that is to learn, from texts in these tokens, or from images alone.

        Raises:
          ValueError: the model is unknown, or does not fit its data.
        """
        from merge_jax.study.images import image_learner
        from merge_jax.study.texts import text_learner

        validation = self.validation if spec.validation is None else spec.validation
        if texts is None or tokens is None:
            return image_learner(
                spec.task,
                spec.model,
                data_dir=self.data_dir,
                image_size=self.image_size,
                validation=validation,
                labels=spec.labels,
                stages=self.stages,
                attributes=spec.attributes,
            )
        return text_learner(
            spec.task,
            texts,
            tokens,
            spec.model,
            max_length=self.max_length,
            too_long=self.too_long,
            validation=validation,
            labels=spec.labels,
            weights=spec.weights,
            attributes=spec.attributes,
            sizes=spec.sizes,
        )

    def _tokens(self, words: Iterable[str], weights: Sequence[Path | None], source_reads: bool) -> WordPiece:
        """Returns the vocabulary: the one that is named, the one that the source has, or one that is learned."""
        from merge_jax.data import WordPiece
        from merge_jax.study.texts import vocabulary

        source = self.source_from if source_reads else None
        of_source = None if source is None else source / _VOCABULARY
        # Weights mean nothing under other numbers of the same words, and would fit all the same.
        if of_source is None or not of_source.exists():
            files = [path for path in (source, *weights) if path is not None]
            if files and self.vocabulary is None:
                raise ValueError(f"the weights in {files[0]} need the vocabulary they were trained with: --vocabulary")
            return vocabulary(self.vocabulary, words, self.vocabulary_size)
        tokens = WordPiece.from_vocabulary(of_source)
        if self.vocabulary is not None and WordPiece.from_vocabulary(self.vocabulary).words != tokens.words:
            raise ValueError(f"the vocabulary {self.vocabulary} is not that of the source, {of_source}: leave it out")
        return tokens
