import jax
import numpy as np
import pytest

import merge_jax as mj
from tests import helpers


@pytest.mark.parametrize("batch_size", [4, 7, 10, 64])
def test_evaluation_counts_every_example_once(batch_size):
    params, model_state = helpers.variables(helpers.TARGET, 0)
    arrays = helpers.batch(0, size=10)
    evaluate = mj.evaluate_classifier(helpers.TARGET.apply, inputs="x", batch_size=batch_size)
    metrics = evaluate(params, model_state, arrays)
    logits = helpers.TARGET.apply({"params": params, **model_state}, arrays["x"])
    assert metrics["accuracy"] == pytest.approx(float(mj.accuracy(logits, arrays["label"])))
    loss = mj.cross_entropy(logits, arrays["label"]).mean()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def test_a_batch_without_the_input_says_what_it_has():
    params, model_state = helpers.variables(helpers.TARGET, 0)
    loss_fn = mj.classification_loss(helpers.TARGET.apply)
    with pytest.raises(ValueError, match="the batch has no 'image'; there is 'x', 'label'"):
        loss_fn(params, model_state, helpers.batch(0), jax.random.key(0))
    with pytest.raises(ValueError, match="the batch has no 'image'"):
        mj.logits_teacher(helpers.TARGET.apply)(params, model_state, helpers.batch(0))


def test_evaluation_on_nothing_is_refused():
    evaluate = mj.evaluate_classifier(helpers.TARGET.apply, inputs="x")
    with pytest.raises(ValueError, match="no examples"):
        evaluate(*helpers.variables(helpers.TARGET, 0), helpers.batch(0, size=0))


def test_loss_trains_batch_statistics_and_draws_dropout_from_its_key():
    params, model_state = helpers.variables(helpers.TARGET, 0)
    loss_fn = helpers.task(helpers.TARGET).loss_fn
    first, (new_state, metrics) = loss_fn(params, model_state, helpers.batch(0), jax.random.key(0))
    second, _ = loss_fn(params, model_state, helpers.batch(0), jax.random.key(1))
    assert first != second
    assert set(metrics) == {"accuracy"}
    before, after = mj.flatten(model_state), mj.flatten(new_state)
    assert all(not np.array_equal(before[path], after[path]) for path in before)


def test_the_teacher_adds_its_logits_in_evaluation_mode():
    params, model_state = helpers.variables(helpers.SOURCE, 0)
    batch = helpers.batch(0)
    annotated = mj.logits_teacher(helpers.SOURCE.apply, inputs="x")(params, model_state, batch)
    logits = helpers.SOURCE.apply({"params": params, **model_state}, batch["x"], train=False)
    np.testing.assert_array_equal(annotated.pop("teacher_logits"), logits)
    assert annotated == batch
