"""What every model made of transformer encoders must do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import test_image_text, test_transformer, test_vit
from tests.models.common import assert_reaches_every_leaf, dense, in_float64, outputs

IMAGES, TOKENS = test_vit.IMAGES, test_transformer.TOKENS
PAIRS = (test_image_text.IMAGES, test_image_text.TOKENS)

# Each with random parameters, and its inputs.
MODELS = {
    "vit": (test_vit.MODEL, test_vit.initialised, (IMAGES,)),
    **{name: (model, test_transformer.initialised, (TOKENS,)) for name, model in test_transformer.MODELS.items()},
    "answerer": (test_image_text.ANSWERER, test_image_text.initialised, PAIRS),
    "dual": (test_image_text.DUAL, test_image_text.initialised, PAIRS),
}
# One of each encoder and of each head.
UNLIKE = ("vit", "bert", "distilbert, spans", "answerer", "dual")
# Their encoders are those of the others.
SLOW = ("bert", "distilbert, spans", "answerer", "dual")
ENCODERS = ("encoder", "image_encoder", "text_encoder")
LAST = {
    "vit": "classifier",
    "bert": "classifier",
    "distilbert": "classifier",
    "mean": "classifier",
    "answerer": "answer",
}


def of(*names):
    def row(name):
        model, initialised, inputs = MODELS[name]
        # Those of two encoders compile for as long as all others.
        slow = pytest.mark.slow if (names == UNLIKE and name in SLOW) or name == "answerer" else ()
        return pytest.param(model, initialised, inputs, id=name, marks=slow)

    return pytest.mark.parametrize(("model", "initialised", "inputs"), list(map(row, names)))


def encoders(model):
    return [name for name in ENCODERS if hasattr(model, name)]


def clone(model, names, **options):
    """Returns the model with options of these encoders."""
    return model.clone(**{name: getattr(model, name).clone(**options) for name in names})


def results(*arguments, **options):
    return jax.tree.leaves(outputs(*arguments, **options))


def distance(some, others):
    return max(float(jnp.abs(one - other).max()) for one, other in zip(some, others, strict=True))


@of(*UNLIKE)
def test_dropout_is_in_training_alone(model, initialised, inputs):
    params, keys = initialised(model), jax.random.split(jax.random.key(0))
    without = clone(model, encoders(model), dropout_rate=0.0)
    if hasattr(model, "dropout_rate"):
        without = without.clone(dropout_rate=0.0)
    expected = results(without, params, *inputs)
    assert distance(results(without, params, *inputs, train=True), expected) == 0
    # Each encoder has its own, and drops where it is asked to.
    for name in encoders(model):
        dropped = clone(without, [name], dropout_rate=0.5)
        assert distance(results(dropped, params, *inputs), expected) == 0
        first, again, other = (
            results(dropped, params, *inputs, train=True, key=key) for key in (keys[0], keys[0], keys[1])
        )
        assert distance(first, again) == 0
        assert distance(first, other) > 0.01
        assert distance(first, expected) > 0.01


@of(*UNLIKE)
def test_in_bfloat16_parameters_and_outputs_stay_float32(model, initialised, inputs):
    narrow, params = clone(model, encoders(model), dtype=jnp.bfloat16), initialised(model)
    shapes = jax.eval_shape(narrow.init, jax.random.key(0), *inputs)["params"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}
    for name, entry in zip(encoders(model), inputs, strict=True):
        assert jax.eval_shape(getattr(narrow, name).apply, {"params": params[name]}, entry).dtype == jnp.bfloat16
    found, expected = results(narrow, params, *inputs), results(model, params, *inputs)
    assert {leaf.dtype.name for leaf in found} == {"float32"}
    for one, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, exact, atol=0.3 if inputs is PAIRS else 0.2)
    assert distance(found, expected) > 1e-4
    apply = functools.partial(narrow.apply, mutable=["intermediates"])
    _, sown = jax.eval_shape(apply, {"params": params}, *inputs)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(sown)} <= {"float32"}


@pytest.mark.slow
@of(*MODELS)
def test_gradients_reach_every_leaf(model, initialised, inputs):
    def loss(params):
        found = jax.tree.leaves(model.apply({"params": params}, *inputs))
        weights = [jax.random.normal(jax.random.key(1), leaf.shape) for leaf in found]
        # Where an answer cannot be, the logits of a span are far below all others.
        return sum(jnp.sum(jnp.where(leaf > -1e8, leaf * w, 0.0)) for leaf, w in zip(found, weights, strict=True))

    assert_reaches_every_leaf(loss, initialised(model))


@of(*LAST)
def test_the_logits_are_the_last_layer_of_the_sown_features(model, initialised, inputs, request):
    name = request.node.callspec.id
    params = initialised(model)
    apply = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
    logits, found = apply({"params": params}, *inputs)
    (features,) = found["intermediates"]["features"]
    last = in_float64(params[LAST[name]])
    assert features.shape == (2, len(last["kernel"]))
    assert (features.min() >= 0) == (name == "distilbert")  # Its pooler ends in a ReLU.
    np.testing.assert_allclose(logits, dense(last, in_float64(features)), atol=1e-5)


@of("bert", "answerer", "dual")
def test_a_text_of_padding_alone_is_finite(model, initialised, inputs):
    *others, tokens = inputs
    for leaf in results(model, initialised(model), *others, np.zeros_like(tokens)):
        assert np.isfinite(leaf).all()
