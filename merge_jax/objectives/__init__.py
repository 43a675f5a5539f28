"""Training objectives and scores: per-example losses, teachers, metrics."""

from etils import epy

with epy.lazy_api_imports(globals()):
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
    from merge_jax.objectives.features import (
        FeatureObjective,
        cka,
        disagreement,
        feature_agreement,
        features_teacher,
        mixed,
        with_features,
    )
    from merge_jax.objectives.losses import model_loss, sum_losses
    from merge_jax.objectives.redundancy import redundancy_suppression
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

__all__ = [
    "FeatureObjective",
    "accuracy",
    "answer_coverage",
    "answer_indices",
    "answer_vocabulary",
    "cka",
    "classification_loss",
    "contrastive_loss",
    "cross_entropy",
    "disagreement",
    "distillation_loss",
    "dkd_loss",
    "evaluate_classifier",
    "evaluate_retrieval",
    "evaluate_spans",
    "evaluate_vqa",
    "feature_agreement",
    "features_teacher",
    "logits_teacher",
    "mixed",
    "model_loss",
    "nkd_loss",
    "on_pixels",
    "predict_answers",
    "recall_at_k",
    "redundancy_suppression",
    "retrieval_loss",
    "retrieval_scores",
    "rkd_loss",
    "span_loss",
    "squad_scores",
    "sum_losses",
    "tf_kd_loss",
    "vqa_loss",
    "vqa_scores",
    "whole_batch",
    "with_features",
]
