import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import merge_jax as mj
from merge_jax import models
from merge_jax.models import huggingface
from tests.models.common import attend_one, gelu, norm

VOCAB, WIDTH, HIDDEN, HEADS, LAYERS, POSITIONS, CLASSES = 20, 8, 12, 2, 2, 10, 3
CLS, SEP = 2, 3
TOKENS = np.array([[CLS, 5, 6, SEP, 7, 8, 9, SEP, 0, 0], [CLS, 5, SEP, 10, 11, SEP, 0, 0, 0, 0]], np.int32)
SEGMENTS = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]])

# For each architecture: its prefix, and the parts of a layer in the order of `layer` below.
PARTS = {
    "bert": (
        "encoder.layer",
        ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        ("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
    "distilbert": (
        "transformer.layer",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        ("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
    ),
}
both = pytest.mark.parametrize("architecture", PARTS)


def tensors_of(architecture, head, seed=0):
    """Returns random tensors under the names that transformers gives them, in torch's layout."""
    random = np.random.default_rng(seed)
    tensors = {}

    def add(name, *shape, prefix=f"{architecture}."):
        tensors[f"{prefix}{name}.weight"] = (0.5 * random.normal(size=shape)).astype(np.float32)
        if "embeddings." not in name or "LayerNorm" in name:
            tensors[f"{prefix}{name}.bias"] = (0.5 * random.normal(size=shape[:1])).astype(np.float32)

    add("embeddings.word_embeddings", VOCAB, WIDTH)
    add("embeddings.position_embeddings", POSITIONS, WIDTH)
    if architecture == "bert":
        add("embeddings.token_type_embeddings", 2, WIDTH)
    add("embeddings.LayerNorm", WIDTH)
    layer, attention, (norm1, up, down, norm2) = PARTS[architecture]
    for i in range(LAYERS):
        for part in attention:
            add(f"{layer}.{i}.{part}", WIDTH, WIDTH)
        add(f"{layer}.{i}.{norm1}", WIDTH)
        add(f"{layer}.{i}.{up}", HIDDEN, WIDTH)
        add(f"{layer}.{i}.{down}", WIDTH, HIDDEN)
        add(f"{layer}.{i}.{norm2}", WIDTH)
    if head == "classes":
        if architecture == "bert":
            add("pooler.dense", WIDTH, WIDTH)
        else:
            add("pre_classifier", WIDTH, WIDTH, prefix="")
        add("classifier", CLASSES, WIDTH, prefix="")
    if head == "spans":
        add("qa_outputs", 2, WIDTH, prefix="")
    return tensors


def torch_dense(tensors, name, x):
    return x @ tensors[f"{name}.weight"].astype(np.float64).T + tensors[f"{name}.bias"]


def torch_norm(tensors, name, x):
    return norm({"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}, x)


def attend_by_heads(query, key, value, seen=True):
    parts = np.split(np.arange(WIDTH), HEADS)
    return np.concatenate([attend_one(query[:, one], key[:, one], value[:, one], seen) for one in parts], -1)


def reference(architecture, head, tensors, tokens, segments):
    """Returns what the published equations give, in float64 and one text and one head at a time."""
    dense, norm = (functools.partial(part, tensors) for part in (torch_dense, torch_norm))
    embeddings = f"{architecture}.embeddings"
    layers, attention, (norm1, up, down, norm2) = PARTS[architecture]
    found = []
    for text, text_segments in zip(tokens, segments, strict=True):
        x = tensors[f"{embeddings}.word_embeddings.weight"][text].astype(np.float64)
        x = x + tensors[f"{embeddings}.position_embeddings.weight"][: len(text)]
        if architecture == "bert":
            x = x + tensors[f"{embeddings}.token_type_embeddings.weight"][text_segments]
        x = norm(f"{embeddings}.LayerNorm", x)
        for i in range(LAYERS):
            layer = f"{architecture}.{layers}.{i}."
            query, key, value = (dense(layer + part, x) for part in attention[:3])
            x = norm(layer + norm1, x + dense(layer + attention[3], attend_by_heads(query, key, value, text > 0)))
            x = norm(layer + norm2, x + dense(layer + down, gelu(dense(layer + up, x))))
        if head == "spans":
            x = dense("qa_outputs", x)
            impossible = (text_segments == 0) | (text == SEP)
            impossible[0] = False
            x[impossible] = -1e9
        elif head == "classes" and architecture == "bert":
            x = dense("classifier", np.tanh(dense("bert.pooler.dense", x[0])))
        elif head == "classes":
            x = dense("classifier", np.maximum(dense("pre_classifier", x[0]), 0))
        found.append(x)
    return np.stack(found)


def model_of(architecture, head, classes=CLASSES, **options):
    sizes = {"width": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "hidden": HIDDEN, "max_length": POSITIONS}
    segments = 2 if architecture == "bert" else 0
    encoder = models.TextEncoder(
        **{"vocab_size": VOCAB, **sizes, "num_segments": segments, "separator": SEP, **options}
    )
    if head == "classes":
        return models.TextClassifier(encoder, classes, "tanh" if architecture == "bert" else "relu")
    return models.SpanExtractor(encoder) if head == "spans" else encoder


def params_of(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0, leaf.dtype), shapes)


@pytest.fixture
def write(tmp_path):
    """A function that writes tensors to a file, and gives its path."""

    def save(tensors):
        mj.save_safetensors(tmp_path / "model.safetensors", tensors, overwrite=True)
        return tmp_path / "model.safetensors"

    return save


@both
@pytest.mark.parametrize("head", ["classes", "spans", None])
def test_a_model_of_a_file_gives_what_the_published_equations_give(architecture, head, write):
    tensors, model = tensors_of(architecture, head), model_of(architecture, head)
    loaded = models.from_huggingface(write(tensors), params_of(model))
    assert loaded.kept == ()
    found = np.asarray(jax.jit(model.apply)({"params": loaded.params}, TOKENS), np.float64)
    expected = reference(architecture, head, tensors, TOKENS, SEGMENTS)
    if head is None:
        # What stands at padding is no one's.
        found, expected = found[TOKENS > 0], expected[TOKENS > 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def old(name):
    if "LayerNorm" not in name:
        return name
    return name.replace(".weight", ".gamma").replace(".bias", ".beta")


@both
@pytest.mark.parametrize("head", ["classes", None])
def test_older_names_names_without_prefix_and_other_tensors_are_known(architecture, head, write):
    tensors, params = tensors_of(architecture, head), params_of(model_of(architecture, head))
    expected = models.from_huggingface(write(tensors), params)
    renamed = {old(name).removeprefix(f"{architecture}."): tensor for name, tensor in tensors.items()}
    renamed |= {"embeddings.position_ids": np.arange(POSITIONS)[None], "cls.predictions.bias": np.zeros(VOCAB)}
    path = write(renamed)
    for place in (path, path.parent):
        found = models.from_huggingface(place, params)
        assert found.kept == ()
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@both
@pytest.mark.parametrize("head", ["classes", "spans", None])
def test_what_was_loaded_goes_back_as_it_was(architecture, head, write, tmp_path):
    tensors = tensors_of(architecture, head)
    loaded = models.from_huggingface(write(tensors), params_of(model_of(architecture, head)))
    if head is None:
        # A bare model's names have no prefix.
        tensors = {name.removeprefix(f"{architecture}."): tensor for name, tensor in tensors.items()}
    back = models.to_huggingface(loaded.params)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    mj.save_safetensors(tmp_path / "back.safetensors", back)
    again = models.from_huggingface(tmp_path / "back.safetensors", loaded.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@both
def test_what_goes_back_is_right_in_the_librarys_own_file_too(architecture, write, tmp_path):
    """It stores a view that is transposed as it lies in memory."""
    tensors = tensors_of(architecture, "classes")
    loaded = models.from_huggingface(write(tensors), params_of(model_of(architecture, "classes")))
    save_file(models.to_huggingface(loaded.params), tmp_path / "theirs.safetensors")
    back = load_file(tmp_path / "theirs.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@both
def test_a_head_that_the_file_has_not_is_kept_and_named(architecture, write):
    path = write(tensors_of(architecture, "spans"))
    loaded = models.from_huggingface(path, params_of(model_of(architecture, "classes")))
    pooler = "pooler" if architecture == "bert" else "pre_classifier"
    assert set(loaded.kept) == {f"{name}/{leaf}" for name in ("classifier", pooler) for leaf in ("kernel", "bias")}
    for path, leaf in mj.flatten(loaded.params).items():
        assert (path in loaded.kept) == bool((leaf == 7.0).all()), path


@both
def test_a_head_of_other_classes_is_kept_whole(architecture, write):
    tensors = tensors_of(architecture, "classes")
    params = params_of(model_of(architecture, "classes", classes=5))
    assert models.from_huggingface(write(tensors), params).kept == ("classifier/bias", "classifier/kernel")
    # No kernel is taken without its bias.
    del tensors["classifier.bias"]
    params = params_of(model_of(architecture, "classes"))
    loaded = models.from_huggingface(write(tensors), params)
    assert loaded.kept == ("classifier/bias", "classifier/kernel")
    np.testing.assert_array_equal(loaded.params["classifier"]["kernel"], 7.0)


def test_a_sentence_transformer_is_read_without_its_pooler(write):
    """Its file has the bare names, a pooler that it was not trained with, and no classifier."""
    tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors_of("bert", "classes").items()}
    tensors = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    model = models.TextClassifier(model_of("bert", None), CLASSES, "mean")
    loaded = models.from_huggingface(write(tensors), params_of(model))
    assert loaded.kept == ("classifier/bias", "classifier/kernel")
    _, (found,) = jax.jit(mj.objectives.with_features(model.apply))({"params": loaded.params}, TOKENS)
    states = reference("bert", None, tensors_of("bert", "classes"), TOKENS, SEGMENTS)
    expected = [state[text > 0].mean(axis=0) for state, text in zip(states, TOKENS, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_leaves_keep_the_models_dtype(write):
    tensors = {name: tensor.astype(np.float16) for name, tensor in tensors_of("bert", None).items()}
    loaded = models.from_huggingface(write(tensors), params_of(model_of("bert", None)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"float32"}
    words = tensors["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(loaded.params["embeddings"]["word"]["embedding"], words.astype(np.float32))


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("distilbert", {}, r"model\.safetensors is of BERT, the model is a DistilBERT"),
        ("bert", {"num_layers": 1}, r"model\.safetensors has 2 layers, the model has 1"),
        ("bert", {"num_layers": 3}, r"model\.safetensors has 2 layers, the model has 3"),
        ("bert", {"vocab_size": 30}, r"has a vocabulary of 20 tokens, the model has one of 30"),
        ("bert", {"max_length": 12}, r"'embeddings.position_embeddings.weight' of .* is \[10, 8\], .* needs \[12, 8\]"),
        ("bert", {"width": 16}, r"the tensor 'embeddings\..*' of .*, the model needs \["),
        ("bert", {"hidden": 16}, r"the tensor 'encoder\.layer\.0\..*' of .* is \[.*12.*\], the model needs \[.*16.*\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(architecture, options, message, write):
    path = write(tensors_of("bert", "classes"))
    with pytest.raises(ValueError, match=message):
        models.from_huggingface(path, params_of(model_of(architecture, "classes", **options)))


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("bert", {"num_layers": 1}, "has 2 layers, the model has 1"),
        ("distilbert", {}, "is of BERT, the model is a DistilBERT"),
        ("bert", {"num_heads": 4}, "has num_attention_heads 2, the model has 4"),
    ],
)
def test_another_model_is_told_before_numbers_are_read(architecture, options, message, write, monkeypatch):
    path = write(tensors_of("bert", None))
    path.with_name("config.json").write_text('{"num_attention_heads": 2}')
    monkeypatch.setattr(huggingface, "load_safetensors", lambda path: pytest.fail("numbers are read"))
    with pytest.raises(ValueError, match=message):
        models.from_huggingface(path, params_of(model_of(architecture, None, **options)))


def test_files_of_other_architectures_are_refused(write):
    params = params_of(model_of("bert", None))
    with pytest.raises(ValueError, match="is of DistilBERT, the model is a BERT"):
        models.from_huggingface(write(tensors_of("distilbert", None)), params)
    path = write({"h.0.attn.c_attn.weight": np.ones((2, 6)), "wte.weight": np.ones((3, 2))})
    with pytest.raises(
        ValueError, match=r"is of neither BERT nor DistilBERT nor ViT: it has .*'h\.0\.attn\.c_attn\.weight'"
    ):
        models.from_huggingface(path, params)


def test_missing_tensors_are_named_ten_at_most(write):
    tensors, params = tensors_of("bert", None), params_of(model_of("bert", None))
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    with pytest.raises(ValueError, match=r"lacks the tensors 'encoder\.layer\.1\.output\.dense\.bias'$"):
        models.from_huggingface(write(tensors), params)
    few = {name: tensor for name, tensor in tensors.items() if "query.weight" in name}
    with pytest.raises(ValueError, match=r"lacks the tensors ('[\w.]+'(, )?){10} and 25 more$"):
        models.from_huggingface(write(few), params)


def test_tensors_of_whole_numbers_are_refused(write):
    tensors = tensors_of("bert", None)
    name = "bert.encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].astype(np.int8)
    with pytest.raises(ValueError, match=r"'encoder\.layer\.0\.output\.dense\.weight' of .* is int8, expected floats"):
        models.from_huggingface(write(tensors), params_of(model_of("bert", None)))


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("bert", {"num_attention_heads": 4}, r"config\.json has num_attention_heads 4, the model has 2"),
        ("distilbert", {"n_heads": 4}, r"config\.json has n_heads 4, the model has 2"),
        ("bert", {"hidden_act": "gelu_new"}, r"config\.json has hidden_act 'gelu_new', the model has 'gelu'"),
        ("distilbert", {"activation": "relu"}, r"config\.json has activation 'relu', the model has 'gelu'"),
        ("vit", {"num_attention_heads": 4}, r"config\.json has num_attention_heads 4, the model has 2"),
        ("vit", {"hidden_act": "quick_gelu"}, r"config\.json has hidden_act 'quick_gelu', the model has 'gelu'"),
        ("bert", {"num_attention_heads": 2, "hidden_act": "gelu", "n_heads": 9}, None),
        ("distilbert", {}, None),
        ("vit", {"num_attention_heads": 2, "hidden_act": "gelu"}, None),
    ],
)
def test_what_no_tensor_tells_is_compared_with_the_configuration(architecture, config, message, write):
    if architecture == "vit":
        path, params = write(vit_tensors(None)), vit_params(None)
    else:
        path, params = write(tensors_of(architecture, None)), params_of(model_of(architecture, None))
    path.with_name("config.json").write_text(json.dumps(config))
    for place in (path, path.parent):
        if message is None:
            models.from_huggingface(place, params)
        else:
            with pytest.raises(ValueError, match=message):
                models.from_huggingface(place, params)


def test_params_of_other_models_are_refused(write):
    path, params = write(tensors_of("bert", None)), params_of(model_of("bert", None))
    message = "no 'embeddings/word/embedding' or 'patch/kernel'; did you mean 'params/embeddings"
    with pytest.raises(ValueError, match=message):
        models.from_huggingface(path, {"params": params})
    with pytest.raises(ValueError, match=r"of no text model or vision transformer, .*; there is 'fc/kernel'"):
        models.to_huggingface({"fc": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match="params have the leaf 'mine/kernel', for which a BERT has no name"):
        models.to_huggingface({"encoder": params, "mine": {"kernel": jnp.ones((2, 2))}})


IMAGE, PATCH, CHANNELS = 12, 4, 3
IMAGES = np.random.default_rng(1).normal(size=(2, IMAGE, IMAGE, CHANNELS)).astype(np.float32)
VIT_LAYER = "vit.encoder.layer"
heads = pytest.mark.parametrize("head", ["classes", None])


def vit_tensors(head, seed=0, channels=CHANNELS):
    """Returns random tensors under the names that transformers gives them in a file, in torch's layout."""
    random = np.random.default_rng(seed)
    tensors = {}

    def add(name, *shape):
        tensors[name] = (0.5 * random.normal(size=shape)).astype(np.float32)

    def add_dense(name, *shape):
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    add("vit.embeddings.cls_token", 1, 1, WIDTH)
    add("vit.embeddings.position_embeddings", 1, 1 + (IMAGE // PATCH) ** 2, WIDTH)
    add_dense("vit.embeddings.patch_embeddings.projection", WIDTH, channels, PATCH, PATCH)
    for i in range(LAYERS):
        for part in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            add_dense(f"{VIT_LAYER}.{i}.{part}", WIDTH, WIDTH)
        add_dense(f"{VIT_LAYER}.{i}.attention.output.dense", WIDTH, WIDTH)
        add_dense(f"{VIT_LAYER}.{i}.layernorm_before", WIDTH)
        add_dense(f"{VIT_LAYER}.{i}.layernorm_after", WIDTH)
        add_dense(f"{VIT_LAYER}.{i}.intermediate.dense", HIDDEN, WIDTH)
        add_dense(f"{VIT_LAYER}.{i}.output.dense", WIDTH, HIDDEN)
    add_dense("vit.layernorm", WIDTH)
    if head:
        add_dense("classifier", CLASSES, WIDTH)
    return tensors


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


def vit_of(head, classes=CLASSES, **options):
    sizes = {"image_size": IMAGE, "patch_size": PATCH, "width": WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
    encoder = models.VisionTransformer(**{**sizes, "hidden": HIDDEN, **options})
    return models.ImageClassifier(encoder, classes) if head else encoder


def vit_params(head, channels=CHANNELS, **options):
    model = vit_of(head, **options)
    size = options.get("image_size", IMAGE)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, channels)))["params"]
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0, leaf.dtype), shapes)


@heads
def test_a_vision_transformer_of_a_file_gives_what_the_published_equations_give(head, write):
    tensors = vit_tensors(head)
    loaded = models.from_huggingface(write(tensors), vit_params(head))
    assert loaded.kept == ()
    found = np.asarray(jax.jit(vit_of(head).apply)({"params": loaded.params}, IMAGES), np.float64)
    np.testing.assert_allclose(found, vit_reference(head, tensors, IMAGES), atol=1e-5)


@heads
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_vision_transformer_goes_back_as_it_was(head, channels, write, tmp_path):
    tensors = vit_tensors(head, channels=channels)
    loaded = models.from_huggingface(write(tensors), vit_params(head, channels))
    if head is None:
        # A bare model's names have no prefix.
        tensors = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    back = models.to_huggingface(loaded.params, num_channels=channels)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    mj.save_safetensors(tmp_path / "back.safetensors", back)
    again = models.from_huggingface(tmp_path / "back.safetensors", loaded.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_the_pooler_of_a_bare_vision_transformer_is_left_and_a_missing_head_kept(write):
    tensors = {name.removeprefix("vit."): tensor for name, tensor in vit_tensors(None).items()}
    tensors["pooler.dense.weight"] = np.ones((WIDTH, WIDTH), np.float32)
    path = write(tensors)
    assert models.from_huggingface(path, vit_params(None)).kept == ()
    loaded = models.from_huggingface(path, vit_params("classes"))
    assert loaded.kept == ("classifier/bias", "classifier/kernel")
    for leaf, value in mj.flatten(loaded.params).items():
        assert (leaf in loaded.kept) == bool((value == 7.0).all()), leaf
    other = models.from_huggingface(write(vit_tensors("classes")), vit_params("classes", classes=5))
    assert other.kept == loaded.kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 3}, r"model\.safetensors has 2 layers, the model has 3"),
        (
            {"image_size": 16},
            r"safetensors has positions for 9 patches, the model for 16, in images of 16x16 pixels$",
        ),
        ({"patch_size": 2}, r"has patches of 4x4 pixels of 3 channels, 48 numbers; those of the model have 12$"),
        ({"channels": 1}, r"has patches of 4x4 pixels of 3 channels, 48 numbers; those of the model have 16$"),
        ({"width": 16}, r"the tensor 'embeddings\.cls_token' of .* is \[1, 1, 8\], the model needs \[1, 1, 16\]"),
        ({"hidden": 16}, r"'encoder\.layer\.0\.output\.dense\.weight' of .* is \[8, 12\], the model needs \[8, 16\]"),
    ],
)
def test_a_file_that_does_not_fit_a_vision_transformer_is_refused(options, message, write):
    with pytest.raises(ValueError, match=message):
        models.from_huggingface(write(vit_tensors("classes")), vit_params("classes", **options))


def test_broken_files_of_a_vision_transformer_are_refused(write):
    tensors, params = vit_tensors(None), vit_params(None)
    bert = params_of(model_of("bert", None))
    with pytest.raises(ValueError, match="is of ViT, the model is a BERT"):
        models.from_huggingface(write(tensors), bert)
    with pytest.raises(ValueError, match="is of BERT, the model is a ViT"):
        models.from_huggingface(write(tensors_of("bert", None)), params)
    for name in ("embeddings.cls_token", "embeddings.position_embeddings", "layernorm.bias"):
        rest = {key: tensor for key, tensor in tensors.items() if key != f"vit.{name}"}
        with pytest.raises(ValueError, match=rf"lacks the tensors '{name}'$"):
            models.from_huggingface(write(rest), params)
    whole = {**tensors, "vit.embeddings.cls_token": np.ones((1, 1, WIDTH), np.int8)}
    with pytest.raises(ValueError, match=r"'embeddings\.cls_token' of .* is int8, expected floats"):
        models.from_huggingface(write(whole), params)
    flat = {**tensors, "vit.embeddings.patch_embeddings.projection.weight": np.ones((WIDTH, 48), np.float32)}
    with pytest.raises(ValueError, match=r"kernel of patches \[8, 48\], expected \[width, channels, p, p\]"):
        models.from_huggingface(write(flat), params)
    for shape, message in (((10,), r"is \[10\]"), ((10, WIDTH), r"is \[10, 8\], the model needs \[1, 10, 8\]")):
        odd = {**tensors, "vit.embeddings.position_embeddings": np.ones(shape, np.float32)}
        with pytest.raises(ValueError, match=message):
            models.from_huggingface(write(odd), params)


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


@pytest.mark.parametrize("num_segments", [2, 0], ids=["BERT", "DistilBERT"])
def test_a_file_tells_the_sizes_of_its_encoder(tmp_path, num_segments):
    encoder = mj.models.TextEncoder(31, 12, 3, 4, 20, 16, num_segments=num_segments, separator=5)
    params = encoder.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    mj.save_safetensors(tmp_path / "model.safetensors", mj.models.to_huggingface(params))
    with pytest.raises(ValueError, match=r"no tensor of .* tells its number of heads: put the model's config.json"):
        mj.models.text_encoder_of(tmp_path)
    heads = "num_attention_heads" if num_segments else "n_heads"
    (tmp_path / "config.json").write_text(json.dumps({heads: 4}))
    assert mj.models.text_encoder_of(tmp_path, separator=5) == encoder
    assert mj.models.text_encoder_of(tmp_path / "model.safetensors", separator=5) == encoder


def test_of_files_of_no_text_encoder_no_sizes_are_read(tmp_path):
    mj.save_safetensors(tmp_path / "model.safetensors", {"fc": {"weight": np.ones((2, 3))}})
    with pytest.raises(ValueError, match=r"is of neither BERT nor DistilBERT: it has tensors such as fc.weight"):
        mj.models.text_encoder_of(tmp_path)
