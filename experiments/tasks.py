"""Tasks by name, of text and of images: the options that experiments on them have, and the models that learn them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import optax

from experiments.images import ImageTaskName, image_learner, sgd
from experiments.images import ModelName as ImageModelName
from experiments.scenario import Learner
from experiments.texts import TextModelName, TextSource, TextTaskName, adamw, load_text, text_learner, vocabulary
from experiments.transfers import TransferConfig
from merge_jax.checks import check_choice
from merge_jax.data import QuestionSet, TextSet, WordPiece

__all__ = ["TASKS", "ModelName", "Spec", "TaskConfig", "TaskName"]

TaskName = TextTaskName | ImageTaskName
Attach = Callable[[Path], None]
ModelName = TextModelName | ImageModelName

_VOCABULARY = "vocabulary.json"
_TEXT_TASKS = get_args(TextTaskName)
TASKS: tuple[str, ...] = (*_TEXT_TASKS, *get_args(ImageTaskName))


class Spec(NamedTuple):
    """A model and what it is to learn.

    Attributes:
      task: by name.
      model: by name.
      text: where the text of a text task comes from.
      weights: a Hugging Face safetensors file or folder that a text model starts from.
      labels: how many training examples it learns from; None for all.
    """

    task: str
    model: str
    text: TextSource
    weights: Path | None
    labels: int | None


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
        """Returns the models that are to learn, and what saves their vocabulary; those of text have one for all.

        Raises:
          ValueError: an unknown task or model, data that cannot be had, or a vocabulary that is not the source's.
        """
        for spec in specs:
            check_choice("task", spec.task, TASKS)
        texts = {
            i: load_text(spec.task, spec.text, self.data_dir)
            for i, spec in enumerate(specs)
            if spec.task in _TEXT_TASKS
        }
        tokens = self._tokens(list(texts.values()), [spec.weights for spec in specs]) if texts else None

        def learner(i: int, spec: Spec) -> Learner:
            if tokens is None or i not in texts:
                return image_learner(
                    spec.task,
                    spec.model,
                    data_dir=self.data_dir,
                    image_size=self.image_size,
                    validation=self.validation,
                    labels=spec.labels,
                    stages=self.stages,
                )
            return text_learner(
                spec.task,
                texts[i],
                tokens,
                spec.model,
                max_length=self.max_length,
                too_long=self.too_long,
                validation=self.validation,
                labels=spec.labels,
                weights=spec.weights,
            )

        attach = None if tokens is None else (lambda folder: tokens.save(folder / _VOCABULARY))
        return [learner(i, spec) for i, spec in enumerate(specs)], attach

    def _tokens(self, texts: Sequence[TextSet | QuestionSet], weights: Sequence[Path | None]) -> WordPiece:
        """Returns the vocabulary: the one that is named, the one that the source has, or one that is learned."""
        of_source = None if self.source_from is None else self.source_from / _VOCABULARY
        # Weights mean nothing under other numbers of the same words, and would fit all the same.
        if of_source is None or not of_source.exists():
            files = [path for path in (self.source_from, *weights) if path is not None]
            if files and self.vocabulary is None:
                raise ValueError(f"the weights in {files[0]} need the vocabulary they were trained with: --vocabulary")
            return vocabulary(self.vocabulary, texts, self.vocabulary_size)
        tokens = WordPiece.from_vocabulary(of_source)
        if self.vocabulary is not None and WordPiece.from_vocabulary(self.vocabulary).words != tokens.words:
            raise ValueError(f"the vocabulary {self.vocabulary} is not that of the source, {of_source}: leave it out")
        return tokens

    def optimizer(self, task: str, steps: int) -> optax.GradientTransformation:
        """Returns the optimizer of a model that learns a task for so many steps."""
        if task in _TEXT_TASKS:
            return adamw(self.learning_rate, steps)
        return sgd(self.learning_rate, steps, "cosine")
