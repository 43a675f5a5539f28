"""merge_jax moves knowledge between neural networks that share nothing but numbers.

MergeNet (arXiv:2404.13322) as pure functions over parameter pytrees. Each name is imported when it is first used, so
that `import merge_jax` alone is quick and does not import JAX.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from merge_jax import models
    from merge_jax.checkpoints.orbax import CheckpointError, Checkpoints, DamagedCheckpointWarning, NotBitExactWarning
    from merge_jax.checkpoints.safetensors import load_params, load_safetensors, save_safetensors
    from merge_jax.layouts import MatrixSpec, as_matrix, copy_overlap, from_matrix, matrix_spec
    from merge_jax.objectives.classification import (
        accuracy,
        classification_loss,
        evaluate_classifier,
        logits_teacher,
        on_pixels,
    )
    from merge_jax.objectives.device_axis import whole_batch
    from merge_jax.objectives.distillation import (
        cross_entropy,
        distillation_loss,
        dkd_loss,
        nkd_loss,
        rkd_loss,
        tf_kd_loss,
    )
    from merge_jax.objectives.features import cka, feature_agreement, features_teacher, mixed, with_features
    from merge_jax.objectives.model_loss import model_loss, sum_losses
    from merge_jax.objectives.retrieval import (
        contrastive_loss,
        evaluate_retrieval,
        recall_at_k,
        retrieval_loss,
        retrieval_scores,
    )
    from merge_jax.objectives.spans import evaluate_spans, span_loss, squad_scores
    from merge_jax.objectives.vqa import (
        answer_coverage,
        answer_indices,
        answer_vocabulary,
        evaluate_vqa,
        predict_answers,
        vqa_loss,
        vqa_scores,
    )
    from merge_jax.paths import find_paths, flatten, replace, select
    from merge_jax.training.distributed import connect
    from merge_jax.training.epoch import augmented, make_epoch
    from merge_jax.training.joint import (
        AdapterState,
        JointState,
        Task,
        TrainState,
        init_joint_state,
        make_joint_step,
    )
    from merge_jax.training.loop import run_loop, stepwise
    from merge_jax.training.nonfinite import NumericFaultError
    from merge_jax.training.optimizers import adapter_adamw
    from merge_jax.training.reparameterised import bake, make_reparameterised_step
    from merge_jax.training.schedule import TransferSteps
    from merge_jax.training.seeds import over_seeds, stack_seeds, unstack_seeds
    from merge_jax.training.sharding import DATA_AXIS, Layout, data_mesh, jit_layout, pmap_layout, state_shardings
    from merge_jax.training.signals import StopSignals
    from merge_jax.training.trajectory import Trajectory, last_of, load_trajectory, replay_evenly, replayed
    from merge_jax.transfers.adapter import adapter_transfer
    from merge_jax.transfers.aligned import aligned_transfer
    from merge_jax.transfers.base import RouteSummary, Transfer, identity_transfer
    from merge_jax.transfers.channel_axes import ChannelGraph
    from merge_jax.transfers.channels import channel_graph, input_moments
    from merge_jax.transfers.combinators import chain, scheduled, self_transfer, several_sources, without_source
    from merge_jax.transfers.describe import summarize
    from merge_jax.transfers.linear_operators import linear_operator_transfer
    from merge_jax.transfers.low_rank import LowRankConv, LowRankDense, decode, encode, row_basis
    from merge_jax.transfers.lpka import LPKA, LPKAOptions, lpka_network
    from merge_jax.transfers.matching import match
    from merge_jax.transfers.mergenet import lpka_transfer, published_transfer
    from merge_jax.transfers.mixing import mlp_transfer
    from merge_jax.transfers.optimal_transport import optimal_transport_transfer
    from merge_jax.transfers.parameter_generator import parameter_generator_transfer
    from merge_jax.transfers.published import PublishedAdapter, export_published_adapter, load_published_adapter
    from merge_jax.transfers.routes import Route
    from merge_jax.transfers.rows import Rows
    from merge_jax.transfers.sharing import share_transfer
    from merge_jax.transfers.weight_selection import weight_selection_transfer
    from merge_jax.types import Adapter, Batch, LossFn, Params

__all__ = [
    "DATA_AXIS",
    "LPKA",
    "Adapter",
    "AdapterState",
    "Batch",
    "ChannelGraph",
    "CheckpointError",
    "Checkpoints",
    "DamagedCheckpointWarning",
    "JointState",
    "LPKAOptions",
    "Layout",
    "LossFn",
    "LowRankConv",
    "LowRankDense",
    "MatrixSpec",
    "NotBitExactWarning",
    "NumericFaultError",
    "Params",
    "PublishedAdapter",
    "Route",
    "RouteSummary",
    "Rows",
    "StopSignals",
    "Task",
    "TrainState",
    "Trajectory",
    "Transfer",
    "TransferSteps",
    "accuracy",
    "adapter_adamw",
    "adapter_transfer",
    "aligned_transfer",
    "answer_coverage",
    "answer_indices",
    "answer_vocabulary",
    "as_matrix",
    "augmented",
    "bake",
    "chain",
    "channel_graph",
    "cka",
    "classification_loss",
    "connect",
    "contrastive_loss",
    "copy_overlap",
    "cross_entropy",
    "data_mesh",
    "decode",
    "distillation_loss",
    "dkd_loss",
    "encode",
    "evaluate_classifier",
    "evaluate_retrieval",
    "evaluate_spans",
    "evaluate_vqa",
    "export_published_adapter",
    "feature_agreement",
    "features_teacher",
    "find_paths",
    "flatten",
    "from_matrix",
    "identity_transfer",
    "init_joint_state",
    "input_moments",
    "jit_layout",
    "last_of",
    "linear_operator_transfer",
    "load_params",
    "load_published_adapter",
    "load_safetensors",
    "load_trajectory",
    "logits_teacher",
    "lpka_network",
    "lpka_transfer",
    "make_epoch",
    "make_joint_step",
    "make_reparameterised_step",
    "match",
    "matrix_spec",
    "mixed",
    "mlp_transfer",
    "model_loss",
    "models",
    "nkd_loss",
    "on_pixels",
    "optimal_transport_transfer",
    "over_seeds",
    "parameter_generator_transfer",
    "pmap_layout",
    "predict_answers",
    "published_transfer",
    "recall_at_k",
    "replace",
    "replay_evenly",
    "replayed",
    "retrieval_loss",
    "retrieval_scores",
    "rkd_loss",
    "row_basis",
    "run_loop",
    "save_safetensors",
    "scheduled",
    "select",
    "self_transfer",
    "several_sources",
    "share_transfer",
    "span_loss",
    "squad_scores",
    "stack_seeds",
    "state_shardings",
    "stepwise",
    "sum_losses",
    "summarize",
    "tf_kd_loss",
    "unstack_seeds",
    "vqa_loss",
    "vqa_scores",
    "weight_selection_transfer",
    "whole_batch",
    "with_features",
    "without_source",
]
