import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from tests import helpers


def test_accuracy_is_the_fraction_of_largest_logits_that_are_the_label():
    logits = jnp.array([[3.0, 2.0, 1.0], [0.0, 1.0, 2.0], [1.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
    assert mj.accuracy(logits, jnp.array([0, 1, 2, 2])) == 0.25


@pytest.mark.parametrize("shape", [(1,), (4, 1), ()])
def test_accuracy_takes_a_label_for_each_row(shape):
    with pytest.raises(ValueError, match=r"labels of logits \(4, 3\) must have shape \(4,\), got"):
        mj.accuracy(jnp.zeros((4, 3)), jnp.zeros(shape, jnp.int32))


def test_evaluation_is_the_mean_over_all_examples():
    params, model_state = helpers.variables(helpers.TARGET, 0)
    arrays = helpers.batch(0, size=10)
    evaluate = mj.evaluate_classifier(helpers.TARGET.apply, inputs="x", batch_size=4)
    metrics = evaluate(params, model_state, arrays)
    logits = jax.jit(helpers.TARGET.apply)({"params": params, **model_state}, arrays["x"])
    assert metrics["accuracy"] == pytest.approx(float(mj.accuracy(logits, arrays["label"])))
    loss = mj.cross_entropy(logits, arrays["label"]).mean()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def test_a_state_without_a_collection_of_the_model_says_what_to_give():
    params, _ = helpers.variables(helpers.TARGET, 0)
    with pytest.raises(ValueError, match="source_state="):
        mj.logits_teacher(helpers.TARGET.apply, inputs="x")(params, {}, helpers.batch(0))
    with pytest.raises(ValueError, match=r"such as .*batch_stats.*, got 'params'"):
        mj.evaluate_classifier(helpers.TARGET.apply, inputs="x")(params, {}, helpers.batch(0))


def test_the_teacher_adds_its_logits_in_evaluation_mode():
    params, model_state = helpers.variables(helpers.SOURCE, 0)
    batch = helpers.batch(0)
    annotated = mj.logits_teacher(helpers.SOURCE.apply, inputs="x")(params, model_state, batch)
    logits = helpers.SOURCE.apply({"params": params, **model_state}, batch["x"], train=False)
    np.testing.assert_array_equal(annotated.pop("teacher_logits"), logits)
    assert annotated == batch


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_normalised_channel_by_channel(channels):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, 4, 5, channels)).astype(np.uint8)
    mean, std = random.uniform(0.2, 0.6, channels), random.uniform(0.1, 0.4, channels)

    def apply_fn(variables, x, *, train):
        return variables, x, train

    variables, x, train = mj.on_pixels(apply_fn, mean.tolist(), std.tolist())("variables", jnp.asarray(images), train=7)
    assert (variables, train) == ("variables", 7)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, (images / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize("std", [(0.2, 0.0), (-0.1, 0.2), (0.2, float("nan"))])
def test_a_standard_deviation_that_is_not_above_0_is_refused(std):
    with pytest.raises(ValueError, match=rf"std must be above 0, got \[{std[0]}, {std[1]}\]"):
        mj.on_pixels(helpers.TARGET.apply, (0.5, 0.5), std)
