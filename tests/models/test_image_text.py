import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from merge_jax import models
from tests.models import common
from tests.models.common import (
    attend,
    dense,
    feed_forward,
    in_float64,
    in_training,
    layer_shapes,
    learned,
    norm,
    random_params,
)
from tests.models.test_vit import IMAGES, encoded, tiny

CLS, SEP = 2, 3
TOKENS = np.array([[CLS, 5, 6, 7, 8, SEP, 0, 0], [CLS, 9, 10, SEP, 0, 0, 0, 0]], np.int32)


def text_encoder(**options):
    sizes = {"vocab_size": 20, "width": 12, "num_layers": 1, "num_heads": 3, "hidden": 10, "max_length": 8}
    return models.TextEncoder(**{**sizes, "num_segments": 0, "separator": SEP, **options})


ANSWERER = models.VisualAnswerer(tiny(num_layers=1), text_encoder(), 5, num_heads=2)
DEEP_ANSWERER = ANSWERER.clone(num_layers=2)
DUAL = models.DualEncoder(tiny(num_layers=1), text_encoder(), 6)
both = pytest.mark.parametrize("model", [ANSWERER, DUAL], ids=["answerer", "dual"])


@functools.cache
def initialised(model):
    """Returns parameters that are all random and far from 0: what starts at 0 or 1 would hide what it is for.

    Norms hold their size, so that something of the image is left at the end.
    """
    params = random_params(model, IMAGES, TOKENS)
    return mj.replace(params, {path: leaf + path.endswith("scale") for path, leaf in mj.flatten(params).items()})


def outputs(model, params, images=IMAGES, tokens=TOKENS, **options):
    return common.outputs(model, params, images, tokens, **options)


def read(params, text):
    """Returns what the published equations give for one text in one layer, `[L, width]`, in float64."""
    embeddings = params["embeddings"]
    x = embeddings["word"]["embedding"][text] + embeddings["position"]["embedding"][: len(text)]
    x = norm(embeddings["norm"], x)
    layer = params["layer_0"]
    x = norm(layer["norm1"], x + attend(layer["attention"], x, x, text > 0))
    return norm(layer["norm2"], x + feed_forward(layer, x))


def fused(params, image, text):
    """Returns what the described equations give for one image and its question, `[L, width]`, in float64."""
    seen = dense(params["image_projection"], encoded(params["image_encoder"], image))
    x = read(params["text_encoder"], text)
    for i in range(2):
        layer = params[f"fusion_{i}"]
        x = norm(layer["norm1"], x + attend(layer["cross_attention"], x, seen))
        x = norm(layer["norm2"], x + attend(layer["attention"], x, x, text > 0))
        x = norm(layer["norm3"], x + feed_forward(layer, x))
    return x


def test_an_answer_is_that_of_the_described_equations():
    params = initialised(DEEP_ANSWERER)
    exact = in_float64(params)
    first = [fused(exact, image, text)[0] for image, text in zip(IMAGES, TOKENS, strict=True)]
    logits = outputs(DEEP_ANSWERER, params)
    assert logits.shape == (2, 5)
    np.testing.assert_allclose(logits, dense(exact["answer"], np.stack(first)), atol=1e-5)


def test_embeddings_are_those_of_the_published_equations():
    params = initialised(DUAL)
    exact = in_float64(params)
    found = outputs(DUAL, params)
    for vectors, name, encode, inputs in (
        (found.image, "image", encoded, IMAGES),
        (found.text, "text", read, TOKENS),
    ):
        first = np.stack([encode(exact[f"{name}_encoder"], one)[0] for one in inputs])
        expected = first @ exact[f"{name}_projection"]["kernel"]
        expected /= np.sqrt((expected**2).sum(-1, keepdims=True))
        assert vectors.shape == (2, 6)
        np.testing.assert_allclose(vectors, expected, atol=1e-5, err_msg=name)


def test_leaves_have_readable_names():
    def leaves(model):
        params = jax.eval_shape(model.init, jax.random.key(0), IMAGES, TOKENS)["params"]
        for name in ("image_encoder", "text_encoder"):
            encoder, inputs = (model.image_encoder, IMAGES) if name[0] == "i" else (model.text_encoder, TOKENS)
            below = jax.eval_shape(encoder.init, jax.random.key(0), inputs)["params"]
            assert jax.tree.map(jnp.shape, params.pop(name)) == jax.tree.map(jnp.shape, below)
        return {path: leaf.shape for path, leaf in mj.flatten(params).items()}

    layer = layer_shapes(12, 2, 10, attentions=("cross_attention", "attention"))
    fusion = {f"fusion_{i}/{path}": shape for i in range(2) for path, shape in layer.items()}
    projection = {"image_projection/kernel": (8, 12), "image_projection/bias": (12,)}
    answer = {"answer/kernel": (12, 5), "answer/bias": (5,)}
    assert leaves(DEEP_ANSWERER) == {**projection, **fusion, **answer}
    of_one_width = ANSWERER.clone(text_encoder=text_encoder(width=8, num_heads=2))
    assert not [path for path in leaves(of_one_width) if path.startswith("image_projection")]
    assert leaves(DUAL) == {"image_projection/kernel": (8, 6), "text_projection/kernel": (12, 6), "log_scale": ()}


