"""Several sources as one model: what it computes is what each would alone."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from merge_jax.data import Splits
from merge_jax.study.models.model import StudyModel
from merge_jax.study.models.multi_source import side_by_side
from tests import helpers


def study_model(model, seed, sizes):
    def init(key):
        variables = model.init(key, np.zeros((1, 6), np.float32))
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    splits = Splits(*(helpers.batch(seed + i, size) for i, size in enumerate(sizes)))
    evaluate = mj.evaluate_classifier(model.apply, inputs="x", batch_size=4)
    return StudyModel(
        name="tiny",
        init=init,
        loss=helpers.task(model).loss_fn,
        optimizer=lambda _: optax.sgd(0.1),
        splits=lambda _: splits,
        evaluate=evaluate,
    )


ONE, TWO = study_model(helpers.SOURCE, 0, (8, 5, 6)), study_model(helpers.TARGET, 10, (12, 3, 6))
BOTH = side_by_side({"one": ONE, "two": TWO})
ALONE = {"one": ONE, "two": TWO}


@pytest.fixture(scope="module")
def models():
    return BOTH.init(jax.random.key(0))


@pytest.mark.slow
def test_each_model_has_the_gradient_it_would_have_alone(models):
    params, model_state = models
    batch = BOTH.splits(0).train
    key = jax.random.key(1)
    gradient, (states, metrics) = jax.grad(BOTH.loss, has_aux=True)(params, model_state, batch, key)
    for (name, alone), k in zip(ALONE.items(), jax.random.split(key, 2), strict=True):
        own = {"x": batch[f"{name}/x"], "label": batch[f"{name}/label"]}
        expected, (state, _) = jax.grad(alone.loss, has_aux=True)(params[name], model_state[name], own, k)
        chex.assert_trees_all_close(gradient[name], expected, rtol=1e-6)
        chex.assert_trees_all_close(states[name], state)
    assert {"one_loss", "one_accuracy", "two_loss", "two_accuracy"} == metrics.keys()


def test_scores_count_every_example_once(models):
    params, model_state = models
    splits = BOTH.splits(0)
    assert [len(arrays["one/x"]) for arrays in (splits.train, splits.validation, splits.test)] == [12, 5, 6]
    found = BOTH.evaluate(params, model_state, splits.validation)
    scores = []
    for name, alone in ALONE.items():
        expected = alone.evaluate(params[name], model_state[name], alone.splits(0).validation)
        assert found[f"{name}_accuracy"] == expected["accuracy"]
        assert found[f"{name}_loss"] == pytest.approx(expected["loss"])
        scores.append(expected["accuracy"])
    assert found[BOTH.metric] == pytest.approx(np.mean(scores))


def test_each_model_is_clipped_by_the_norm_of_its_own_gradient():
    """Gradients of 3 and 400: by their joint norm, the small one would hardly move."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    both = side_by_side({name: replace(one, optimizer=lambda _: clipped) for name, one in ALONE.items()})
    params = {"one": {"w": jnp.zeros(1)}, "two": {"w": jnp.zeros(1)}}
    optimizer = both.optimizer(10)
    updates, _ = optimizer.update(
        {"one": {"w": jnp.full(1, 3.0)}, "two": {"w": jnp.full(1, 400.0)}}, optimizer.init(params), params
    )
    np.testing.assert_allclose([updates["one"]["w"][0], updates["two"]["w"][0]], -1, rtol=1e-6)


def test_examples_of_the_shorter_come_again():
    train = BOTH.splits(0).train
    np.testing.assert_array_equal(train["one/x"][8:], train["one/x"][:4])
    np.testing.assert_array_equal(train["two/x"], TWO.splits(0).train["x"])
