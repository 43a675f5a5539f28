import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax import models
from merge_jax.models.transformer import _Embeddings, _Layer, _segments
from tests.models.common import (
    count,
    in_training,
    layer_shapes,
    learned,
    outputs,
    random_params,
)

CLS, SEP = 2, 3
TOKENS = np.array([[CLS, 5, 6, SEP, 7, 8, 9, SEP, 0, 0], [CLS, 5, SEP, 10, 11, SEP, 0, 0, 0, 0]], np.int32)
SEGMENTS = [[0, 0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]]

TINY = {"vocab_size": 20, "width": 8, "num_layers": 1, "num_heads": 2, "hidden": 12, "max_length": 10, "separator": SEP}


def tiny(**options):
    return models.TextEncoder(**{**TINY, **options})


MODELS = {
    "bert": models.TextClassifier(tiny(), 3),
    "bert, spans": models.SpanExtractor(tiny()),
    "distilbert": models.TextClassifier(tiny(num_segments=0), 3, "relu"),
    "distilbert, spans": models.SpanExtractor(tiny(num_segments=0)),
    "mean": models.TextClassifier(tiny(), 3, "mean"),
}


initialised = functools.cache(lambda model: random_params(model, TOKENS))


def test_published_models_have_the_published_number_of_parameters():
    tokens = jnp.zeros((1, 8), jnp.int32)
    bert = models.TextClassifier(models.bert_base(), 2)
    params = jax.eval_shape(bert.init, jax.random.key(0), tokens)["params"]
    assert count(params) - count(params["classifier"]) == 109_482_240
    distilbert = jax.eval_shape(models.distilbert_base().init, jax.random.key(0), tokens)["params"]
    assert count(distilbert) == 66_362_880


def test_small_encoders_differ_in_all_sizes():
    bert, distilbert = models.small_bert(120), models.small_distilbert(120, max_length=16)
    assert (bert.num_layers, bert.width, bert.num_segments, bert.max_length) == (4, 64, 2, 128)
    assert (distilbert.num_layers, distilbert.width, distilbert.num_segments, distilbert.max_length) == (2, 48, 0, 16)


def test_leaves_have_readable_names():
    model = models.SpanExtractor(tiny(num_layers=2))
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    found = {path: leaf.shape for path, leaf in mj.flatten(params).items()}
    assert found == {
        "encoder/embeddings/word/embedding": (20, 8),
        "encoder/embeddings/position/embedding": (10, 8),
        "encoder/embeddings/segment/embedding": (2, 8),
        "encoder/embeddings/norm/scale": (8,),
        "encoder/embeddings/norm/bias": (8,),
        **{f"encoder/layer_{i}/{path}": shape for i in range(2) for path, shape in layer_shapes(8, 2, 12).items()},
        "qa_outputs/kernel": (8, 2),
        "qa_outputs/bias": (2,),
    }


def test_kernels_and_embeddings_start_as_published():
    model = models.TextClassifier(models.TextEncoder(500, 64, 1, 4, 128, 64), 64)
    leaves = mj.flatten(jax.jit(model.init)(jax.random.key(0), TOKENS)["params"])
    random = {path: leaf for path, leaf in leaves.items() if path.endswith(("kernel", "embedding"))}
    assert len(random) == 3 + 6 + 2
    for path, leaf in random.items():
        assert jnp.abs(leaf).max() <= 0.04 * 1.14, path
        # A normal cut at two deviations has 0.88 of its deviation.
        assert abs(leaf).std() > 0.4 * 0.02, path
        np.testing.assert_allclose(leaf.std(), 0.02 * 0.88, rtol=0.3 if "segment" in path else 0.05, err_msg=path)
    for path in leaves.keys() - random:
        np.testing.assert_array_equal(leaves[path], 1.0 if path.endswith("scale") else 0.0, err_msg=path)


def test_segments_are_those_of_berts_tokenizers():
    np.testing.assert_array_equal(_segments(jnp.asarray(TOKENS), SEP), SEGMENTS)
    alone = jnp.array([[CLS, 5, 6, SEP, 0, 0]])
    np.testing.assert_array_equal(_segments(alone, SEP), jnp.zeros_like(alone))


