"""Redundancy suppression: the loss against NumPy, and what it does not see."""

import jax
import numpy as np
import pytest

import merge_jax as mj
from tests.objectives.test_features import models, split

rsd = mj.objectives.redundancy_suppression


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def naive_rsd(x, y, kappa):
    """The loss of one layer, by the correlation of each pair of channels."""
    total = 0.0
    for i in range(x.shape[1]):
        for j in range(y.shape[1]):
            correlation = np.corrcoef(x[:, i], y[:, j])[0, 1]
            total += (correlation - 1) ** 2 if i == j else kappa * correlation**2
    return total / x.shape[1]


def test_against_correlations():
    pairs = [(draw(20, 4), draw(20, 4, seed=1)), (draw(20, 3, seed=2), draw(20, 3, seed=3))]
    expected = np.mean([naive_rsd(*pair, 0.3) for pair in pairs])
    assert rsd(*zip(*pairs, strict=True), kappa=0.3) == pytest.approx(expected, rel=1e-4)


def test_constant_channels_agree_with_nothing():
    constant = np.full((6, 4), 7.7, np.float32)  # Whose mean is not 7.7 in float32.
    assert rsd([constant], [constant]) == pytest.approx(1, abs=1e-4)


def test_features_that_agree_and_are_not_redundant_are_best():
    basis = np.linalg.qr(draw(20, 20) - draw(20, 20).mean(0))[0][:, :5]
    basis -= basis.mean(0)
    same = np.linalg.qr(basis)[0]
    assert rsd([same], [3 * same + 1]) == pytest.approx(0, abs=1e-3)
    assert rsd([same], [same[:, ::-1]]) > 0.5  # Channel by channel, unlike the cka.


@pytest.mark.parametrize("widths", [(3, 7), (7, 3)])
def test_widths_may_differ_and_maps_are_averaged_over_places(widths):
    own, other = draw(16, 2, 2, widths[0]), draw(16, 4, widths[1], seed=1)
    value = rsd([own], [other])
    assert np.isfinite(value)
    assert value == rsd([own], [other])  # The directions are fixed.
    assert value == pytest.approx(float(rsd([own.mean((1, 2))], [other.mean(1)])), rel=1e-5)


def test_it_is_an_objective_of_training():
    source, target, (of_source, of_target), batch = models()
    shown = mj.features_teacher(source.apply, ["features"])(*split(of_source), batch)
    loss_fn = mj.feature_agreement(target.apply, ["features"], weight=2.0, objective=rsd)
    loss, (_, metrics) = loss_fn(*split(of_target), shown, jax.random.key(0))
    observe = mj.objectives.with_features(target.apply)
    (_, features), _ = observe(of_target, batch["image"], train=True, mutable=["batch_stats"])
    expected = rsd(features, shown["source_features"])
    assert loss == pytest.approx(2 * float(expected), rel=1e-4)
    assert metrics["agreement"] == pytest.approx(1 - float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([draw(4, 2)], []), {}, "1 layers are to agree with 0"),
        (([draw(4, 2)], [draw(4, 2)]), {"kappa": -1.0}, "kappa must be 0 or more, got -1.0"),
    ],
)
def test_what_does_not_fit_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rsd(*arguments, **options)
