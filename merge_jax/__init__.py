"""merge_jax moves knowledge between neural networks that share nothing but numbers.

MergeNet (arXiv:2404.13322) as pure functions over parameter pytrees. Each name is imported when it is first used, so
that `import merge_jax` alone is quick and does not import JAX.
"""

from typing import Any

from etils import epy

from merge_jax.deprecated import NEW_NAMES, find_old_name

with epy.lazy_api_imports(globals()):
    from merge_jax import checkpoints, data, layouts, models, objectives, paths, runs, study, training, transfers
    from merge_jax.checkpoints import CheckpointError, Checkpoints, load_params, load_safetensors, save_safetensors
    from merge_jax.layouts import MatrixSpec
    from merge_jax.objectives import (
        accuracy,
        classification_loss,
        cross_entropy,
        distillation_loss,
        evaluate_classifier,
        feature_agreement,
        features_teacher,
        logits_teacher,
        model_loss,
        on_pixels,
        sum_losses,
    )
    from merge_jax.paths import flatten, replace, select
    from merge_jax.training import (
        JointState,
        NumericFaultError,
        StopSignals,
        Task,
        TrainState,
        TransferSteps,
        adapter_adamw,
        augmented,
        bake,
        data_mesh,
        init_joint_state,
        jit_layout,
        load_trajectory,
        make_epoch,
        make_joint_step,
        make_reparameterised_step,
        replayed,
        run_loop,
        stepwise,
    )
    from merge_jax.transfers import (
        LPKA,
        Route,
        Rows,
        Transfer,
        adapter_transfer,
        aligned_transfer,
        chain,
        channel_graph,
        identity_transfer,
        input_moments,
        linear_operator_transfer,
        lpka_transfer,
        match,
        mlp_transfer,
        optimal_transport_transfer,
        parameter_generator_transfer,
        published_transfer,
        refit,
        scheduled,
        self_transfer,
        several_sources,
        share_transfer,
        summarize,
        weight_selection_transfer,
        without_source,
    )
    from merge_jax.types import Batch, LossFn, Params

__all__ = [
    "LPKA",
    "Batch",
    "CheckpointError",
    "Checkpoints",
    "JointState",
    "LossFn",
    "MatrixSpec",
    "NumericFaultError",
    "Params",
    "Route",
    "Rows",
    "StopSignals",
    "Task",
    "TrainState",
    "Transfer",
    "TransferSteps",
    "accuracy",
    "adapter_adamw",
    "adapter_transfer",
    "aligned_transfer",
    "augmented",
    "bake",
    "chain",
    "channel_graph",
    "checkpoints",
    "classification_loss",
    "cross_entropy",
    "data",
    "data_mesh",
    "distillation_loss",
    "evaluate_classifier",
    "feature_agreement",
    "features_teacher",
    "flatten",
    "identity_transfer",
    "init_joint_state",
    "input_moments",
    "jit_layout",
    "layouts",
    "linear_operator_transfer",
    "load_params",
    "load_safetensors",
    "load_trajectory",
    "logits_teacher",
    "lpka_transfer",
    "make_epoch",
    "make_joint_step",
    "make_reparameterised_step",
    "match",
    "mlp_transfer",
    "model_loss",
    "models",
    "objectives",
    "on_pixels",
    "optimal_transport_transfer",
    "parameter_generator_transfer",
    "paths",
    "published_transfer",
    "refit",
    "replace",
    "replayed",
    "run_loop",
    "runs",
    "save_safetensors",
    "scheduled",
    "select",
    "self_transfer",
    "several_sources",
    "share_transfer",
    "stepwise",
    "study",
    "sum_losses",
    "summarize",
    "training",
    "transfers",
    "weight_selection_transfer",
    "without_source",
]

_find_name = __getattr__  # type: ignore[name-defined]  # noqa: F821  # That of etils, which imports it.


def __getattr__(name: str) -> Any:
    return find_old_name(name) if name in NEW_NAMES else _find_name(name)