@pytest.mark.slow
def test_kernels_of_the_fusion_start_xavier_uniformly():
    model = models.VisualAnswerer(tiny(), models.TextEncoder(20, 64, 1, 4, 128, 8, separator=SEP), 64)
    leaves = mj.flatten(jax.jit(model.init)(jax.random.key(0), IMAGES, TOKENS)["params"])
    kernels = [path for path in leaves if path.endswith("kernel") and "encoder" not in path]
    assert len(kernels) == 1 + 8 + 2 + 1
    for path in kernels:
        fans = 2 * 64 if "attention" in path else sum(leaves[path].shape)
        np.testing.assert_allclose(leaves[path].std(), np.sqrt(2 / fans), rtol=0.1, err_msg=path)


@both
def test_padding_changes_nothing(model):
    params = initialised(model)
    short, full = (outputs(model, params, tokens=tokens) for tokens in (TOKENS[:, :6], TOKENS))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), short, full)


def test_an_answer_needs_its_image_and_its_question():
    params = initialised(ANSWERER)
    logits = outputs(ANSWERER, params)
    for other in (outputs(ANSWERER, params, images=IMAGES[::-1]), outputs(ANSWERER, params, tokens=TOKENS[::-1])):
        assert jnp.abs(other - logits).max() > 0.01
    both_turned = outputs(ANSWERER, params, IMAGES[::-1], TOKENS[::-1])
    np.testing.assert_allclose(both_turned, logits[::-1], atol=1e-5)


@pytest.mark.slow
def test_dropout_of_the_fusion_is_after_each_block_and_before_the_answer():
    model, params = ANSWERER.clone(dropout_rate=0.5), initialised(ANSWERER)
    logits, found = in_training(model, params, IMAGES, TOKENS)
    dropped = found["fusion_0"]["Dropout_0"]["__call__"]
    assert len(dropped) == 3
    (last,) = found["Dropout_0"]["__call__"]
    for one in (*dropped, last):
        assert 0.2 < (one == 0).mean() < 0.8
    np.testing.assert_allclose(logits, dense(in_float64(params["answer"]), in_float64(last)), atol=1e-5)


def test_images_and_texts_are_embedded_alone_too_and_in_any_number():
    variables = {"params": initialised(DUAL)}
    found = outputs(DUAL, variables["params"])
    images = jax.jit(functools.partial(DUAL.apply, method="embed_images"))(variables, IMAGES)
    texts = jax.jit(functools.partial(DUAL.apply, method="embed_texts"))(variables, TOKENS)
    np.testing.assert_allclose(images, found.image, atol=1e-6)
    np.testing.assert_allclose(texts, found.text, atol=1e-6)
    shapes = jax.eval_shape(DUAL.apply, variables, IMAGES, TOKENS[:1])
    assert jax.tree.map(jnp.shape, shapes) == ((2, 6), (1, 6), ())


def test_the_scale_starts_at_the_published_one_and_is_at_most_100():
    params = initialised(DUAL)
    start = jax.jit(DUAL.init)(jax.random.key(0), IMAGES, TOKENS)["params"]["log_scale"]
    np.testing.assert_allclose(start, np.log(1 / 0.07), rtol=1e-6)
    for log_scale, expected in ((0.5, np.exp(0.5)), (2.5, np.exp(2.5)), (4.7, 100), (1e3, 100)):
        np.testing.assert_allclose(
            outputs(DUAL, {**params, "log_scale": jnp.float32(log_scale)}).scale, expected, rtol=1e-6
        )


def test_vectors_of_nothing_stay_nothing_with_a_finite_gradient():
    params = initialised(DUAL)
    params = {**params, "image_projection": {"kernel": jnp.zeros((8, 6))}}
    np.testing.assert_array_equal(outputs(DUAL, params).image, 0)

    def loss(params):
        found = DUAL.apply({"params": params}, IMAGES, TOKENS)
        return jnp.sum(found.image @ found.text.T)

    for path, leaf in mj.flatten(jax.jit(jax.grad(loss))(params)).items():
        assert np.isfinite(leaf).all(), path


