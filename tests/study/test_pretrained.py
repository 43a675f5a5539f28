"""Sources with weights of another library: with their statistics, and a last layer fitted to the labels at hand."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import merge_jax as mj
from experiments import cross_structure
from merge_jax.data import Splits
from merge_jax.study import sources
from merge_jax.study.models import images
from merge_jax.study.models.pretrained import read_features
from tests.models.test_efficientnet import TINY_MOBILE, as_file, random_variables, tiny

RANDOM = np.random.default_rng(0)
LABELS = np.arange(60, dtype=np.int32) % 3
IMAGES = (40 * RANDOM.random((60, 16, 16, 3)) + 70 * LABELS[:, None, None, None]).astype(np.uint8)
TRAIN = {"image": IMAGES, "label": LABELS}
DATA = images.ImageData("colours", lambda seed: Splits(TRAIN, TRAIN, TRAIN), (16, 16, 3), 3, ((0.2,) * 3, (0.1,) * 3))


def classifier(num_classes=3):
    data = replace(DATA, num_classes=num_classes)
    return images.image_classifier("tiny", tiny(num_classes=num_classes), data, optimizer=lambda steps: None)


def started(model):
    params, state = model.init(jax.random.key(0))
    return sources.TrainState(params, state, None)


def test_a_last_layer_is_fitted_to_the_seeds_examples(tmp_path):
    file = as_file(tmp_path, mj.models.to_pytorch(random_variables(tiny(num_classes=7))))
    model = classifier()
    source = sources._read_file(model, file, started(model), seed=0)
    expected = random_variables(tiny(num_classes=7))
    np.testing.assert_array_equal(source.params["stem"]["kernel"], expected["params"]["stem"]["kernel"])
    statistics = source.model_state["batch_stats"], expected["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, *statistics)
    assert model.evaluate(source.params, source.model_state, TRAIN)["accuracy"] == 1


def test_a_last_layer_of_as_many_classes_is_taken(tmp_path):
    file = as_file(tmp_path, mj.models.to_pytorch(random_variables(tiny())))
    model = classifier()
    source = sources._read_file(model, file, started(model), seed=0)
    np.testing.assert_array_equal(source.params["fc"]["kernel"], random_variables(tiny())["params"]["fc"]["kernel"])


def test_pixels_are_scaled_as_those_of_the_pretrained_network():
    model, variables = classifier(), random_variables(tiny())
    expected = jax.jit(tiny().apply)(variables, (IMAGES[:2].astype(np.float32) - 127) / 128)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, IMAGES[:2]), expected, rtol=1e-3, atol=1e-3)


def test_a_mobilenet_of_other_names_is_read_and_sees_pixels_as_it_was_trained_on(tmp_path):
    whole = mj.models.mobilenet_v2_imagenet(3)
    module = TINY_MOBILE(num_classes=3, pixels=whole.pixels)
    variables = random_variables(module)
    file = as_file(tmp_path, mj.models.to_pytorch(variables, "torchvision"))
    model = images.image_classifier("tiny", module, DATA, optimizer=lambda steps: None)
    source = sources._read_file(model, file, started(model), seed=0)
    jax.tree.map(np.testing.assert_array_equal, source.params, variables["params"])
    scaled = (IMAGES[:2] / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    expected = jax.jit(module.apply)(variables, scaled.astype(np.float32))
    np.testing.assert_allclose(jax.jit(model.apply)(variables, IMAGES[:2]), expected, rtol=1e-3, atol=1e-3)


def test_a_resnet_is_read_though_a_last_layer_has_our_name_there(tmp_path):
    stages = (mj.models.ResNetStage(4, 1, 1),)
    module = images.make_model("resnet18_imagenet_half", 3, stages=3).clone(stages=stages)
    variables = random_variables(module)
    file = as_file(tmp_path, mj.models.to_pytorch(variables))
    assert "fc/bias" in mj.flatten(mj.load_safetensors(file))
    model = images.image_classifier("tiny", module, DATA, optimizer=lambda steps: None)
    source = sources._read_file(model, file, started(model), seed=0)
    jax.tree.map(np.testing.assert_array_equal, source.params, variables["params"])
    jax.tree.map(np.testing.assert_array_equal, source.model_state["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize(
    ("name", "stem", "last"),
    [
        ("resnet18_imagenet", 64, 512),
        ("resnet18_imagenet_half", 32, 256),
        ("resnet34_imagenet", 64, 512),
        ("resnet50_imagenet", 64, 2048),
        ("resnet50_imagenet_half", 32, 1024),
        ("mobilenet_v2_imagenet_half", 16, 1280),
        ("mobilenet_v2_half", 16, 1280),
    ],
)
def test_names_of_models_tell_their_widths(name, stem, last):
    model = images.make_model(name, 7, stages=3)
    found = mj.flatten(jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"])
    assert (found["stem/kernel"].shape[-1], found["fc/kernel"].shape) == (stem, (last, 7))
    assert (model.pixels is not None) == ("_imagenet" in name)


def test_a_file_of_ones_own_is_read_as_ever(tmp_path):
    model, variables = classifier(), random_variables(tiny())
    for tree in (variables, variables["params"]):
        mj.save_safetensors(tmp_path / "own.safetensors", tree, overwrite=True)
        source = sources._read_file(model, tmp_path / "own.safetensors", started(model), seed=0)
        jax.tree.map(np.testing.assert_array_equal, source.params, variables["params"])


def test_shapes_tell_before_training_that_a_file_is_of_another_network(tmp_path):
    file = as_file(tmp_path, mj.models.to_pytorch(random_variables(tiny(0.5))))
    model = classifier()
    start = jax.eval_shape(lambda: started(model))
    with pytest.raises(ValueError, match=r"the model needs \[.*; the source must be tiny"):
        sources._read_variables(model, file, start, None)


def test_features_are_those_that_the_last_layer_reads():
    model, variables = classifier(), random_variables(tiny())
    found = read_features(model.apply, variables, IMAGES[:3])
    fc = variables["params"]["fc"]
    logits = jax.jit(model.apply)(variables, IMAGES[:3])
    np.testing.assert_allclose(found @ fc["kernel"] + fc["bias"], logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in cross_structure.PRESETS if name.startswith("pretrained")])
def test_layers_that_presets_name_are_those_of_their_models(preset):
    config = cross_structure.PRESETS[preset]
    config.check()
    shapes, features = {}, {}
    for name in (config.source_model, config.target_model):
        if name == "small_vit":
            model = mj.models.ImageClassifier(images.make_vision_encoder(name, config.image_size), 100)
        else:
            model = images.make_model(name, 100, stages=3)
        x = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), np.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        shapes[name] = variables["params"]
        _, found = jax.eval_shape(
            lambda v, x, model=model: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"]),
            variables,
            x,
        )
        features[name] = found["intermediates"]
    target, source = features[config.target_model], features[config.source_model]
    for ours, theirs in config.agreeing_layers():
        assert {ours in target, theirs in source} == {True}
    routes = [route.split("=") for route in config.routes]
    transfer = mj.share_transfer([mj.Route(target, source) for target, source in routes])
    assert transfer.describe(shapes[config.source_model], shapes[config.target_model])
