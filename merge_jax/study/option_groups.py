"""Groups a scenario's options for `--help`. The config itself stays flat."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro

__all__ = ["GROUPS", "parse_grouped"]

_Options = TypeVar("_Options")

GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "common": (
        "The options that you change first.",
        ("methods", "seeds", "first_seed", "steps", "labels", "data", "source", "source_from", "source_control",
         "run_dir", "resume"),
    ),
    "source": (
        "The source network and its training.",
        ("source_model", "source_heads", "source_task", "source_steps", "source_epochs", "source_learning_rate",
         "snapshots", "source_weights", "source_text_weights", "source_vision_weights", "fit_source_head"),
    ),
    "target": (
        "The target network and its training.",
        ("target_model", "model", "target_task", "task", "epochs", "batch_size", "learning_rate",
         "target_learning_rate", "target_rate", "learning_rate_schedule", "momentum", "head_first", "head_penalty",
         "head_floor", "target_weights", "target_text_weights", "target_vision_weights", "weights", "pooler", "stages",
         "dtype"),
    ),
    "transfer": (
        "What is transferred and when; the adapters.",
        ("routes", "direction", "cycle", "stop", "update", "prepare_steps", "prepare_rate", "adapter_routes",
         "adapter_learning_rate", "adapter_schedule", "num_layers", "num_heads", "capped", "attention_dropout",
         "feed_forward_dropout"),
    ),
    "objective": (
        "What the target learns from the source, besides its labels.",
        ("agree", "agreement", "compare_on", "temperature", "distillation_weight", "unlabelled"),
    ),
    "data": (
        "Training and test data of both networks.",
        ("target_data", "source_data", "test_data", "target_test_data", "source_test_data", "text", "target_text",
         "source_text", "label", "target_label", "source_label", "data_dir", "validation", "source_validation",
         "image_size", "augment", "max_length", "too_long", "vocabulary", "vocabulary_size", "num_shapes",
         "num_answers", "uncovered", "unreadable"),
    ),
    "output": (
        "Reports, checkpoints, compiled programs.",
        ("opponents", "report_every", "checkpoint_every", "compilation_cache"),
    ),
    "device": (
        "Multiple devices and processes.",
        ("devices", "parallel", "shard_state", "hosts", "coordinator", "num_processes", "process_id"),
    ),
}  # fmt: skip
"""By name, what a group holds and its options in their order. What stands in none is of the group `scenario`."""


def parse_grouped(preset: _Options, arguments: Sequence[str], prog: str, description: str) -> _Options:
    """Returns the preset, changed by the options of a command line.

    Raises:
      SystemExit: an unknown or malformed option (tyro prints it, with near misses), or `--help`.
    """
    kind: Any = type(preset)
    fields = {field.name: getattr(preset, field.name) for field in dataclasses.fields(kind) if field.init}
    hints, texts = get_type_hints(kind, include_extras=True), _texts(kind)
    groups = [(name, text, [one for one in members if one in fields]) for name, (text, members) in GROUPS.items()]
    grouped = {one for *_, members in groups for one in members}
    groups.insert(1, ("scenario", "Options of this scenario only.", [one for one in fields if one not in grouped]))

    def option(name: str) -> tuple[str, Any, Any]:
        shown = tyro.conf.arg(prefix_name=False, help=texts.get(name))  # --steps, not --common.steps.
        return name, Annotated[hints[name], shown], dataclasses.field(default=fields[name])

    parts = []
    for name, text, members in groups:
        if members:
            part = dataclasses.make_dataclass(name, map(option, members))
            parts.append((name, Annotated[part, tyro.conf.arg(help=text)], dataclasses.field(default_factory=part)))
    command = dataclasses.make_dataclass("Options", parts)
    chosen = tyro.cli(command, args=arguments, prog=prog, description=description)
    given = {key: value for name, *_ in parts for key, value in vars(getattr(chosen, name)).items()}
    return dataclasses.replace(preset, **given)  # pyright: ignore[reportArgumentType]


def _texts(kind: type) -> dict[str, str]:
    """Returns each dataclass field's docstring on one line; a class's own overrides its parents'."""
    texts = {}
    for parent in reversed(kind.__mro__):
        if dataclasses.is_dataclass(parent):
            for field in docstring_parser.parse_from_object(parent).params:
                texts[field.arg_name] = " ".join(inspect.cleandoc(field.description or "").split())
    return texts
