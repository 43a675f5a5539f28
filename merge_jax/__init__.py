"""merge_jax moves knowledge between neural networks that share nothing but numbers.

MergeNet (arXiv:2404.13322) as pure functions over parameter pytrees.
"""

from merge_jax import models
from merge_jax.checkpoint import Checkpoints
from merge_jax.joint import (
    AdapterState,
    JointState,
    Task,
    TrainState,
    adapter_adamw,
    init_joint_state,
    make_joint_step,
)
from merge_jax.loop import run_loop
from merge_jax.losses import cross_entropy, distillation_loss
from merge_jax.lpka import LPKA, GatedLPKA
from merge_jax.matrices import MatrixSpec, as_matrix, copy_overlap, from_matrix, matrix_spec
from merge_jax.metrics import accuracy, top_k_accuracy
from merge_jax.official import OfficialAdapter, load_official_adapter
from merge_jax.paths import flatten, replace, select
from merge_jax.tasks import classification_loss, evaluate_classifier, logits_teacher
from merge_jax.transfer import Route, identity_transfer, lpka_transfer, share_transfer
from merge_jax.types import Batch, LossFn, Transfer

__all__ = [
    "LPKA",
    "AdapterState",
    "Batch",
    "Checkpoints",
    "GatedLPKA",
    "JointState",
    "LossFn",
    "MatrixSpec",
    "OfficialAdapter",
    "Route",
    "Task",
    "TrainState",
    "Transfer",
    "accuracy",
    "adapter_adamw",
    "as_matrix",
    "classification_loss",
    "copy_overlap",
    "cross_entropy",
    "distillation_loss",
    "evaluate_classifier",
    "flatten",
    "from_matrix",
    "identity_transfer",
    "init_joint_state",
    "load_official_adapter",
    "logits_teacher",
    "lpka_transfer",
    "make_joint_step",
    "matrix_spec",
    "models",
    "replace",
    "run_loop",
    "select",
    "share_transfer",
    "top_k_accuracy",
]
