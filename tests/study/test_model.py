"""A classifier of arrays, as a model of a scenario."""

from dataclasses import dataclass

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import merge_jax as mj
from merge_jax import data, study
from merge_jax.study.methods import make_scenario

LABELS = np.arange(40, dtype=np.int32) % 4
WORDS = {"words": np.tile(LABELS[:, None], 3) + 1, "label": LABELS}


class Words(nn.Module):
    """Counts of words, with what a state holds beside parameters and what a model sows."""

    @nn.compact
    def __call__(self, words: jax.Array, *, train: bool = False) -> jax.Array:
        features = nn.Embed(6, 4, name="embed")(words).mean(axis=1)
        self.sow("intermediates", "features", features)
        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        return nn.Dense(4, name="fc")(norm(features))


class Pixels(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        assert images.dtype == np.float32
        return nn.Dense(4, name="fc")(images.reshape(len(images), -1))


def words(seed):
    validation, train = data.split(WORDS, 8, seed)
    return data.Splits(train, validation, WORDS)


def classifier(splits=words, inputs="words", **options):
    return study.classifier("words", Words(), splits, inputs=inputs, optimizer=optax.adam, **options)


def test_it_starts_with_parameters_and_the_collections_that_training_keeps():
    params, model_state = classifier().init(jax.random.key(0))
    assert params["embed"]["embedding"].shape == (6, 4)
    assert model_state.keys() == {"batch_stats"}


def test_it_learns_from_some_labels_of_each_seed_and_is_tested_on_all():
    model = classifier(labels=8, unlabelled=6)
    first, second = model.splits(0), model.splits(1)
    assert np.bincount(first.train["label"]).tolist() == [2, 2, 2, 2]
    assert not np.array_equal(words(0).train["label"], words(1).train["label"])
    assert first.validation["label"].tolist() == words(0).validation["label"].tolist()
    assert second.validation["label"].tolist() == words(1).validation["label"].tolist()
    assert len(first.test["label"]) == 40
    assert model.pool is not None
    assert {name: entry.shape for name, entry in model.pool(0).items()} == {"words": (14, 3)}
    assert classifier().pool is None


def test_images_of_uint8_are_changed_before_the_module_sees_them():
    images = {"image": np.zeros((8, 2, 2, 1), np.uint8), "label": LABELS[:8]}
    apply = mj.on_pixels(Pixels().apply, (0.5,), (0.25,))
    model = study.classifier(
        "pixels",
        Pixels(),
        lambda _: data.Splits(images, images, images),
        inputs="image",
        optimizer=optax.adam,
        apply=apply,
    )
    params, model_state = model.init(jax.random.key(0))
    assert params["fc"]["kernel"].shape == (4, 4)
    assert model.evaluate(params, model_state, images).keys() == {"loss", "accuracy"}
    assert model.loss(params, model_state, images, jax.random.key(0))[0].shape == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": "word"}, "the batch has no 'word'; did you mean 'words'"),
        ({"splits": lambda _: data.Splits({"words": LABELS}, {}, {})}, "the batch has no 'label'"),
        ({"unlabelled": 4}, "unlabelled is 4, but of 32 training examples all are labelled"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


@dataclass(frozen=True, kw_only=True)
class Config(study.TransferOptions, study.RunConfig):
    pass


def test_routes_are_those_of_the_options_where_none_are_given():
    source, target = classifier(), classifier()
    shapes = jax.eval_shape(source.init, jax.random.key(0))[0]

    def moved(*routes, **options):
        config = Config(methods=("share",), batch_size=4, **options)
        described = make_scenario("words", config, source, target, *routes).methods["share"].transfer
        return {row.target for row in described.describe(shapes, shapes)}

    assert moved() == {"embed/embedding", "norm/scale", "norm/bias", "fc/kernel", "fc/bias"}
    assert moved(routes=("fc/*=fc/*",)) == {"fc/kernel", "fc/bias"}
    assert moved([mj.Route("fc/bias", "fc/bias")], routes=("**=**",)) == {"fc/bias"}
