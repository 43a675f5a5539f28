"""Compares label-free training before step 0 of the target's weights, or of an adapter written once.

    python -m benchmarks.label_free

The source is the small ResNet of `experiments.cross_structure`, trained as there; the target is the small MobileNetV2
with 100 digits. Each method runs the same number of `mj.prepare` steps on the images of those digits and means of two
of them (`mixed`). The target's weights train on `1 - cka`, or on RSD (arXiv:2507.21844) as in
`mj.objectives.redundancy_suppression`; linear operators and LPKA (`mergenet_residual`) train on `1 - cka`. The score is
a probe: logistic regression on the features before the last layer, fitted on the 100 labels. The control is an
untrained source. Each method uses the learning rate with the best mean probe on validation images over seeds; the table
shows test images.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from tqdm.auto import tqdm

import merge_jax as mj
from benchmarks.report import parse_config, report
from experiments import cross_structure
from merge_jax.study.sources import initial_key, plan_source
from merge_jax.study.trial import Trial, make_trials
from merge_jax.types import ModelApply

_OWN, _RSD, _UNTRAINED = "own weights", "own weights, RSD", "own weights, untrained source"
_ADAPTERS = {"linear operators": "linear_operators", "LPKA residual": "mergenet_residual"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    seeds: int = 6
    """Seeds, each with a split, a source and a target of its own."""
    steps: int = 100
    """Steps before step 0."""
    batch_size: int = 50
    """Images in a step."""
    labels: int = 100
    """Images that the target has, and labels that the probe has."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates to choose from."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        if min(self.seeds, self.steps, self.batch_size) < 1 or self.labels < 10 or not self.rates:
            raise ValueError("seeds, steps and batch_size must be at least 1, labels 10, and there must be a rate")


Probe = Callable[[Any, Any, Any], dict[str, float]]


def make_probe(apply: ModelApply) -> Probe:
    """Returns `(variables, splits, labelled) -> accuracy in percent` on validation and test images, of a probe."""
    observe = jax.jit(mj.objectives.with_features(apply))

    def probe(variables: Any, splits: Any, labelled: Any) -> dict[str, float]:
        # At once, for one compilation.
        parts = {"labelled": labelled, "validation": splits.validation, "test": splits.test}
        images = np.concatenate([part["image"] for part in parts.values()])
        ends = np.cumsum([len(part["label"]) for part in parts.values()])[:-1]
        features = dict(zip(parts, jnp.split(observe(variables, images)[1][0], ends), strict=True))
        head = mj.fit_head(features.pop("labelled"), labelled["label"], num_classes=10)
        return {name: 100 * float(mj.accuracy(head(one), parts[name]["label"])) for name, one in features.items()}

    return probe


def trained_source(trial: Trial, seed: int) -> dict[str, Any]:
    """Returns the variables of the source of a seed, trained on its own as a run does."""
    steps = trial.lengths.steps
    state = trial.initial_state(seed, trial.fresh_source(seed))
    state, _ = jax.jit(trial.epoch)(state, trial.arrays(seed), trial.indices_at(seed)(0, steps), steps)
    return {"params": state.target.params, **state.target.model_state}


def main() -> None:
    """Runs the benchmark."""
    config = parse_config({"default": Config()}, "benchmarks.label_free", __doc__, Config.check)
    options = replace(cross_structure.Config(), methods=tuple(_ADAPTERS.values()), labels=config.labels)
    scenario = cross_structure.build(options)
    source_trial = make_trials(scenario, options, plan_source(scenario, options))["source"]
    source, target = scenario.source, scenario.target
    assert source is not None
    apply_source, apply_target = source.apply, target.apply
    assert apply_source is not None
    assert apply_target is not None
    probe_source, probe_target = make_probe(apply_source), make_probe(apply_target)
    layers = options.agreeing_layers()

    def method(**more: Any) -> Callable[..., dict[str, Any]]:
        def run(key: jax.Array, variables: Any, of_source: Any, images: Any, rate: float) -> dict[str, Any]:
            return mj.prepare(
                key,
                layers,
                apply_source,
                apply_target,
                of_source,
                variables,
                images,
                steps=config.steps,
                batch_size=config.batch_size,
                learning_rate=rate,
                compare_on=mj.objectives.mixed,
                **more,
            )

        return run

    methods = {
        _OWN: method(),
        _RSD: method(objective=mj.objectives.redundancy_suppression),
        _UNTRAINED: method(),
        **{name: method(transfer=scenario.methods[one].transfer) for name, one in _ADAPTERS.items()},
    }
    before, given = [], []
    found: dict[str, dict[float, list[dict[str, float]]]] = {
        name: {rate: [] for rate in config.rates} for name in methods
    }
    for seed in tqdm(range(config.seeds), unit="seed"):
        splits = target.splits(seed)
        labelled = splits.train
        of_source = trained_source(source_trial, seed)
        params, state = source.init(initial_key(seed, "source"))
        untrained = {"params": params, **state}
        params, state = target.init(initial_key(seed, "target"))
        start = {"params": params, **state}
        before.append(probe_target(start, splits, labelled)["test"])
        given.append(probe_source(of_source, splits, labelled)["test"])
        for name, run in methods.items():
            shown = untrained if name == _UNTRAINED else of_source
            for rate in config.rates:
                variables = run(initial_key(seed, "adapter"), start, shown, labelled["image"], rate)
                found[name][rate].append(probe_target(variables, splits, labelled))
    chosen = {
        name: max(rates, key=lambda rate: np.mean([one["validation"] for one in rates[rate]]))
        for name, rates in found.items()
    }
    after = {name: np.array([one["test"] for one in found[name][rate]]) for name, rate in chosen.items()}
    rows = [("none", "", _mean(before), "", "")]
    for name, values in after.items():
        against = "" if name == _OWN else _paired(values - after[_OWN])
        rows.append((name, f"{chosen[name]:g}", _mean(values), _mean(values - before), against))
    rows.append(("the source's own features", "", _mean(given), "", ""))
    figures = {"before": before, "source": given, "chosen": chosen, "found": found}
    notes = (
        f"probe on {config.labels} labels, test accuracy in percent, mean ± s.e. over {config.seeds} seeds; "
        f"{config.steps} steps of {config.batch_size}; rates chosen on validation from "
        f"{', '.join(f'{rate:g}' for rate in config.rates)}; p of a paired t test, not adjusted"
    )
    columns = ("what learns before step 0", "rate", "probe", "- none", "- own weights")
    report("label free", config, columns, rows, figures, notes)


def _mean(values: Any) -> str:
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{error}"


def _paired(differences: np.ndarray) -> str:
    if len(differences) < 2:
        return _mean(differences)
    _, p = stats.ttest_1samp(differences, 0)
    return f"{_mean(differences)}, p {p:.2g}"


if __name__ == "__main__":
    main()