@pytest.mark.parametrize("num_segments", [pytest.param(2, marks=pytest.mark.slow), 0])
def test_padding_changes_nothing_elsewhere(num_segments):
    encoder = tiny(num_segments=num_segments, num_layers=2)
    short, full = (outputs(encoder, initialised(encoder), tokens) for tokens in (TOKENS[:, :8], TOKENS))
    np.testing.assert_allclose(short, full[:, :8], atol=1e-5)


def test_dropout_is_in_berts_places():
    model = models.TextClassifier(tiny(dropout_rate=0.5), 3)
    params = initialised(model)
    logits, found = in_training(model, params, TOKENS)
    places = [found["encoder"]["embeddings"], found["encoder"]["layer_0"], found]
    dropped = [place["Dropout_0"]["__call__"] for place in places]
    assert list(map(len, dropped)) == [1, 2, 1]
    for one in jax.tree.leaves(dropped):
        assert 0.3 < (one == 0).mean() < 0.7
    last = params["classifier"]
    np.testing.assert_allclose(logits, dropped[-1][0] @ last["kernel"] + last["bias"][None], atol=1e-5)


def test_attention_weights_of_equal_texts_are_dropped_apart():
    layer = _Layer(num_heads=2, hidden=12, dropout_rate=0.5, dtype=jnp.float32)
    x, mask = jnp.tile(jax.random.normal(jax.random.key(0), (1, 5, 8)), (2, 1, 1)), jnp.ones((2, 1, 1, 5), bool)
    params = initialised(MODELS["bert"])["encoder"]["layer_0"]
    _, found = in_training(layer, params, x, mask)
    (attended,) = found["attention"]["__call__"]
    assert jnp.abs(attended[0] - attended[1]).max() > 0.1 * jnp.abs(attended).max()


def test_in_bfloat16_a_token_of_a_thousand_texts_has_a_thousand_gradients():
    """Flax's Embed sums the gradient of a row in its dtype, and bfloat16 loses each use after 256 (0.12.8)."""
    tokens = jnp.full((1000, 1), 5, jnp.int32)
    layer = _Embeddings(8, 4, 1, 0, 0.0, jnp.bfloat16)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), tokens, tokens, train=False))
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), shapes)

    @jax.jit
    def gradient(tokens):
        def loss(params):
            return layer.apply(params, tokens, tokens, train=False)[..., 0].astype(jnp.float32).sum()

        return jax.grad(loss)(params)["params"]["word"]["embedding"][5]

    one = gradient(tokens[:1])
    np.testing.assert_allclose(gradient(tokens), 1000 * one, atol=10 * np.abs(one).max())


def test_an_answer_is_in_the_passage_or_at_the_first_token():
    for name in ("bert, spans", "distilbert, spans"):
        logits = outputs(MODELS[name], initialised(MODELS[name]), TOKENS)
        answerable = (np.array(SEGMENTS) == 1) & (TOKENS != SEP)
        answerable[:, 0] = True
        assert logits.shape == (2, 10, 2)
        np.testing.assert_array_equal(logits[~answerable], -1e9)
        assert (jnp.abs(logits[answerable]) < 100).all()


def test_the_mean_of_a_text_is_of_its_tokens_alone():
    model = MODELS["mean"]
    params = initialised(model)
    assert params.keys() == {"encoder", "classifier"}
    tokens = np.concatenate([TOKENS, np.zeros_like(TOKENS[:1])])
    _, (features,) = jax.jit(mj.objectives.with_features(model.apply))({"params": params}, tokens)
    x = np.asarray(outputs(model.encoder, params["encoder"], tokens), np.float64)
    expected = [x[0, :8].mean(axis=0), x[1, :6].mean(axis=0), np.zeros(8)]  # The last has none.
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_half_a_minilm_has_heads_of_the_same_width():
    whole, half = models.minilm(), models.minilm_half()
    for name in ("num_layers", "width", "num_heads", "hidden"):
        assert getattr(half, name) * 2 == getattr(whole, name), name
    assert whole.width // whole.num_heads == half.width // half.num_heads == 32
    assert (whole.vocab_size, whole.max_length) == (half.vocab_size, half.max_length) == (30522, 512)
    params = jax.eval_shape(whole.init, jax.random.key(0), TOKENS)["params"]
    assert count(params) == 22_713_216 - 384 * 385  # As published, which counts the pooler.


