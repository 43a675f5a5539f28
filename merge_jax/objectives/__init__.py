"""What a model learns and how it is scored: losses of examples, teachers, metrics."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from merge_jax.objectives.classification import (
        Outputs,
        classification_loss,
        evaluate_classifier,
        logits_teacher,
        model_loss,
        on_pixels,
        with_features,
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
    from merge_jax.objectives.features import agreeing, cka, features_teacher, mixed
    from merge_jax.objectives.metrics import accuracy, top_k_accuracy
    from merge_jax.objectives.retrieval import (
        contrastive_loss,
        evaluate_retrieval,
        recall_at_k,
        retrieval_loss,
        retrieval_scores,
    )
    from merge_jax.objectives.spans import evaluate_spans, span_loss
    from merge_jax.objectives.squad import squad_scores
    from merge_jax.objectives.vqa import evaluate_vqa, predict_answers, vqa_loss
    from merge_jax.objectives.vqa_score import answer_coverage, answer_indices, answer_vocabulary, vqa_scores

__all__ = [
    "Outputs",
    "accuracy",
    "agreeing",
    "answer_coverage",
    "answer_indices",
    "answer_vocabulary",
    "cka",
    "classification_loss",
    "contrastive_loss",
    "cross_entropy",
    "distillation_loss",
    "dkd_loss",
    "evaluate_classifier",
    "evaluate_retrieval",
    "evaluate_spans",
    "evaluate_vqa",
    "features_teacher",
    "logits_teacher",
    "mixed",
    "model_loss",
    "nkd_loss",
    "on_pixels",
    "predict_answers",
    "recall_at_k",
    "retrieval_loss",
    "retrieval_scores",
    "rkd_loss",
    "span_loss",
    "squad_scores",
    "tf_kd_loss",
    "top_k_accuracy",
    "vqa_loss",
    "vqa_scores",
    "whole_batch",
    "with_features",
]
