"""Logistic regressions on a classifier's features or inputs: its probe, its last layer, and its opponents."""

import sys
import warnings
from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

import merge_jax as mj
from merge_jax.data import Arrays, is_streamed, num_examples, take
from merge_jax.objectives.evaluation import apply_in_batches
from merge_jax.paths import flatten
from merge_jax.study.choices import OPPONENTS
from merge_jax.study.models.model import StudyModel
from merge_jax.study.scenario import Scenario
from merge_jax.study.sources import SourcePlan
from merge_jax.training.joint import TrainState
from merge_jax.types import ModelState, Params

__all__ = [
    "FitHead",
    "Measures",
    "Observe",
    "Observed",
    "Opponents",
    "Sample",
    "inputs_lr",
    "make_fit_head",
    "make_measures",
    "make_opponents",
    "observer",
    "probe",
    "reset_to_inputs",
    "sampled",
]

_AT_ONCE = 200
_MOST = 10_000  # Maximum examples to fit a regression: more cost minutes.
_SOME, _SEVERAL = 16, 64  # Examples that suffice to check a head, and the effect of dropout on it.
_STEPS = 200  # Digits need 50; for 12,288 pixels and 100 classes, 400 are no better.


class Observed(NamedTuple):
    """A model's outputs for N examples: features `[N, d]`, the input of its last layer, and logits `[N, C]`."""

    features: np.ndarray
    logits: np.ndarray

    def accuracy(self, labels: np.ndarray) -> float:
        """Returns the fraction of labels `[N]` that equal the largest logit's class."""
        return float(np.mean(self.logits.argmax(axis=1) == labels))


Observe = Callable[[Params, ModelState, Arrays], Observed]
"""`(params, model_state, arrays) -> what the model makes of all these examples`, in evaluation mode."""


class Sample(NamedTuple):
    """Labelled examples to fit a regression, and those to evaluate it."""

    fitted: Arrays
    test: Arrays


class Measures(NamedTuple):
    """Measurements of a target on the test split, besides its final metrics; models are compiled once for both.

    Attributes:
      start: `(target, seed) -> {"test", "reset", "probe"}` before its first step. `test` is its metric. `reset` is the
        same with BatchNorm statistics recomputed from the training inputs, since a write changes only parameters; None
        without such statistics. `probe` is the probe of that model.
      end: `(target, seed) -> the probe`, without changes to the target.

    A probe is the accuracy of a logistic regression on its features, fitted to the labelled training examples (see
    `probe`); None if the model is not a classifier, or sows no `features`.
    """

    start: Callable[[TrainState, int], dict[str, float | None]]
    end: Callable[[TrainState, int], float | None]


FitHead = Callable[[TrainState, int, str], tuple[dict[str, np.ndarray], ModelState]]
"""`(target right after the write, seed, method) -> (leaves of its last layer by path, model state)`."""

Opponents = Callable[[TrainState, int, Collection[str]], dict[str, float]]
"""`(source, seed, names) -> test accuracy by opponent`, of those in `names`."""


def make_measures(model: StudyModel, observe: Observe | None, axis_name: str | None = None) -> Measures:
    """Returns the measurements of a target.

    Args:
      model: the target.
      observe: the result of `observer` for it and its test split.
      axis_name: the axis that its BatchNorm averages over under `pmap`, if any.
    """

    def start(target: TrainState, seed: int) -> dict[str, float | None]:
        state, sample = _on_host(target), sampled(model, seed)
        if state is None:
            return {"test": None, "reset": None, "probe": None}
        if observe is None or sample is None:
            test = model.evaluate(state.params, state.model_state, model.splits(seed).test)[model.metric]
            return {"test": test, "reset": None, "probe": None}
        own = reset_to_inputs(model, state, sample, seed, axis_name)
        probed, reset = _probed(observe, own, sample, model.head_penalty)
        if own is state:
            return {"test": reset, "reset": None, "probe": probed}
        test = observe(state.params, state.model_state, sample.test).accuracy(_labels(sample)[1])
        return {"test": test, "reset": reset, "probe": probed}

    def end(target: TrainState, seed: int) -> float | None:
        state, sample = _on_host(target), sampled(model, seed)
        if state is None or observe is None or sample is None:
            return None
        return _probed(observe, state, sample, model.head_penalty)[0]

    return Measures(start, end)