SMALL = models.tiny_vit(6, 3, num_layers=1), models.small_distilbert(20, num_layers=1, separator=SEP)


@pytest.mark.slow
def test_an_answerer_learns_what_takes_both_image_and_question():
    """The answer is whether image and question have the same number: neither tells it alone."""
    model = models.VisualAnswerer(*SMALL, 2)
    images, tokens = np.concatenate([IMAGES, IMAGES]), np.concatenate([TOKENS, TOKENS[::-1]])

    def loss(params, key):
        logits = model.apply({"params": params}, images, tokens, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, np.array([1, 1, 0, 0])).mean()

    losses = learned(model, loss, 100, (IMAGES, TOKENS))
    assert losses[0] > 0.4
    assert max(losses[-10:]) < 0.1


@pytest.mark.slow
def test_a_dual_encoder_learns_which_text_belongs_to_which_image():
    model = models.DualEncoder(*SMALL, 16)

    def loss(params, key):
        found = model.apply({"params": params}, IMAGES, TOKENS, train=True, rngs={"dropout": key})
        logits = found.scale * found.image @ found.text.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, np.arange(2)).mean()

    assert max(learned(model, loss, 60, (IMAGES, TOKENS))[-10:]) < 0.1


@pytest.mark.slow
def test_attention_moves_between_the_encoders_of_one_model():
    model = models.VisualAnswerer(models.small_vit(6, 3), models.small_distilbert(20, separator=SEP), 5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES, TOKENS)["params"]
    image_blocks, text_blocks = "image_encoder/*/attention", "text_encoder/*/attention"
    routes = mj.match(shapes, shapes, source=image_blocks, target=text_blocks, view="attention")
    assert routes == {f"text_encoder/layer_{i}/attention": f"image_encoder/layer_{2 * i + 1}/attention" for i in (0, 1)}
    back = mj.match(shapes, shapes, source=text_blocks, target=image_blocks, view="attention")
    assert back == {f"image_encoder/layer_{i}/attention": f"text_encoder/layer_{i // 2}/attention" for i in range(4)}

    params = initialised(ANSWERER)
    routes = mj.match(params, params, source=image_blocks, target=text_blocks, view="attention")
    # The attentions of the fusion are such blocks too.
    routes["fusion_0/cross_attention"] = "image_encoder/layer_0/attention"
    transfer = mj.lpka_transfer(routes, view="attention", num_layers=1, num_heads=2)
    adapter = jax.jit(transfer.init)(jax.random.key(1), params, params)
    merged = mj.flatten(jax.jit(transfer.apply)(adapter, params, params))
    changed = {path for path, leaf in mj.flatten(params).items() if not np.array_equal(leaf, merged[path])}
    assert changed == {f"{block}/{name}/kernel" for block in routes for name in ("query", "key", "value", "out")}


@pytest.mark.parametrize(
    ("model", "images", "tokens", "message"),
    [
        (ANSWERER.clone(num_answers=0), IMAGES, TOKENS, "num_answers must be a whole number of at least 1, got 0"),
        (ANSWERER.clone(num_layers=0), IMAGES, TOKENS, "num_layers must be a whole number of at least 1, got 0"),
        (ANSWERER.clone(num_heads=5), IMAGES, TOKENS, "5 heads do not divide the width 12"),
        (ANSWERER.clone(dropout_rate=-0.1), IMAGES, TOKENS, r"dropout_rate must lie in \[0, 1\), got -0.1"),
        (ANSWERER, IMAGES[:1], TOKENS, "each question needs its image, got 1 images and 2 questions"),
        (ANSWERER, IMAGES[:, :3], TOKENS, r"images must be floats \[B, 6, 6, C\], got float32 \[2, 3, 6, 2\]"),
        (ANSWERER, IMAGES, TOKENS[0], r"tokens must be whole numbers \[B, L\], got int32 \[8\]"),
        (DUAL.clone(embedding_size=0), IMAGES, TOKENS, "embedding_size must be a whole number of at least 1, got 0"),
        (DUAL, IMAGES[..., 0], TOKENS, r"images must be floats \[B, 6, 6, C\], got float32 \[2, 6, 6\]"),
        (DUAL, IMAGES, np.tile(TOKENS, (1, 2)), "texts of 16 tokens do not fit in 8 positions"),
    ],
)
def test_what_does_not_fit_is_named(model, images, tokens, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), images, tokens)
