"""Distillation objectives of a scenario: from another classifier's outputs, or without a teacher."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax

import merge_jax as mj
from merge_jax.study.methods import Objective
from merge_jax.study.models.model import StudyModel, pool_inputs
from merge_jax.types import Batch, ModelState, Params

__all__ = ["distillation_objectives", "tf_kd_objective"]


def distillation_objectives(
    source: StudyModel,
    target: StudyModel,
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
    axis_name: str | None = None,
) -> dict[str, Objective]:
    """Returns `kd`, `kd_mixed`, `rkd`, `dkd` and `nkd` for two single-input classifiers with the same classes.

    Each adds its loss to the labels' cross entropy; see `distillation_loss` and its relatives. `kd_mixed` compares
    logits on means of neighbouring examples (`mixed`), and learns labels from the unmixed examples. Options of `rkd`,
    `dkd` and `nkd` are those of their papers. If the target has a pool of unlabelled inputs, `kd` and `kd_mixed`
    compare logits on it; the others use labelled examples.

    Args:
      source: the teacher.
      target: the student.
      temperature: the temperature of `kd` and `kd_mixed`.
      weight: the distillation's weight in these two; the labels get the rest.
      axis_name: the axis of the devices that share a batch, if any.

    Raises:
      ValueError: a model without `apply`, or with several inputs.
    """
    teach, learn = source.apply, target.apply
    if teach is None or learn is None or not len(source.inputs) == len(target.inputs) == 1:
        raise ValueError(f"distillation needs two models of one input with `apply`: {source.name} and {target.name}")
    (teacher_input,), (student_input,) = source.inputs, target.inputs
    classification_loss = partial(mj.classification_loss, learn, inputs=student_input)
    show_logits = mj.logits_teacher(teach, inputs=teacher_input)

    def kd(logits: jax.Array, batch: Batch) -> jax.Array:
        label = batch["label"]
        return mj.distillation_loss(logits, batch["teacher_logits"], label, temperature=temperature, weight=weight)

    def dkd(logits: jax.Array, batch: Batch) -> jax.Array:
        label = batch["label"]
        return mj.cross_entropy(logits, label) + mj.objectives.dkd_loss(logits, batch["teacher_logits"], label)

    def nkd(logits: jax.Array, batch: Batch) -> jax.Array:
        label = batch["label"]
        return mj.cross_entropy(logits, label) + mj.objectives.nkd_loss(logits, batch["teacher_logits"], label)

    def rkd(outputs: tuple[jax.Array, tuple[jax.Array]], batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, (features,) = outputs
        features, teacher_features = mj.objectives.whole_batch((features, *batch["source_features"]), axis_name)
        losses = mj.cross_entropy(logits, batch["label"]) + mj.objectives.rkd_loss(features, teacher_features)
        return losses, {"accuracy": mj.accuracy(logits, batch["label"])}

    rkd_loss = mj.model_loss(
        mj.objectives.with_features(learn), (student_input,), rkd, needs=("label", "source_features")
    )

    def labels_alone(logits: jax.Array, batch: Batch) -> jax.Array:
        return (1 - weight) * mj.cross_entropy(logits, batch["label"])

    def matched(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        label = batch["label"]
        losses = mj.distillation_loss(logits, batch["mixed_logits"], label, temperature=temperature, weight=1.0)
        return weight * losses, {}

    (compared,), pooled = pool_inputs(target), target.pool is not None
    (shown_input,) = pool_inputs(replace(source, pool=target.pool))
    matched_loss = mj.model_loss(learn, (compared,), matched, needs=("label", "mixed_logits"))
    show_compared_logits = mj.logits_teacher(teach, inputs=shown_input)

    labelled = partial(Objective, each_alone=True)

    def on_compared(change: Callable[[jax.Array], jax.Array] | None) -> Objective:
        def changed(batch: Batch, entry: str) -> Batch:
            return batch if change is None else {**batch, entry: change(batch[entry])}

        def loss(params: Params, model_state: ModelState, batch: Batch, key: jax.Array):
            return matched_loss(params, model_state, changed(batch, compared), key)

        def show(params: Params, model_state: ModelState, batch: Batch) -> Batch:
            shown = show_compared_logits(params, model_state, changed(batch, shown_input))
            return {**batch, "mixed_logits": shown["teacher_logits"]}

        return Objective(mj.sum_losses(classification_loss(labels_alone), loss), show, pooled, change is None)

    return {
        "kd": on_compared(None) if pooled else labelled(classification_loss(kd), show_logits),
        "kd_mixed": on_compared(partial(mj.objectives.mixed, axis_name=axis_name)),
        "rkd": labelled(rkd_loss, mj.features_teacher(teach, ("features",), inputs=source.inputs)),
        "dkd": labelled(classification_loss(dkd), show_logits),
        "nkd": labelled(classification_loss(nkd), show_logits),
    }


def tf_kd_objective(model: StudyModel) -> Objective:
    """Returns teacher-free distillation of a single-input classifier; see `tf_kd_loss`."""
    if model.apply is None:
        raise ValueError(f"tf_kd needs a model with `apply`, which {model.name} does not have")
    (entry,) = model.inputs

    def tf_kd(logits: jax.Array, batch: Batch) -> jax.Array:
        return mj.objectives.tf_kd_loss(logits, batch["label"])

    return Objective(mj.classification_loss(model.apply, tf_kd, inputs=entry))
