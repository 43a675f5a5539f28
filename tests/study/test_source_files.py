"""Files of weights as frozen sources: of every format, and vision transformers of every origin."""

import json
from dataclasses import replace

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import merge_jax as mj
from experiments import cross_structure
from merge_jax import study
from merge_jax.study import sources
from merge_jax.study.models import images, pretrained
from tests.models import huggingface_files, test_vit_files
from tests.models.test_efficientnet import random_variables
from tests.study.test_pretrained import DATA, IMAGES, LABELS, started

STAGES = (mj.models.ResNetStage(4, 1, 1),)


def resnet():
    module = images.make_model("resnet18_imagenet_half", 3, stages=3).clone(stages=STAGES)
    return module, images.image_classifier("tiny", module, DATA, optimizer=lambda steps: None)


def write_npz(file, tensors):
    np.savez(file, **tensors)


def write_msgpack(file, tensors):
    tree = {}
    for name, tensor in tensors.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tensor
    file.write_bytes(flax.serialization.to_bytes(tree))


def write_orbax(file, tensors):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(file, tensors)


def write_onnx(file, tensors):
    onnx = pytest.importorskip("onnx")
    held = [onnx.numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], held)), file)


def write_torch(file, tensors):
    torch = pytest.importorskip("torch")
    wrapped = {f"module.{name}": torch.from_numpy(tensor) for name, tensor in tensors.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, file)


WRITERS = {
    "m.npz": write_npz,
    "m.msgpack": write_msgpack,
    "orbax": write_orbax,
    "m.onnx": write_onnx,
    "m.bin": write_torch,
    "m.safetensors": mj.save_safetensors,
}


@pytest.mark.parametrize(("name", "write"), WRITERS.items(), ids=WRITERS)
def test_a_source_is_read_of_any_format(name, write, tmp_path):
    module, model = resnet()
    variables = random_variables(module)
    write(tmp_path / name, mj.models.to_pytorch(variables))
    shapes = jax.eval_shape(lambda: started(model))
    sources._read_variables(model, tmp_path / name, shapes, None)
    source = sources._read_file(model, tmp_path / name, started(model), seed=0)
    jax.tree.map(np.testing.assert_array_equal, source.params, variables["params"])


def test_a_model_of_keras_is_refused_as_a_source_with_its_names(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")]).save(tmp_path / "m.keras")
    model = resnet()[1]
    with pytest.raises(ValueError, match=r"lacks the tensors 'layer1.*'fc\.kernel'; the source must be tiny"):
        sources._read_variables(model, tmp_path / "m.keras", jax.eval_shape(lambda: started(model)), None)


def cut(size, num_classes):
    part = {"image": IMAGES[:, :size, :size], "label": LABELS % num_classes}
    splits = mj.data.Splits(part, part, part)
    return replace(DATA, shape=(size, size, 3), num_classes=num_classes, splits=lambda seed: splits)


def vit_file(folder, library):
    """A file of a vision transformer of a library, with seven classes, and its heads where no tensor tells them."""
    if library != "huggingface":
        suffix = ".safetensors" if library == "timm" else ".npz"
        return test_vit_files.write(folder, test_vit_files.tensors_of(library), suffix)
    config = {"num_attention_heads": huggingface_files.HEADS, "layer_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))
    return huggingface_files.write(folder, huggingface_files.vit_tensors("classes"))


@pytest.mark.parametrize("library", [*test_vit_files.LIBRARIES, "huggingface"])
def test_a_vision_transformer_of_a_file_is_a_source(library, tmp_path):
    file = vit_file(tmp_path, library)
    side = mj.models.vision_transformer_of(file, num_heads=2).patch_size
    size = 4 * side if library == "timm" else 3 * side  # Of timm, a grid of another size.
    data = cut(size, 9)
    model = study.vit_of_file(file, data, num_heads=2, labels=None)
    shapes = jax.eval_shape(lambda: started(model))
    planned = sources._read_variables(model, file, shapes, None)
    assert planned["params"]["classifier"]["kernel"].shape[1] == 9
    encoder = mj.models.vision_transformer_of(file, num_heads=2, image_size=size)
    whole = {"params": {**shapes.params, "classifier": planned["params"]["classifier"]}}
    loaded = mj.models.load_vision_transformer(file, whole, epsilon=encoder.epsilon, resize_positions=True)
    assert set(loaded.kept) == {"params/classifier/kernel", "params/classifier/bias"}
    found, expected = mj.flatten(planned["params"]["encoder"]), mj.flatten(loaded.variables["params"]["encoder"])
    assert all(np.array_equal(found[path], leaf) for path, leaf in expected.items())


def test_the_last_layer_of_a_vision_transformer_is_fitted(tmp_path, monkeypatch):
    head = mj.training.Head(np.full((test_vit_files.WIDTH, 2), 0.5, np.float32), np.ones(2, np.float32))
    monkeypatch.setattr(pretrained, "fitted_head", lambda *given: head)
    file = vit_file(tmp_path, "timm")
    model = study.vit_of_file(file, cut(16, 2), num_heads=2, labels=None)
    shapes = jax.eval_shape(lambda: started(model)).params
    start = {"params": jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)}
    params = model.load_pretrained(file, start, 0)["params"]
    np.testing.assert_array_equal(params["classifier"]["kernel"], head.kernel)
    np.testing.assert_array_equal(params["classifier"]["bias"], head.bias)


def test_what_is_no_source_of_a_vision_transformer_is_refused(tmp_path):
    file = vit_file(tmp_path, "timm")
    for path, data, heads, message in (
        (None, DATA, 2, "is a file's network: give --source frozen --source-from FILE"),
        (file, DATA, None, "no tensor of .* tells its number of heads: give --source-heads"),
        (file, DATA, 3, f"--source-heads is 3, which does not divide the width {test_vit_files.WIDTH} of"),
        (file, DATA, 0, "--source-heads must be a whole number of at least 1, got 0"),
        (file, replace(DATA, shape=(9, 9, 3)), 2, "which do not fill images of 9x9x3: give --image-size a multiple of"),
        (file, replace(DATA, shape=(8, 8, 1)), 2, "which do not fill images of 8x8x1"),
    ):
        with pytest.raises(ValueError, match=message):
            study.vit_of_file(path, data, num_heads=heads, labels=None)
    config = replace(cross_structure.PRESETS["pretrained"], source_model="vit_of_file", source_heads=3)
    config.check()
    with pytest.raises(ValueError, match="source_heads is for source_model vit_of_file, got small_resnet"):
        replace(cross_structure.PRESETS["smoke"], source_heads=3).check()
