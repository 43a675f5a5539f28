"""Vision transformers of Hugging Face files: they give what the published equations give, and go back as they were."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax import models
from tests.models.common import gelu
from tests.models.huggingface_files import (
    CHANNELS,
    IMAGE,
    LAYERS,
    PATCH,
    VIT_LAYER,
    WIDTH,
    assert_goes_back,
    attend_by_heads,
    model_of,
    params_of,
    tensors_of,
    torch_dense,
    torch_norm,
    vit_of,
    vit_params,
    vit_tensors,
    write,
)

IMAGES = np.random.default_rng(1).normal(size=(2, IMAGE, IMAGE, CHANNELS)).astype(np.float32)
heads = pytest.mark.parametrize("head", ["classes", None])


def vit_reference(head, tensors, images):
    """Returns what the published equations give, in float64 and one image, one patch and one head at a time."""
    dense, norm = (functools.partial(part, tensors) for part in (torch_dense, torch_norm))
    projection = "vit.embeddings.patch_embeddings.projection"
    found = []
    for image in images.astype(np.float64):
        rows = [tensors["vit.embeddings.cls_token"][0, 0]]
        for top in range(0, IMAGE, PATCH):
            for left in range(0, IMAGE, PATCH):
                patch = image[top : top + PATCH, left : left + PATCH]
                moved = np.einsum("hwc,ochw->o", patch, tensors[f"{projection}.weight"])
                rows.append(moved + tensors[f"{projection}.bias"])
        x = np.stack(rows) + tensors["vit.embeddings.position_embeddings"][0]
        for i in range(LAYERS):
            layer = f"{VIT_LAYER}.{i}"
            y = norm(f"{layer}.layernorm_before", x)
            query, key, value = (dense(f"{layer}.attention.attention.{part}", y) for part in ("query", "key", "value"))
            x = x + dense(f"{layer}.attention.output.dense", attend_by_heads(query, key, value))
            y = dense(f"{layer}.intermediate.dense", norm(f"{layer}.layernorm_after", x))
            x = x + dense(f"{layer}.output.dense", gelu(y))
        x = norm("vit.layernorm", x)
        found.append(dense("classifier", x[0]) if head else x)
    return np.stack(found)


@heads
def test_a_vision_transformer_of_a_file_gives_what_the_published_equations_give(head, tmp_path):
    tensors = vit_tensors(head)
    loaded = models.from_huggingface(write(tmp_path, tensors), vit_params(head))
    assert loaded.kept == ()
    found = np.asarray(jax.jit(vit_of(head).apply)({"params": loaded.params}, IMAGES), np.float64)
    np.testing.assert_allclose(found, vit_reference(head, tensors, IMAGES), atol=1e-5)


@heads
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_vision_transformer_goes_back_as_it_was(head, channels, tmp_path):
    tensors = vit_tensors(head, channels=channels)
    loaded = models.from_huggingface(write(tmp_path, tensors), vit_params(head, channels))
    if head is None:
        # A bare model's names have no prefix.
        tensors = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    assert_goes_back(tmp_path, loaded.params, tensors, num_channels=channels)


def test_the_pooler_of_a_bare_vision_transformer_is_left_and_a_missing_head_kept(tmp_path):
    tensors = {name.removeprefix("vit."): tensor for name, tensor in vit_tensors(None).items()}
    tensors["pooler.dense.weight"] = np.ones((WIDTH, WIDTH), np.float32)
    path = write(tmp_path, tensors)
    assert models.from_huggingface(path, vit_params(None)).kept == ()
    loaded = models.from_huggingface(path, vit_params("classes"))
    assert loaded.kept == ("classifier/bias", "classifier/kernel")
    for leaf, value in mj.flatten(loaded.params).items():
        assert (leaf in loaded.kept) == bool((value == 7.0).all()), leaf
    other = models.from_huggingface(write(tmp_path, vit_tensors("classes")), vit_params("classes", classes=5))
    assert other.kept == loaded.kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 3}, r"model\.safetensors has 2 layers, the model has 3"),
        (
            {"image_size": 16},
            r"has positions for 9 patches, the model for 16, in images of 16x16 pixels; resize_positions=True",
        ),
        ({"patch_size": 2}, r"has patches of 4x4 pixels of 3 channels, 48 numbers; those of the model have 12$"),
        ({"channels": 1}, r"has patches of 4x4 pixels of 3 channels, 48 numbers; those of the model have 16$"),
        ({"width": 16}, r"the tensor 'embeddings\.cls_token' of .* is \[1, 1, 8\], the model needs \[1, 1, 16\]"),
        ({"hidden": 16}, r"'encoder\.layer\.0\.output\.dense\.weight' of .* is \[8, 12\], the model needs \[8, 16\]"),
    ],
)
def test_a_file_that_does_not_fit_a_vision_transformer_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        models.from_huggingface(write(tmp_path, vit_tensors("classes")), vit_params("classes", **options))


def test_broken_files_of_a_vision_transformer_are_refused(tmp_path):
    tensors, params = vit_tensors(None), vit_params(None)
    bert = params_of(model_of("bert", None))
    with pytest.raises(ValueError, match="is of ViT, the model is a BERT"):
        models.from_huggingface(write(tmp_path, tensors), bert)
    with pytest.raises(ValueError, match="is of BERT, the model is a ViT"):
        models.from_huggingface(write(tmp_path, tensors_of("bert", None)), params)
    for name in ("embeddings.cls_token", "embeddings.position_embeddings", "layernorm.bias"):
        rest = {key: tensor for key, tensor in tensors.items() if key != f"vit.{name}"}
        with pytest.raises(ValueError, match=rf"lacks the tensors '{name}'$"):
            models.from_huggingface(write(tmp_path, rest), params)
    whole = {**tensors, "vit.embeddings.cls_token": np.ones((1, 1, WIDTH), np.int8)}
    with pytest.raises(ValueError, match=r"'embeddings\.cls_token' of .* is int8, expected floats"):
        models.from_huggingface(write(tmp_path, whole), params)
    flat = {**tensors, "vit.embeddings.patch_embeddings.projection.weight": np.ones((WIDTH, 48), np.float32)}
    with pytest.raises(ValueError, match=r"kernel of patches \[8, 48\], expected \[width, channels, p, p\]"):
        models.from_huggingface(write(tmp_path, flat), params)
    for shape, message in (((10,), r"is \[10\]"), ((10, WIDTH), r"is \[10, 8\], the model needs \[1, 10, 8\]")):
        odd = {**tensors, "vit.embeddings.position_embeddings": np.ones(shape, np.float32)}
        with pytest.raises(ValueError, match=message):
            models.from_huggingface(write(tmp_path, odd), params)


def test_params_of_no_vision_transformer_are_refused():
    params = vit_params(None)
    with pytest.raises(ValueError, match="did you mean 'params/patch/kernel'"):
        models.to_huggingface({"params": params})
    with pytest.raises(ValueError, match="params have the leaf 'mine/kernel', for which a ViT has no name"):
        models.to_huggingface({"encoder": params, "mine": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match="patches of 48 numbers are no squares of num_channels 1"):
        models.to_huggingface(params, num_channels=1)
    with pytest.raises(ValueError, match="num_channels must be a whole number of at least 1, got 0"):
        models.to_huggingface(params, num_channels=0)


def test_positions_of_another_grid_are_resized_where_that_is_asked_for(tmp_path):
    tensors = vit_tensors(None)
    path, params = write(tmp_path, tensors), vit_params(None, image_size=16)
    table = tensors["vit.embeddings.position_embeddings"][0]
    found = models.from_huggingface(path, params, resize_positions=True).params["position"]["embedding"]
    # PyTorch's cubic without antialiasing, a = -0.75, along both axes; outside the grid, its border counts again.
    weights = np.zeros((4, 3))
    for new in range(4):
        centre = (new + 0.5) * 3 / 4 - 0.5
        for old in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - old)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[new, min(max(old, 0), 2)] += near if d <= 1 else far
    grid = np.einsum("ai,bj,ijc->abc", weights, weights, table[1:].reshape(3, 3, WIDTH)).reshape(16, WIDTH)
    np.testing.assert_allclose(found, np.concatenate([table[:1], grid]), atol=1e-6)


def test_the_epsilon_of_the_configuration_is_the_models(tmp_path):
    path, params = write(tmp_path, vit_tensors(None)), vit_params(None)
    (tmp_path / "config.json").write_text(json.dumps({"layer_norm_eps": 1e-6}))
    with pytest.raises(ValueError, match=r"config\.json has layer_norm_eps 1e-06, the model has 1e-12"):
        models.from_huggingface(path, params)
    assert models.from_huggingface(path, params, epsilon=1e-6).kept == ()


def test_the_names_of_a_state_dict_of_transformers_5_are_those_of_its_files(tmp_path):
    newer = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "encoder.layer": "layers",
    }
    tensors, params = vit_tensors("classes"), vit_params("classes")
    expected = models.from_huggingface(write(tmp_path, tensors), params)
    for old, new in newer.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    assert "vit.layers.1.mlp.fc1.bias" in tensors
    found = models.from_huggingface(write(tmp_path, tensors), params)
    assert found.kept == ()
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
