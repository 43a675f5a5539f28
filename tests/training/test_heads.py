"""Linear heads on features: against scikit-learn, which solves the same problems."""

import jax
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import merge_jax as mj

FEATURES, LABELS = (array[:300] for array in load_digits(return_X_y=True))  # Some pixels are 0 in all of them.
NEW = load_digits().data[300:600]


@pytest.fixture(scope="module")
def head():
    return mj.fit_head(FEATURES, LABELS, tolerance=1e-6)


def test_logistic_regression_as_scikit_learn_has_it(head):
    theirs = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=1000)).fit(FEATURES, LABELS)
    np.testing.assert_allclose(jax.nn.softmax(head(NEW)), theirs.predict_proba(NEW), atol=2e-3)
    assert head.kernel.shape == (64, 10)
    assert head.bias.shape == (10,)


def test_no_entry_of_the_gradient_is_above_the_tolerance(head):
    mean, spread = FEATURES.mean(0), FEATURES.std(0)
    standardised = np.divide(FEATURES - mean, spread, where=spread > 0, out=np.zeros_like(FEATURES))
    kernel = np.asarray(head.kernel, np.float64) * spread[:, None]
    logits = standardised @ kernel + np.asarray(head.bias) + mean @ np.asarray(head.kernel)
    errors = softmax(logits, axis=1) - np.eye(10)[LABELS]
    assert np.abs(standardised.T @ errors + kernel).max() / 300 < 3e-6  # Half of it is rounding.
    assert np.abs(errors.mean(0)).max() < 3e-6


@pytest.mark.parametrize("penalty", [1.0, 30.0])
def test_ridge_regression_as_scikit_learn_has_it(penalty):
    random = np.random.default_rng(0)
    logits, weights = random.normal(size=(300, 3)) + FEATURES[:, 20:23] + 5, random.uniform(size=300)
    head = mj.fit_head(FEATURES, logits, penalty=penalty)
    theirs = make_pipeline(StandardScaler(), Ridge(penalty)).fit(FEATURES, logits)
    np.testing.assert_allclose(head(NEW), theirs.predict(NEW), atol=1e-2)
    weighted = mj.fit_head(FEATURES, logits, penalty=penalty, weights=weights)
    fit = {"standardscaler__sample_weight": weights, "ridge__sample_weight": weights}
    theirs = make_pipeline(StandardScaler(), Ridge(penalty)).fit(FEATURES, logits, **fit)
    np.testing.assert_allclose(weighted(NEW), theirs.predict(NEW), atol=1e-2)


def test_a_feature_that_hardly_varies_is_left_out(head):
    """Standardised it would be a feature as the others, with a weight of 1e4 and more."""
    noise = 1e-5 * np.random.default_rng(0).normal(size=(300, 1))
    wider = mj.fit_head(np.concatenate([FEATURES, noise], axis=1).astype(np.float32), LABELS, tolerance=1e-6)
    assert not np.any(wider.kernel[-1])
    np.testing.assert_allclose(wider.kernel[:-1], head.kernel, atol=2e-3)


def test_features_of_small_deviations_count_however_many_examples_there_are():
    """Where `jnp.linalg.lstsq` cuts at 1.2 % of the largest."""
    features = np.random.default_rng(0).standard_normal((100_000, 3), np.float32) * np.float32([1, 0.1, 0.01])
    kernel = np.float32([[1], [2], [3]])
    np.testing.assert_allclose(mj.fit_head(features, features @ kernel).kernel, kernel, rtol=1e-3)


def test_a_weight_of_two_is_an_example_twice():
    twice = np.arange(300) // 2
    weights = np.where(np.arange(300) < 150, 2, 0)
    weighted, doubled = mj.fit_head(FEATURES, LABELS, weights=weights), mj.fit_head(FEATURES[twice], LABELS[twice])
    np.testing.assert_allclose(jax.nn.softmax(weighted(FEATURES)), jax.nn.softmax(doubled(FEATURES)), atol=5e-3)


def test_inside_of_other_programs():
    halves, logits = FEATURES.reshape(2, 150, 64), FEATURES.reshape(2, 150, 64)[..., 20:23] ** 2
    both = jax.jit(jax.vmap(mj.fit_head))(halves, logits)
    for half in range(2):
        expected = mj.fit_head(halves[half], logits[half])
        np.testing.assert_allclose(both.kernel[half], expected.kernel, rtol=1e-3, atol=1e-3)
    fit = jax.vmap(lambda features, labels: mj.fit_head(features, labels, num_classes=10))
    assert jax.eval_shape(fit, halves, LABELS.reshape(2, 150)).kernel.shape == (2, 64, 10)
    with pytest.raises(ValueError, match="num_classes must be given under jit"):
        jax.eval_shape(mj.fit_head, FEATURES, LABELS)


