import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj

RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = RANDOM.normal(size=(2, 6, 4)) * 3
LABELS = RANDOM.integers(0, 4, 6)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_cross_entropy_is_the_negative_log_probability_of_the_label():
    expected = -np.log(softmax(STUDENT)[np.arange(6), LABELS])
    np.testing.assert_allclose(mj.cross_entropy(jnp.array(STUDENT), LABELS), expected, rtol=1e-5)


@pytest.mark.parametrize(("temperature", "weight"), [(4.0, 0.9), (1.0, 0.5), (2.0, 1.0), (3.0, 0.0)])
def test_distillation_equals_its_equation(temperature, weight):
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    divergence = (p * (np.log(p) - np.log(q))).sum(axis=-1)
    hard = -np.log(softmax(STUDENT)[np.arange(6), LABELS])
    expected = (1 - weight) * hard + weight * temperature**2 * divergence
    loss = mj.distillation_loss(jnp.array(STUDENT), jnp.array(TEACHER), LABELS, temperature=temperature, weight=weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_gets_no_gradient():
    gradient = jax.grad(lambda t: mj.distillation_loss(jnp.array(STUDENT), t, LABELS).sum())
    np.testing.assert_array_equal(gradient(jnp.array(TEACHER)), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ({"weight": 1.5}, r"weight must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mj.distillation_loss(jnp.array(STUDENT), jnp.array(TEACHER), LABELS, **options)
