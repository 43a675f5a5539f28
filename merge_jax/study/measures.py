"""What stands beside a method's result: its target right after the write, a probe of it, and opponents without it."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from merge_jax.study.model import StudyModel
from merge_jax.study.probes import Observe, Sample, inputs_lr, observer, probe, reset_to_inputs, sampled
from merge_jax.study.scenario import Scenario
from merge_jax.study.sources import SourcePlan
from merge_jax.training.joint import TrainState

__all__ = ["Measures", "Opponents", "make_measures", "make_opponents"]


class Measures(NamedTuple):
    """What is read of a target on the test split, beside its last metrics; models are compiled once for both.

    Attributes:
      start: `(target, seed) -> {"test", "reset", "probe"}` before its first step. `test` is its metric as it stands.
        `reset` is the same with BatchNorm's statistics of the training inputs, since a write moves parameters alone;
        None without such statistics. `probe` is the probe of that.
      end: `(target, seed) -> the probe`, as the target stands.

    A probe is the accuracy of a logistic regression on its features, fitted to the labelled training examples (see
    `probe`); None of what is no classifier, or sows no `features`.
    """

    start: Callable[[TrainState, int], dict[str, float | None]]
    end: Callable[[TrainState, int], float | None]


Opponents = Callable[[TrainState, int], dict[str, float]]
"""`(source, seed) -> test accuracy by opponent`."""


def make_measures(model: StudyModel, axis_name: str | None = None) -> Measures:
    """Returns what measures a target; its BatchNorm averages over the axis under `pmap`, if any."""
    observe = observer(model, model.splits(0).test)

    def start(target: TrainState, seed: int) -> dict[str, float | None]:
        splits = model.splits(seed)
        state, sample = _on_host(target), sampled(model, splits, seed)
        if state is None:
            return {"test": None, "reset": None, "probe": None}
        if observe is None or sample is None:
            test = model.evaluate(state.params, state.model_state, splits.test)[model.metric]
            return {"test": test, "reset": None, "probe": None}
        own = reset_to_inputs(model, state, seed, axis_name)
        probed, reset = _probed(observe, own, sample, model.head_penalty)
        if own is state:
            return {"test": reset, "reset": None, "probe": probed}
        test = observe(state.params, state.model_state, sample.test).accuracy(_labels(sample)[1])
        return {"test": test, "reset": reset, "probe": probed}

    def end(target: TrainState, seed: int) -> float | None:
        state, sample = _on_host(target), sampled(model, model.splits(seed), seed)
        return (
            None
            if state is None or observe is None or sample is None
            else _probed(observe, state, sample, model.head_penalty)[0]
        )

    return Measures(start, end)


def _probed(observe: Observe, state: TrainState, sample: Sample, penalty: float) -> tuple[float | None, float]:
    """Returns the probe of a model's features, and its own accuracy."""
    labels = _labels(sample)
    fitted, test = (observe(state.params, state.model_state, arrays) for arrays in sample)
    return probe(fitted.features, labels[0], test.features, labels[1], penalty), test.accuracy(labels[1])


def make_opponents(scenario: Scenario, source_plan: SourcePlan, *, controlled: bool = False) -> Opponents:
    """Returns what a doubter would put beside a classifier, with the same labelled examples and nothing trained.

    `inputs_lr` is a logistic regression on its raw inputs, `source_lr` one on the source's features of these inputs,
    and `source` the source itself, where its labels are the target's. Those of a source are there where it can read the
    inputs, and is trained before the target. One that tells its own labels no better than chance is warned of, unless
    it is `controlled`, such as an untrained one.
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
            if not controlled:
                _warn_of_chance(source, observe, given, seed)
            found["source_lr"], accuracy = _probed(observe, given, sample, target.head_penalty)
            own = source.splits(seed).test
            if "label" in own and np.array_equal(np.asarray(own["label"]), _labels(sample)[1]):
                found["source"] = accuracy
        return {name: accuracy for name, accuracy in found.items() if accuracy is not None}

    return opponents


def _warn_of_chance(source: StudyModel, observe: Observe, state: TrainState, seed: int) -> None:
    """Warns of a source that is right on its validation split no more often than its most frequent class is.

    By less than two standard errors of that fraction.
    """
    held_out = source.splits(seed).validation
    if source.metric != "accuracy" or "label" not in held_out or not set(source.inputs) <= held_out.keys():
        return
    labels = np.asarray(held_out["label"])
    if not len(labels):
        return
    accuracy = observe(state.params, state.model_state, held_out).accuracy(labels)
    chance = np.bincount(labels).max() / len(labels)
    if accuracy <= chance + 2 * np.sqrt(chance * (1 - chance) / len(labels)):
        print(
            f"warning: the source {source.name} of seed {seed} is right on {100 * accuracy:.1f} percent of its"
            f" validation split, its most frequent class alone would be on {100 * chance:.1f}: it knows nothing to"
            " transfer; train it longer (--source-steps), or give other weights (--source-from)",
            file=sys.stderr,
        )


def _labels(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(sample.fitted["label"]), np.asarray(sample.test["label"])


def _on_host(state: TrainState) -> TrainState | None:
    """Returns a model where it is compiled for once, wherever it was; None where no process has all of it."""
    state = state.replace(opt_state=None)
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    if all(array.is_fully_addressable or array.is_fully_replicated for array in arrays):
        return jax.device_get(state)
    return None