def test_a_class_without_an_example_is_told():
    labels = np.where(LABELS == 3, 4, LABELS)
    with pytest.warns(UserWarning, match="no example has label 3: the head will never predict it"):
        head = mj.fit_head(FEATURES, labels)
    assert not (np.argmax(head(FEATURES), 1) == 3).any()
    with pytest.warns(UserWarning, match="no example has label 3"):
        mj.fit_head(FEATURES, LABELS, weights=LABELS != 3, num_classes=np.max(LABELS) + 1)


def test_features_that_do_not_vary_are_told():
    with pytest.warns(UserWarning, match="predicts the same of all examples: no feature varies"):
        head = mj.fit_head(np.full((300, 2), 1e25), LABELS)
    assert head.bias.any()


def test_the_head_is_of_32_bits_among_64():
    with jax.enable_x64(True):
        for targets in (LABELS, FEATURES[:, :3]):
            head = mj.fit_head(FEATURES, targets, penalty=np.float64(10))
            assert head.kernel.dtype == head.bias.dtype == np.float32


def test_no_convergence_is_told():
    with pytest.warns(UserWarning, match="has not converged in 2 steps"):
        mj.fit_head(FEATURES, LABELS, max_steps=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": FEATURES.reshape(300, 8, 8)}, r"features must be \[N, d\].*got \[300, 8, 8\]"),
        ({"features": FEATURES[:299]}, "there are 299 features and 300 targets"),
        ({"features": np.where(FEATURES == 5, np.nan, FEATURES)}, "features must be finite numbers: those of"),
        ({"targets": LABELS + 0.0}, r"labels \[N\], whole numbers, or logits .* got float64 \[300\]"),
        ({"targets": np.eye(10, dtype=int)[LABELS]}, "of one-hot labels, take argmax"),
        ({"targets": LABELS.astype(str)}, "targets must be numbers, got an array of <U"),
        ({"num_classes": 9}, r"labels must lie in \[0, 9\), got 9"),
        ({"targets": LABELS - 1}, r"labels must lie in \[0, 9\), got -1"),
        ({"num_classes": 400}, "300 examples cannot cover 400 classes"),
        ({"targets": FEATURES, "num_classes": 3}, "num_classes is 3, and there are 64 logits"),
        ({"penalty": 0.0}, "penalty must be a finite number above 0, got 0.0"),
        ({"penalty": "1"}, "penalty must be a finite number above 0, got '1'"),
        ({"floor": None}, "floor must be a finite number of at least 0, got None"),
        ({"features": FEATURES.astype(object)}, "features must be numbers, got an array of object"),
        ({"features": FEATURES + 1j}, "features must be real numbers"),
        ({"targets": np.array([2**40] * 300)}, "300 examples cannot cover"),  # 0 in 32 bits.
        ({"targets": np.zeros((300, 0))}, r"logits \[N, C\] of a class at least, got \[300, 0\]"),
        ({"weights": "balanced"}, "weights must be numbers, got str"),
        ({"weights": np.ones(3)}, r"weights must be \[300\]"),
        ({"weights": -np.ones(300)}, "each 0 or more"),
        ({"weights": np.zeros(300)}, "weights are all 0"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        mj.fit_head(**{"features": FEATURES, "targets": LABELS, **change})


def test_a_floor_keeps_the_weights_of_features_that_hardly_vary_small():
    small = FEATURES.astype(np.float32)
    small[:, 30:] *= 1e-3
    free, floored = (mj.fit_head(small, LABELS, floor=floor) for floor in (0.0, 0.1))
    assert np.abs(free.kernel[30:]).max() > 50 > 1 > np.abs(floored.kernel[30:]).max()
    mean, variance = small.mean(0), small.var(0)
    scale = np.sqrt(variance + 0.1 * variance.mean())
    theirs = LogisticRegression(tol=1e-8, max_iter=1000).fit((small - mean) / scale, LABELS)
    expected = theirs.predict_proba((small - mean) / scale)
    np.testing.assert_allclose(jax.nn.softmax(floored(small)), expected, atol=5e-3)
    logits = mj.fit_head(small, FEATURES[:, 20:23], floor=0.1)
    assert np.abs(logits.kernel[30:]).max() < 1
    with pytest.raises(ValueError, match="floor must be a finite number of at least 0, got -1"):
        mj.fit_head(small, LABELS, floor=-1)


def test_a_penalty_too_small_to_solve_for_is_named():
    features = np.random.default_rng(0).normal(size=(4, 50))  # More unknowns than examples.
    with pytest.raises(ValueError, match=r"the head is not finite: .* the penalty of 1e-12 is too small"):
        mj.fit_head(features, features[:, :3], penalty=1e-12)
