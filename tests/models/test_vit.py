import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax import models
from tests.models.common import (
    attend,
    count,
    dense,
    feed_forward,
    in_float64,
    in_training,
    layer_shapes,
    learned,
    norm,
    outputs,
    random_params,
)

SIZE, PATCH, CHANNELS = 6, 3, 2
IMAGES = np.random.default_rng(1).normal(size=(2, SIZE, SIZE, CHANNELS)).astype(np.float32)
TOKENS = np.array([[2, 5, 6, 3, 0]], np.int32)

TINY = {"image_size": SIZE, "patch_size": PATCH, "width": 8, "num_layers": 2, "num_heads": 2, "hidden": 12}


def tiny(**options):
    return models.VisionTransformer(**{**TINY, **options})


MODEL = models.ImageClassifier(tiny(), 3)


initialised = functools.cache(lambda model: random_params(model, IMAGES))


def encoded(params, image, patch_size=PATCH, epsilon=1e-12):
    """Returns what the published equations give for one image, `[1 + P, width]`, in float64."""
    starts = range(0, len(image), patch_size)
    patches = [image[i : i + patch_size, j : j + patch_size].ravel() for i in starts for j in starts]
    x = np.stack([params["class_token"], *dense(params["patch"], np.stack(patches))])
    x = x + params["position"]["embedding"]
    for i in range(sum(name.startswith("layer_") for name in params)):
        layer = params[f"layer_{i}"]
        y = norm(layer["norm1"], x, epsilon)
        x = x + attend(layer["attention"], y, y)
        x = x + feed_forward(layer, norm(layer["norm2"], x, epsilon))
    return norm(params["norm"], x, epsilon)


@pytest.mark.parametrize("epsilon", [1e-12, 0.5])
def test_a_forward_pass_is_that_of_the_published_equations(epsilon):
    model = MODEL.clone(encoder=tiny(epsilon=epsilon))
    params = initialised(MODEL)
    exact = in_float64(params)
    expected = np.stack([encoded(exact["encoder"], image, epsilon=epsilon) for image in IMAGES])
    found = outputs(model.encoder, params["encoder"], IMAGES)
    assert found.shape == (2, 5, 8)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(outputs(model, params, IMAGES), dense(exact["classifier"], expected[:, 0]), atol=1e-5)


def test_the_published_model_has_the_published_number_of_parameters():
    params = jax.eval_shape(models.vit_base().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    assert count(params) == 85_798_656


def test_small_encoders_differ_in_all_sizes():
    small, tiny = models.small_vit(16), models.tiny_vit(8, 2, dtype=jnp.bfloat16)
    assert (small.image_size, small.patch_size, small.num_layers, small.width, small.hidden) == (16, 4, 4, 64, 256)
    assert (tiny.image_size, tiny.patch_size, tiny.num_layers, tiny.width, tiny.hidden) == (8, 2, 2, 48, 192)
    assert (small.num_heads, tiny.num_heads, tiny.dtype) == (4, 4, jnp.bfloat16)


def test_leaves_have_readable_names():
    params = jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)["params"]
    assert {path: leaf.shape for path, leaf in mj.flatten(params).items()} == {
        "encoder/patch/kernel": (18, 8),
        "encoder/patch/bias": (8,),
        "encoder/class_token": (8,),
        "encoder/position/embedding": (5, 8),
        **{f"encoder/layer_{i}/{path}": shape for i in range(2) for path, shape in layer_shapes(8, 2, 12).items()},
        "encoder/norm/scale": (8,),
        "encoder/norm/bias": (8,),
        "classifier/kernel": (8, 3),
        "classifier/bias": (3,),
    }


