"""Names of version 0.1 that moved into a package or have another name; they go with version 0.3."""

import importlib
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["NEW_NAMES", "find_old_name", "new_choice", "warn_renamed"]

NEW_NAMES = {
    "Adapter": "merge_jax.types.Adapter",
    "AdapterState": "merge_jax.training.AdapterState",
    "AlignedTransfer": "merge_jax.Transfer",
    "DATA_AXIS": "merge_jax.training.DATA_AXIS",
    "DamagedCheckpointWarning": "merge_jax.checkpoints.DamagedCheckpointWarning",
    "LPKAOptions": "merge_jax.transfers.LPKAOptions",
    "Layout": "merge_jax.training.Layout",
    "LowRankConv": "merge_jax.transfers.LowRankConv",
    "LowRankDense": "merge_jax.transfers.LowRankDense",
    "NotBitExactWarning": "merge_jax.checkpoints.NotBitExactWarning",
    "OfficialAdapter": "merge_jax.transfers.PublishedAdapter",
    "RouteSummary": "merge_jax.transfers.RouteSummary",
    "Trajectory": "merge_jax.training.Trajectory",
    "Wiring": "merge_jax.transfers.ChannelGraph",
    "answer_coverage": "merge_jax.objectives.answer_coverage",
    "answer_indices": "merge_jax.objectives.answer_indices",
    "answer_vocabulary": "merge_jax.objectives.answer_vocabulary",
    "as_matrix": "merge_jax.layouts.as_matrix",
    "cka": "merge_jax.objectives.cka",
    "connect": "merge_jax.training.connect",
    "contrastive_loss": "merge_jax.objectives.contrastive_loss",
    "copy_overlap": "merge_jax.layouts.copy_overlap",
    "decode": "merge_jax.transfers.decode",
    "dkd_loss": "merge_jax.objectives.dkd_loss",
    "encode": "merge_jax.transfers.encode",
    "evaluate_retrieval": "merge_jax.objectives.evaluate_retrieval",
    "evaluate_spans": "merge_jax.objectives.evaluate_spans",
    "evaluate_vqa": "merge_jax.objectives.evaluate_vqa",
    "export_official_adapter": "merge_jax.transfers.export_published_adapter",
    "find_paths": "merge_jax.paths.find_paths",
    "from_matrix": "merge_jax.layouts.from_matrix",
    "last_of": "merge_jax.training.last_of",
    "load_official_adapter": "merge_jax.transfers.load_published_adapter",
    "lpka_network": "merge_jax.transfers.lpka_network",
    "matrix_spec": "merge_jax.layouts.matrix_spec",
    "mixed": "merge_jax.objectives.mixed",
    "nkd_loss": "merge_jax.objectives.nkd_loss",
    "over_seeds": "merge_jax.training.over_seeds",
    "pmap_layout": "merge_jax.training.pmap_layout",
    "predict_answers": "merge_jax.objectives.predict_answers",
    "recall_at_k": "merge_jax.objectives.recall_at_k",
    "replay_evenly": "merge_jax.training.replay_evenly",
    "retrieval_loss": "merge_jax.objectives.retrieval_loss",
    "retrieval_scores": "merge_jax.objectives.retrieval_scores",
    "rkd_loss": "merge_jax.objectives.rkd_loss",
    "row_basis": "merge_jax.transfers.row_basis",
    "span_loss": "merge_jax.objectives.span_loss",
    "squad_scores": "merge_jax.objectives.squad_scores",
    "stack_seeds": "merge_jax.training.stack_seeds",
    "state_shardings": "merge_jax.training.state_shardings",
    "tf_kd_loss": "merge_jax.objectives.tf_kd_loss",
    "unstack_seeds": "merge_jax.training.unstack_seeds",
    "vqa_loss": "merge_jax.objectives.vqa_loss",
    "vqa_scores": "merge_jax.objectives.vqa_scores",
    "whole_batch": "merge_jax.objectives.whole_batch",
    "wiring": "merge_jax.channel_graph",
}


def find_old_name(name: str) -> Any:
    """Returns what `merge_jax.<name>`, one of `NEW_NAMES`, was in version 0.1, and warns that it has a new name."""
    warn_renamed(f"merge_jax.{name}", NEW_NAMES[name])
    module, _, attribute = NEW_NAMES[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def new_choice(option: str, value: str, new_values: Mapping[str, str]) -> str:
    """Returns what a value of an option is called now, with a warning where that is another word."""
    if value not in new_values:
        return value
    warn_renamed(f"{option}={value!r}", f"{option}={new_values[value]!r}")
    return new_values[value]


def warn_renamed(old: str, new: str) -> None:
    """Warns, at the line of the caller outside of this library, where an old name is used."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "merge_jax":
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{old} is now {new}; the old name will be removed in version 0.3", DeprecationWarning, level)
