"""What stands beside a method's result: its target right after the write, a probe of it, and opponents without it."""

from collections.abc import Callable

import jax
import numpy as np

from merge_jax.study.probes import Observe, Observed, Sample, inputs_lr, observer, probe, sampled
from merge_jax.study.scenario import Scenario, StudyModel
from merge_jax.study.sources import SourcePlan
from merge_jax.training.joint import TrainState

__all__ = ["Measure", "Opponents", "make_measure", "make_opponents"]

Measure = Callable[[TrainState, int], dict[str, float | None]]
"""`(target, seed) -> {"test", "probe"}`, both read on the test split."""

Opponents = Callable[[TrainState, int], dict[str, float]]
"""`(source, seed) -> test accuracy by opponent`."""


def make_measure(model: StudyModel) -> Measure:
    """Returns what measures a target as it stands, statistics of BatchNorm included.

    `test` is the metric that it is judged by; `probe` the accuracy of a logistic regression on its features, fitted to
    the labelled training examples (see `probe`). None is a probe of what is no classifier, or sows no `features`.
    """
    observe = observer(model, model.splits(0).test)

    def measure(target: TrainState, seed: int) -> dict[str, float | None]:
        splits = model.splits(seed)
        state = _on_host(target)
        if state is None:
            return {"test": None, "probe": None}
        sample = sampled(model, splits, seed)
        if observe is None or sample is None:
            return {"test": model.evaluate(state.params, state.model_state, splits.test)[model.metric], "probe": None}
        labels, (fitted, test) = _labels(sample), _observed(observe, state, sample)
        return {"test": test.accuracy(labels[1]), "probe": probe(fitted.features, labels[0], test.features, labels[1])}

    return measure


def make_opponents(scenario: Scenario, source_plan: SourcePlan) -> Opponents:
    """Returns what a doubter would put beside a classifier, with the same labelled examples and nothing trained.

    `inputs_lr` is a logistic regression on its raw inputs, `source_lr` one on the source's features of these inputs,
    and `source` the source itself, where its labels are the target's. Those of a source are there where it can read the
    inputs, and is trained before the target.
    """
    target, source = scenario.target, scenario.source
    observe = None if source is None or source_plan.live else observer(source, target.splits(0).test)

    def opponents(state: TrainState, seed: int) -> dict[str, float]:
        sample = sampled(target, target.splits(seed), seed)
        if sample is None:
            return {}
        found = {"inputs_lr": inputs_lr(target, sample)}
        if source_plan.snapshots is not None:
            state = jax.tree.map(lambda leaf: leaf[-1], state)
        given = None if observe is None else _on_host(state)
        if observe is not None and source is not None and given is not None:
            labels, (fitted, test) = _labels(sample), _observed(observe, given, sample)
            found["source_lr"] = probe(fitted.features, labels[0], test.features, labels[1])
            own = source.splits(seed).test
            if "label" in own and np.array_equal(np.asarray(own["label"]), labels[1]):
                found["source"] = test.accuracy(labels[1])
        return {name: accuracy for name, accuracy in found.items() if accuracy is not None}

    return opponents


def _labels(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(sample.fitted["label"]), np.asarray(sample.test["label"])


def _observed(observe: Observe, state: TrainState, sample: Sample) -> list[Observed]:
    return [observe(state.params, state.model_state, arrays) for arrays in sample]


def _on_host(state: TrainState) -> TrainState | None:
    """Returns a model where it is compiled for once, wherever it was; None where no process has all of it."""
    state = state.replace(opt_state=None)
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    if all(array.is_fully_addressable or array.is_fully_replicated for array in arrays):
        return jax.device_get(state)
    return None