def _probed(observe: Observe, state: TrainState, sample: Sample, penalty: float) -> tuple[float | None, float]:
    """Returns the probe of a model's features, and the model's accuracy."""
    labels = _labels(sample)
    fitted, test = (observe(state.params, state.model_state, arrays) for arrays in sample)
    return probe(fitted.features, labels[0], test.features, labels[1], penalty), test.accuracy(labels[1])


def make_fit_head(
    model: StudyModel, observe: Observe | None, axis_name: str | None = None
) -> tuple[tuple[str, str], FitHead]:
    """Returns the kernel and bias paths of a classifier's last layer, and a function that fits it to labels.

    That is `mj.fit_head`, on features with BatchNorm statistics recomputed from the training inputs. Arguments are
    those of `make_measures`.

    Raises:
      ValueError: not a classifier, one that sows no `features`, or whose logits are not a dense layer of them.
    """
    test = model.splits(0).test
    if observe is None or sampled(model, 0) is None:
        raise ValueError(
            f"head_first needs a classifier that sows 'features', the input of its last layer; {model.name} does not"
        )
    params, model_state = model.init(jax.random.key(0))
    few = take(test, np.arange(min(_SOME, len(test["label"]))))
    kernel, bias = _last_layer(model.name, params, *observe(params, model_state, few))
    checked: set[str] = set()  # Once per method suffices.
    with_dropout = cache(lambda: _loss_with_dropout(model))

    def fit_head(target: TrainState, seed: int, method: str) -> tuple[dict[str, np.ndarray], ModelState]:
        sample = sampled(model, seed)
        assert sample is not None  # It existed for seed 0.
        target = reset_to_inputs(model, target, sample, seed, axis_name)
        found = observe(target.params, target.model_state, sample.fitted)
        labels = np.asarray(sample.fitted["label"])
        classes = found.logits.shape[1]
        head = mj.fit_head(
            found.features, labels, num_classes=classes, penalty=model.head_penalty, floor=model.head_floor
        )
        leaves = {kernel: np.asarray(head.kernel), bias: np.asarray(head.bias)}
        loss = with_dropout()
        if loss is not None and method not in checked:
            checked.add(method)
            features, known = (jnp.asarray(part[:_SEVERAL]) for part in (found.features, labels))
            calm = float(mj.cross_entropy(head(features), known).mean())
            noisy = float(loss(mj.replace(target.params, leaves), target.model_state, _several(sample.fitted)))
            if not noisy <= 3 * calm + 1:
                _warn_of_dropout(f"{model.name}, before {method},", calm, noisy)
        return leaves, target.model_state

    return (kernel, bias), fit_head


def _loss_with_dropout(model: StudyModel) -> Callable[[Params, ModelState, Arrays], jax.Array] | None:
    """Returns a model's loss in training mode, compiled for several examples; None if it has no dropout."""
    sample = sampled(model, 0)
    assert sample is not None  # As for any last layer that is fitted.
    given = jax.random.key(0), *model.shapes, _several(sample.fitted)
    traced = jax.jit(lambda key, params, state, batch: model.loss(params, state, batch, key)[0]).trace(*given)
    key = traced.jaxpr.jaxpr.invars[0]
    if not any(key is used for equation in traced.jaxpr.eqns for used in equation.invars):
        return None
    return partial(traced.lower().compile(), jax.random.key(0))


def _several(examples: Arrays) -> Arrays:
    return take(examples, np.arange(min(_SEVERAL, num_examples(examples))))


def _warn_of_dropout(name: str, calm: float, noisy: float) -> None:
    """Warns on standard error that dropout destroys a fitted last layer's predictions, so that training would undo it.

    This happens if features differ between examples by far less than dropout changes them.
    """
    print(
        f"warning: the last layer of {name} was fitted first, to a loss of {calm:.2f}; with the model's dropout it is"
        f" {noisy:.3g}, and steps will undo it: take a model without dropout before its last layer (of text, --pooler"
        " mean), or a larger --head-penalty or --head-floor",
        file=sys.stderr,
    )