@pytest.mark.slow
def test_a_text_classifier_learns_as_the_librarys_classifiers_do():
    model = models.TextClassifier(tiny(dropout_rate=0.1), 2)
    loss_fn = mj.classification_loss(model.apply, inputs="tokens")
    batch = {"tokens": TOKENS, "label": np.array([0, 1])}

    losses = learned(model, lambda params, key: loss_fn(params, {}, batch, key)[0], 60, (TOKENS,), 1e-2)
    np.testing.assert_allclose(losses[0], np.log(2), atol=0.1)
    assert losses[-1] < 0.1


@pytest.mark.slow
def test_attention_moves_from_a_question_model_to_a_sentiment_model():
    source_model = models.SpanExtractor(models.small_bert(20, separator=SEP))
    target_model = models.TextClassifier(models.small_distilbert(20, separator=SEP), 2, "relu")
    source, target = (
        jax.jit(model.init)(jax.random.key(i), TOKENS)["params"] for i, model in enumerate((source_model, target_model))
    )
    blocks = "encoder/*/attention"
    routes = mj.match(source, target, source=blocks, target=blocks, view="attention")
    assert routes == {f"encoder/layer_{i}/attention": f"encoder/layer_{2 * i + 1}/attention" for i in range(2)}
    transfer = mj.lpka_transfer(routes, view="attention", num_layers=1, num_heads=2)
    adapter = transfer.init(jax.random.key(2), source, target)
    merged = jax.jit(transfer.apply)(adapter, source, target)
    before, after = mj.flatten(target), mj.flatten(merged)
    assert {path: leaf.shape for path, leaf in after.items()} == {path: leaf.shape for path, leaf in before.items()}
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    kernels = ("query", "key", "value", "out")
    assert changed == {f"encoder/layer_{i}/attention/{kernel}/kernel" for i in range(2) for kernel in kernels}
    # In the warm form, a new adapter gives the source's overlapping block: heads of 12 by 48 in heads of 16 by 64.
    taken = mj.flatten(source)["encoder/layer_1/attention/query/kernel"][:48, :, :12]
    np.testing.assert_allclose(after["encoder/layer_0/attention/query/kernel"], taken, atol=1e-5)
    assert np.isfinite(target_model.apply({"params": merged}, TOKENS)).all()


@pytest.mark.parametrize(
    ("model", "tokens", "message"),
    [
        (tiny(width=9), TOKENS, "2 heads do not divide the width 9"),
        (tiny(num_layers=0), TOKENS, "num_layers must be a whole number of at least 1, got 0"),
        (tiny(num_segments=1), TOKENS, "num_segments must be 2, or 0 for none, got 1"),
        (tiny(separator=102), TOKENS, r"separator must be a token in \[1, 20\), got 102"),
        (tiny(separator=0), TOKENS, r"separator must be a token in \[1, 20\), got 0"),
        (tiny(dropout_rate=1.0), TOKENS, r"dropout_rate must lie in \[0, 1\), got 1.0"),
        (tiny(max_length=9), TOKENS, "texts of 10 tokens do not fit in 9 positions"),
        (tiny(), TOKENS[0], r"tokens must be whole numbers \[B, L\], got int32 \[10\]"),
        (tiny(), TOKENS.astype(np.float32), r"tokens must be whole numbers \[B, L\], got float32 \[2, 10\]"),
        (models.TextClassifier(tiny(), 2, "gelu"), TOKENS, "unknown pooler 'gelu'; did you mean 'relu'"),
        (models.TextClassifier(tiny(), 0), TOKENS, "num_classes must be a whole number of at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), tokens)
