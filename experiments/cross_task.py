"""Across tasks: what one model has learned of its task helps another with a task of other labels.

    python -m experiments.cross_task             # synthetic text: answering questions gives to sentiment
    python -m experiments.cross_task smoke       # seconds; shows that it works, not what it gains
    python -m experiments.cross_task reverse     # sentiment gives to answering questions
    python -m experiments.cross_task topic       # sentiment gives to topics
    python -m experiments.cross_task digits      # images: which digit gives to whether it is odd, and at least 5
    python -m experiments.cross_task cifar100    # images: 100 classes give to their 20 groups, small, for a CPU
    python -m experiments.cross_task paper       # BERT on SQuAD gives to DistilBERT on IMDb, for a GPU
    python -m experiments.cross_task --help

The models share no label, so nothing can be distilled; their parameters can be moved all the same. Each learns from
batches of its own. Text models give and receive in their attention blocks, matched by depth; --source-data and
--target-data take a set of TFDS or a file of one's own in the place of synthetic text.

Methods: vanilla (no transfer), share (the overlapping block of the source's layer is copied every few steps), and
mergenet with two output forms, residual and warm. What was measured stands in experiments/README.md.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import optax

import merge_jax as mj
from experiments.cli import main
from experiments.cross_structure import ROUTES
from experiments.images import ImageTaskName, ModelName, image_learner, sgd
from experiments.scenario import Learner, Method, Scenario, choose
from experiments.several import side_by_side
from experiments.texts import TextModelName, TextSource, TextTaskName, adamw, load_text, text_learner, vocabulary
from experiments.transfers import TransferConfig, parse_routes
from merge_jax.checks import check_choice
from merge_jax.data import num_examples
from merge_jax.transfer import OutputForm

MethodName = Literal["vanilla", "share", "mergenet_residual", "mergenet_warm"]
TaskName = TextTaskName | ImageTaskName

_BY_DEPTH = "by depth"


@dataclass(frozen=True, kw_only=True)
class Config(TransferConfig):
    """Options of the experiment."""

    methods: tuple[MethodName, ...] = get_args(MethodName)
    """Methods to compare."""
    source_task: tuple[TaskName, ...] = ("qa",)
    """What the source learns; several tasks are several sources, one model each."""
    target_task: TaskName = "sentiment"
    """What the target learns."""
    source_model: TextModelName | ModelName = "small_bert"
    """The network that gives."""
    target_model: TextModelName | ModelName = "small_distilbert"
    """The network that receives."""
    labels: int | None = 200
    """Training examples that the target learns from, or None for all; the source has all."""
    validation: int = 300
    """Training examples held out to validate on; digits always hold out 200."""
    source_data: str = "synthetic"
    """Text of the source: synthetic; tfds for SQuAD v2 (qa), IMDb (sentiment) or AG News (topic); the name of another
    set of TFDS; or a .tsv, .csv or .jsonl file, for qa one in the layout of SQuAD."""
    target_data: str = "synthetic"
    """Text of the target, as --source-data."""
    source_test_data: Path | None = None
    """File to test the source on, where --source-data is a file; a fifth of that by default."""
    target_test_data: Path | None = None
    """File to test the target on, as --source-test-data."""
    source_text: tuple[str, ...] = ("text",)
    """Columns (or features) of the source's text, by name, or by number from 0 in a file without a header."""
    target_text: tuple[str, ...] = ("text",)
    """Columns of the target's text."""
    source_label: str = "label"
    """Column of the source's label."""
    target_label: str = "label"
    """Column of the target's label."""
    data_dir: Path | None = None
    """Folder of TFDS; archives in its downloads/manual/ are used instead of a download."""
    max_length: int = 48
    """Tokens of a text, or of a question and its passage."""
    too_long: Literal["truncate", "error"] = "truncate"
    """What to do with longer ones: cut and count them, or refuse."""
    vocabulary: Path | None = None
    """BERT's vocab.txt or a tokenizer.json; by default one is learned from both models' training texts."""
    vocabulary_size: int = 1000
    """Tokens of a vocabulary that is learned."""
    source_weights: Path | None = None
    """Hugging Face safetensors file or folder that a text source starts from."""
    target_weights: Path | None = None
    """The same for a text target."""
    image_size: int | None = None
    """Height and width to scale images to; None for as they are."""
    stages: int = 3
    """Stages of small image networks, 1 to 3."""
    learning_rate: float = 1e-3
    """Learning rate of both models: of AdamW for text, of SGD for images."""
    routes: tuple[str, ...] = (_BY_DEPTH,)
    """Layers that take part, as target=source; "by depth" are all attention blocks of text models."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        super().check()
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not self.source_task:
            raise ValueError(f"source_task must name one or more of {', '.join(_TASKS)}")


_TEXT_TASKS, _IMAGE_TASKS = get_args(TextTaskName), get_args(ImageTaskName)
_TASKS = (*_TEXT_TASKS, *_IMAGE_TASKS)
_TEXT = Config(batch_size=32, source_steps=1500, steps=300, report_every=30, checkpoint_every=150, stop=0.2)
_IMAGES = Config(
    source_task=("digits",),
    target_task="parity_and_size",
    source_model="small_resnet",
    target_model="small_mobilenet_v2",
    labels=100,
    learning_rate=0.1,
    routes=tuple(f"{target}={source}" for target, source in ROUTES.items()),
)

PRESETS = {
    "default": _TEXT,
    "smoke": replace(
        _IMAGES,
        seeds=1,
        stages=1,
        source_steps=200,
        steps=100,
        methods=("vanilla", "share", "mergenet_warm"),
        routes=("fc/kernel=fc/kernel",),
        cycle=1,
        stop=1.0,
        attention_dropout=0.0,
        feed_forward_dropout=0.0,
        report_every=25,
        checkpoint_every=100,
    ),
    "reverse": replace(_TEXT, source_task=("sentiment",), target_task="qa"),
    "topic": replace(_TEXT, source_task=("sentiment",), target_task="topic"),
    "digits": _IMAGES,
    "cifar100": replace(
        _IMAGES,
        seeds=3,
        source_task=("cifar100",),
        target_task="cifar100_coarse",
        source_model="resnet18_quarter",
        target_model="mobilenet_v2_half",
        image_size=16,
        labels=5000,
        validation=1000,
        batch_size=128,
        source_epochs=4,
        epochs=10,
        report_every=1,
        checkpoint_every=5,
        routes=(
            "stage2_0/expand/kernel=stage1_0/conv1/kernel",
            "stage3_0/expand/kernel=stage2_0/conv1/kernel",
            "stage5_0/expand/kernel=stage3_0/conv1/kernel",
            "head/kernel=stage4_1/conv2/kernel",
        ),
    ),
    "paper": replace(
        _TEXT,
        seeds=3,
        source="live",
        source_data="tfds",
        target_data="tfds",
        source_model="bert_base",
        target_model="distilbert_base",
        labels=None,
        validation=2000,
        max_length=384,
        epochs=3,
        report_every=1,
        checkpoint_every=1,
        learning_rate=5e-5,
        adapter_learning_rate=1e-3,
        num_layers=2,
    ),
}


def build(config: Config) -> Scenario:
    """Returns the scenario: both models, their data and the methods.

    Raises:
      ValueError: data that cannot be had, an unknown model or method, or an option that a method refuses.
    """
    sources, target = _learners(config)
    source = sources[config.source_task[0]] if len(sources) == 1 else side_by_side(sources)
    lengths = [num_examples(learner.role.splits(0).train) for learner in (source, target)]
    schedule = config.schedule(*lengths)
    source_steps = (schedule.target if config.source == "live" else schedule.source).steps
    num_steps = schedule.target.steps
    plain = mj.Task(target.loss_fn, _optimizer(config, config.target_task, num_steps))

    def transfer(make: Any) -> mj.Transfer:
        by_source = {name: make(_routes(config, learner, target)) for name, learner in sources.items()}
        return by_source[config.source_task[0]] if len(by_source) == 1 else mj.several_sources(by_source)

    def lpka(output: OutputForm) -> mj.Transfer:
        return transfer(lambda routes: config.lpka(routes, num_steps, output=output))

    methods = {
        "vanilla": Method(plain),
        "share": Method(plain, transfer(mj.share_transfer), config.stop),
        "mergenet_residual": Method(plain, lpka("residual"), config.stop),
        "mergenet_warm": Method(plain, lpka("warm"), config.stop),
    }
    return Scenario(
        name="cross_task",
        source=source.role,
        target=target.role,
        source_task=mj.Task(source.loss_fn, _optimizer(config, config.source_task[0], source_steps)),
        methods=choose(methods, config.methods),
        schedule=schedule,
        adapter_optimizer=config.adapter_optimizer(schedule),
    )


def _learners(config: Config) -> tuple[dict[str, Learner], Learner]:
    """Returns the sources by task, and the target; text models have one vocabulary."""
    for task in (*config.source_task, config.target_task):
        check_choice("task", task, _TASKS)
    of_source = TextSource(config.source_data, config.source_test_data, config.source_text, config.source_label)
    of_target = TextSource(config.target_data, config.target_test_data, config.target_text, config.target_label)
    roles = [*(("source", task, of_source) for task in config.source_task), ("target", config.target_task, of_target)]
    texts = {
        (role, task): load_text(task, source, config.data_dir) for role, task, source in roles if task in _TEXT_TASKS
    }
    tokens = vocabulary(config.vocabulary, texts.values(), config.vocabulary_size) if texts else None

    def learner(role: str, task: str, model: str, labels: int | None, weights: Path | None) -> Learner:
        if task not in _TEXT_TASKS:
            return image_learner(
                task,
                model,
                data_dir=config.data_dir,
                image_size=config.image_size,
                validation=config.validation,
                labels=labels,
                stages=config.stages,
            )
        assert tokens is not None
        return text_learner(
            task,
            texts[role, task],
            tokens,
            model,
            max_length=config.max_length,
            too_long=config.too_long,
            validation=config.validation,
            labels=labels,
            weights=weights,
        )

    sources = {
        task: learner("source", task, config.source_model, None, config.source_weights) for task in config.source_task
    }
    target = learner("target", config.target_task, config.target_model, config.labels, config.target_weights)
    return sources, target


def _routes(config: Config, source: Learner, target: Learner) -> list[Any]:
    """Returns the routes from one source: all attention blocks by depth, or those that are given."""
    if config.routes != (_BY_DEPTH,):
        return list(parse_routes(config.routes))
    shapes = (jax.eval_shape(learner.role.init, jax.random.key(0))[0] for learner in (source, target))
    blocks = "encoder/*/attention"
    found = mj.match(*shapes, source=blocks, target=blocks, view="attention")
    return [mj.Route(target, source, view="attention") for target, source in found.items()]


def _optimizer(config: Config, task: str, steps: int) -> optax.GradientTransformation:
    if task in _TEXT_TASKS:
        return adamw(config.learning_rate, steps)
    return sgd(config.learning_rate, steps, "cosine")


if __name__ == "__main__":
    main(PRESETS, "experiments.cross_task", __doc__, build)