def _last_layer(name: str, params: Any, features: np.ndarray, logits: np.ndarray) -> tuple[str, str]:
    """Returns the paths of the kernel and bias that map features to logits."""
    leaves = flatten(params)
    for path, kernel in leaves.items():
        bias = f"{path.removesuffix('kernel')}bias"
        if path.endswith("kernel") and bias in leaves and kernel.shape == (features.shape[1], logits.shape[1]):
            made = features @ np.asarray(kernel, np.float32) + np.asarray(leaves[bias], np.float32)
            if np.allclose(made, logits, rtol=0.02, atol=0.02 * np.abs(logits).max()):  # In bfloat16 too.
                return path, bias
    raise ValueError(f"head_first: no kernel and bias of {name} make its logits of its 'features'")


def make_opponents(scenario: Scenario, source_plan: SourcePlan, *, controlled: bool = False) -> Opponents:
    """Returns a classifier's baselines (opponents), with the same labelled examples and without training.

    `inputs_lr` is a logistic regression on its raw inputs, `source_lr` one on the source's features of these inputs,
    and `source` the source itself, if its labels are the target's. The latter two need a source that can read the
    inputs and is trained before the target. A source no better than chance on its own labels causes a warning, unless
    it is `controlled`, such as an untrained one.
    """
    target, source = scenario.target, scenario.source
    observe = None if source is None or source_plan.live else observer(source, target.splits(0).test)

    def opponents(state: TrainState, seed: int, names: Collection[str] = OPPONENTS) -> dict[str, float]:
        sample = sampled(target, seed)
        if sample is None:
            return {}
        found = {"inputs_lr": inputs_lr(target, sample)} if "inputs_lr" in names else {}
        if source_plan.snapshots is not None:
            state = jax.tree.map(lambda leaf: leaf[-1], state)
        given = None if observe is None else _on_host(state)
        if observe is not None and source is not None and given is not None:
            if not controlled:
                _warn_of_chance(source, observe, given, seed)
            labels, accuracy = _labels(sample)[1], None
            if "source_lr" in names:
                found["source_lr"], accuracy = _probed(observe, given, sample, target.head_penalty)
            own = source.splits(seed).test
            if "source" in names and "label" in own and np.array_equal(np.asarray(own["label"]), labels):
                if accuracy is None:
                    accuracy = observe(given.params, given.model_state, sample.test).accuracy(labels)
                found["source"] = accuracy
        return {name: value for name, value in found.items() if value is not None and name in names}

    return opponents