def test_leaves_start_as_described():
    model = models.ImageClassifier(models.VisionTransformer(64, 4, 64, 1, 4, 128), 64)
    leaves = mj.flatten(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"])
    for path, leaf in leaves.items():
        if path.endswith("kernel"):
            # All kernels of an attention are 64 by 64 once heads are one axis.
            fans = 2 * 64 if "attention" in path else sum(leaf.shape)
            assert jnp.abs(leaf).max() <= np.sqrt(6 / fans), path
            np.testing.assert_allclose(leaf.std(), np.sqrt(2 / fans), rtol=0.05, err_msg=path)
        elif path.endswith(("embedding", "class_token")):
            np.testing.assert_allclose(leaf.std(), 1 / 8, rtol=0.05 if leaf.ndim == 2 else 0.3, err_msg=path)
        else:
            np.testing.assert_array_equal(leaf, 1.0 if path.endswith("scale") else 0.0, err_msg=path)


def test_dropout_is_on_embeddings_and_after_each_block():
    _, found = in_training(tiny(dropout_rate=0.5), initialised(MODEL)["encoder"], IMAGES)
    dropped = [found[place]["Dropout_0"]["__call__"] for place in ("layer_0", "layer_1")]
    assert list(map(len, dropped)) == [2, 2]
    assert len(found["Dropout_0"]["__call__"]) == 1
    for one in jax.tree.leaves([dropped, found["Dropout_0"]]):
        assert 0.3 < (one == 0).mean() < 0.7


@pytest.mark.slow
def test_an_image_classifier_learns_where_a_patch_is():
    """All images have the same patches, so that positions alone tell them apart."""
    model = models.ImageClassifier(models.tiny_vit(4, 2), 4)
    images = np.zeros((4, 4, 4, 1), np.float32)
    for i in range(4):
        images[i, 2 * (i // 2) :, 2 * (i % 2) :][:2, :2] = 1
    loss_fn = mj.classification_loss(model.apply)

    def loss(params, key):
        return loss_fn(params, {}, {"image": images, "label": jnp.arange(4)}, key)[0]

    losses = learned(model, loss, 60, (images,))
    assert losses[0] > 1
    assert losses[-1] < 0.1


@pytest.mark.slow
def test_attention_moves_between_images_and_texts():
    image_model = models.ImageClassifier(models.small_vit(SIZE, PATCH), 3)
    text_model = models.TextClassifier(models.small_distilbert(20, separator=3), 2, "relu")
    source = jax.jit(image_model.init)(jax.random.key(0), IMAGES)["params"]
    target = jax.jit(text_model.init)(jax.random.key(1), TOKENS)["params"]
    blocks = "encoder/*/attention"
    routes = mj.match(source, target, source=blocks, target=blocks, view="attention")
    assert routes == {f"encoder/layer_{i}/attention": f"encoder/layer_{2 * i + 1}/attention" for i in range(2)}
    back = mj.match(target, source, source=blocks, target=blocks, view="attention")
    assert back == {f"encoder/layer_{i}/attention": f"encoder/layer_{i // 2}/attention" for i in range(4)}
    transfer = mj.lpka_transfer(routes, view="attention", num_layers=1, num_heads=2)
    adapter = jax.jit(transfer.init)(jax.random.key(2), source, target)
    merged = mj.flatten(jax.jit(transfer.apply)(adapter, source, target))
    kernels = ("query", "key", "value", "out")
    changed = {path for path, leaf in mj.flatten(target).items() if not np.array_equal(leaf, merged[path])}
    assert changed == {f"encoder/layer_{i}/attention/{kernel}/kernel" for i in range(2) for kernel in kernels}
    # In the warm form, a new adapter gives the source's overlapping block: heads of 12 by 48 in heads of 16 by 64.
    taken = mj.flatten(source)["encoder/layer_1/attention/query/kernel"][:48, :, :12]
    np.testing.assert_allclose(merged["encoder/layer_0/attention/query/kernel"], taken, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        (tiny(width=9), IMAGES, "2 heads do not divide the width 9"),
        (tiny(num_layers=0), IMAGES, "num_layers must be a whole number of at least 1, got 0"),
        (tiny(patch_size=1.5), IMAGES, "patch_size must be a whole number of at least 1, got 1.5"),
        (tiny(patch_size=4), IMAGES, "patch_size 4 does not divide image_size 6"),
        (tiny(dropout_rate=1.0), IMAGES, r"dropout_rate must lie in \[0, 1\), got 1.0"),
        (tiny(dtype=jnp.int32), IMAGES, "dtype must be a float type, such as jnp.bfloat16, got"),
        (tiny(image_size=9), IMAGES, r"images must be floats \[B, 9, 9, C\], got float32 \[2, 6, 6, 2\]"),
        (tiny(), IMAGES[:, :3], r"images must be floats \[B, 6, 6, C\], got float32 \[2, 3, 6, 2\]"),
        (tiny(), IMAGES[..., 0], r"images must be floats \[B, 6, 6, C\], got float32 \[2, 6, 6\]"),
        (tiny(), IMAGES.astype(np.uint8), r"images must be floats \[B, 6, 6, C\], got uint8 \[2, 6, 6, 2\]"),
        (models.ImageClassifier(tiny(), 0), IMAGES, "num_classes must be a whole number of at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named(model, images, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), images)