def _warn_of_chance(source: StudyModel, observe: Observe, state: TrainState, seed: int) -> None:
    """Warns of a source that is no more accurate on its validation split than the most frequent class.

    The margin is two standard errors of that fraction.
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
    """Returns a model on the host; None if no process holds all of it."""
    state = state.replace(opt_state=None)
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    if all(array.is_fully_addressable or array.is_fully_replicated for array in arrays):
        return jax.device_get(state)
    return None


def sampled(model: StudyModel, seed: int) -> Sample | None:
    """Returns the examples to fit and test regressions; None if the model is not a classifier.

    They are fitted to all labelled training examples, at most 10,000, drawn by the seed.
    """
    splits = model.splits(seed)
    total = num_examples(splits.train)
    if model.metric != "accuracy" or "label" not in splits.train or not num_examples(splits.test) or total == 0:
        return None
    rows = np.arange(total)
    if total > _MOST:
        rows = np.sort(np.random.default_rng(seed).permutation(total)[:_MOST])
    fitted = {name: entry[rows] for name, entry in splits.train.items() if name in (*model.inputs, "label")}
    return Sample(fitted, splits.test)


def observer(model: StudyModel, arrays: Arrays) -> Observe | None:
    """Returns a function that reads a model's features of such examples, compiled once.

    None for a model without `apply`, one that does not sow `features` (the input of its last layer, as models of
    `merge_jax.models` do), or one that cannot read these examples.
    """
    if model.apply is None or not set(model.inputs) <= arrays.keys():
        return None
    observe = mj.objectives.with_features(model.apply)

    @jax.jit
    def read(params: Params, model_state: ModelState, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, (features,) = observe({"params": params, **model_state}, *inputs, train=False)
        return features.reshape(features.shape[0], -1).astype(jnp.float32), logits

    inputs = [jax.ShapeDtypeStruct((1, *arrays[name].shape[1:]), arrays[name].dtype) for name in model.inputs]
    try:
        _, logits = jax.eval_shape(read, *model.shapes, *inputs)
    except (ValueError, TypeError, FlaxError):  # The data belongs to another model, or there are no features.
        return None
    if len(logits.shape) != 2:
        return None

    def observed(params: Params, model_state: ModelState, arrays: Arrays) -> Observed:
        size = num_examples(arrays)
        # One batch size for all sets of examples, so that one compilation serves them.
        rows = np.resize(np.arange(size), max(size, _AT_ONCE))
        used = {name: arrays[name] for name in model.inputs}
        found = apply_in_batches(lambda batch: read(params, model_state, *batch.values()), used, rows, _AT_ONCE)
        return Observed(*(part[:size] for part in found))

    return observed


def reset_to_inputs(
    model: StudyModel, target: TrainState, sample: Sample, seed: int, axis_name: str | None
) -> TrainState:
    """Returns a model with BatchNorm statistics recomputed from its training inputs, labelled and pool.

    Uses at most the first 10,000. Returns the model itself if it has no statistics.
    """
    if model.apply is None or "batch_stats" not in target.model_state:
        return target
    arrays = sample.fitted if model.pool is None else model.pool(seed)
    inputs = [np.asarray(arrays[name][: min(len(arrays[name]), _MOST)]) for name in model.inputs]
    variables = {"params": target.params, **target.model_state}
    found = mj.reset_statistics(model.apply, variables, *inputs, axis_name=axis_name)
    return target.replace(model_state={name: found[name] for name in target.model_state})


def probe(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray, penalty: float
) -> float | None:
    """Returns the test accuracy of a logistic regression on standardised features `[N, d]`, a fraction.

    Its penalty is `penalty |w|^2 / 2`, added to the sum of the losses (scikit-learn's 1 / C). None if features are not
    finite, or all labels are equal.
    """
    if len(np.unique(labels)) < 2 or not (np.isfinite(features).all() and np.isfinite(test_features).all()):
        return None
    from sklearn.preprocessing import StandardScaler  # The import takes half a second, too long for --help.

    scaler = StandardScaler().fit(features)
    fitted, test = (np.asarray(scaler.transform(part)) for part in (features, test_features))
    # Directions that the examples do not span have weight 0: the same solution, many times faster. Of nearly as many
    # examples as features, the decomposition would take longer than the regression.
    if fitted.shape[1] > 2 * len(fitted):
        basis = np.linalg.svd(fitted, full_matrices=False)[2].T
        fitted, test = fitted @ basis, test @ basis
    return float(_fitted(fitted, labels, penalty).score(test, test_labels))


def _fitted(features: Any, labels: np.ndarray, penalty: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # The result after this many steps is good enough.
        return LogisticRegression(C=1 / penalty, max_iter=_STEPS).fit(features, labels)


def inputs_lr(model: StudyModel, sample: Sample) -> float | None:
    """Returns the test accuracy of a logistic regression on a model's raw inputs; the same for any model of these.

    Numbers, such as pixels, are flattened and standardised. Integers other than uint8 are tokens; their counts are
    weighted by TF-IDF. None if inputs are streamed or have several entries, or all labels are equal.
    """
    if len(model.inputs) != 1 or any(is_streamed({name: sample.test[name]}) for name in model.inputs):
        return None
    fitted, test = (np.asarray(arrays[model.inputs[0]]) for arrays in sample)
    labels, test_labels = (np.asarray(arrays["label"]) for arrays in sample)
    if not np.issubdtype(fitted.dtype, np.integer) or fitted.dtype == np.uint8:
        fitted, test = (part.reshape(len(part), -1).astype(np.float32) for part in (fitted, test))
        return probe(fitted, labels, test, test_labels, model.head_penalty)
    if len(np.unique(labels)) < 2:
        return None
    from sklearn.feature_extraction.text import TfidfTransformer

    words = int(max(fitted.max(), test.max())) + 1
    weights = TfidfTransformer().fit(_counts(fitted, words))
    model_ = _fitted(weights.transform(_counts(fitted, words)), labels, 1.0)
    return float(model_.score(weights.transform(_counts(test, words)), test_labels))


def _counts(tokens: np.ndarray, words: int) -> Any:
    """Returns the token counts of texts `[N, L]`, sparse, `[N, words]`."""
    from scipy.sparse import coo_array

    tokens = tokens.reshape(len(tokens), -1)
    rows = np.repeat(np.arange(len(tokens)), tokens.shape[1])
    return coo_array((np.ones(tokens.size), (rows, tokens.ravel())), shape=(len(tokens), words)).tocsr()
