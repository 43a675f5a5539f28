"""Text models of Hugging Face files: they give what the published equations give, and go back as they were."""

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
from tests.models.common import gelu
from tests.models.huggingface_files import (
    CLASSES,
    LAYERS,
    PARTS,
    POSITIONS,
    SEP,
    TOKENS,
    VOCAB,
    assert_goes_back,
    attend_by_heads,
    model_of,
    params_of,
    tensors_of,
    torch_dense,
    torch_norm,
    vit_params,
    vit_tensors,
    write,
)

SEGMENTS = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]])
both = pytest.mark.parametrize("architecture", PARTS)


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


@both
@pytest.mark.parametrize("head", ["classes", "spans", None])
def test_a_model_of_a_file_gives_what_the_published_equations_give(architecture, head, tmp_path):
    tensors, model = tensors_of(architecture, head), model_of(architecture, head)
    loaded = models.from_huggingface(write(tmp_path, tensors), params_of(model))
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
def test_older_names_names_without_prefix_and_other_tensors_are_known(architecture, head, tmp_path):
    tensors, params = tensors_of(architecture, head), params_of(model_of(architecture, head))
    expected = models.from_huggingface(write(tmp_path, tensors), params)
    renamed = {old(name).removeprefix(f"{architecture}."): tensor for name, tensor in tensors.items()}
    renamed |= {"embeddings.position_ids": np.arange(POSITIONS)[None], "cls.predictions.bias": np.zeros(VOCAB)}
    path = write(tmp_path, renamed)
    for place in (path, path.parent):
        found = models.from_huggingface(place, params)
        assert found.kept == ()
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@both
@pytest.mark.parametrize("head", ["classes", "spans", None])
def test_what_was_loaded_goes_back_as_it_was(architecture, head, tmp_path):
    tensors = tensors_of(architecture, head)
    loaded = models.from_huggingface(write(tmp_path, tensors), params_of(model_of(architecture, head)))
    if head is None:
        # A bare model's names have no prefix.
        tensors = {name.removeprefix(f"{architecture}."): tensor for name, tensor in tensors.items()}
    assert_goes_back(tmp_path, loaded.params, tensors)


@both
def test_what_goes_back_is_right_in_the_librarys_own_file_too(architecture, tmp_path):
    """It stores a view that is transposed as it lies in memory."""
    tensors = tensors_of(architecture, "classes")
    loaded = models.from_huggingface(write(tmp_path, tensors), params_of(model_of(architecture, "classes")))
    save_file(models.to_huggingface(loaded.params), tmp_path / "theirs.safetensors")
    back = load_file(tmp_path / "theirs.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@both
def test_a_head_that_the_file_has_not_is_kept_and_named(architecture, tmp_path):
    path = write(tmp_path, tensors_of(architecture, "spans"))
    loaded = models.from_huggingface(path, params_of(model_of(architecture, "classes")))
    pooler = "pooler" if architecture == "bert" else "pre_classifier"
    assert set(loaded.kept) == {f"{name}/{leaf}" for name in ("classifier", pooler) for leaf in ("kernel", "bias")}
    for path, leaf in mj.flatten(loaded.params).items():
        assert (path in loaded.kept) == bool((leaf == 7.0).all()), path


@both
def test_a_head_of_other_classes_is_kept_whole(architecture, tmp_path):
    tensors = tensors_of(architecture, "classes")
    params = params_of(model_of(architecture, "classes", classes=5))
    assert models.from_huggingface(write(tmp_path, tensors), params).kept == ("classifier/bias", "classifier/kernel")
    with pytest.raises(ValueError, match=r"classifier/kernel in the model's shape, .*: give what model\.init"):
        models.from_huggingface(tmp_path / "model.safetensors", jax.eval_shape(lambda: params))
    # No kernel is taken without its bias.
    del tensors["classifier.bias"]
    params = params_of(model_of(architecture, "classes"))
    loaded = models.from_huggingface(write(tmp_path, tensors), params)
    assert loaded.kept == ("classifier/bias", "classifier/kernel")
    np.testing.assert_array_equal(loaded.params["classifier"]["kernel"], 7.0)


@pytest.mark.parametrize("pooler", ["mean", "first"])
def test_a_sentence_transformer_is_read_without_its_pooler(pooler, tmp_path):
    """Its file has the bare names, a pooler that it was not trained with, and no classifier."""
    tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors_of("bert", "classes").items()}
    tensors = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    model = models.TextClassifier(model_of("bert", None), CLASSES, pooler)
    loaded = models.from_huggingface(write(tmp_path, tensors), params_of(model))
    assert loaded.kept == ("classifier/bias", "classifier/kernel")
    _, (found,) = jax.jit(mj.objectives.with_features(model.apply))({"params": loaded.params}, TOKENS)
    states = reference("bert", None, tensors_of("bert", "classes"), TOKENS, SEGMENTS)
    means = [state[text > 0].mean(axis=0) for state, text in zip(states, TOKENS, strict=True)]
    np.testing.assert_allclose(found, means if pooler == "mean" else [state[0] for state in states], atol=1e-5)


def test_leaves_keep_the_models_dtype(tmp_path):
    tensors = {name: tensor.astype(np.float16) for name, tensor in tensors_of("bert", None).items()}
    loaded = models.from_huggingface(write(tmp_path, tensors), params_of(model_of("bert", None)))
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
def test_a_file_that_does_not_fit_is_refused(architecture, options, message, tmp_path):
    path = write(tmp_path, tensors_of("bert", "classes"))
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
def test_another_model_is_told_before_numbers_are_read(architecture, options, message, tmp_path, monkeypatch):
    path = write(tmp_path, tensors_of("bert", None))
    path.with_name("config.json").write_text('{"num_attention_heads": 2}')
    monkeypatch.setattr(huggingface, "load_weights", lambda path: pytest.fail("numbers are read"))
    with pytest.raises(ValueError, match=message):
        models.from_huggingface(path, params_of(model_of(architecture, None, **options)))


def test_files_of_other_architectures_are_refused(tmp_path):
    params = params_of(model_of("bert", None))
    with pytest.raises(ValueError, match="is of DistilBERT, the model is a BERT"):
        models.from_huggingface(write(tmp_path, tensors_of("distilbert", None)), params)
    path = write(tmp_path, {"h.0.attn.c_attn.weight": np.ones((2, 6)), "wte.weight": np.ones((3, 2))})
    with pytest.raises(
        ValueError, match=r"is of neither BERT nor DistilBERT nor ViT: it has .*'h\.0\.attn\.c_attn\.weight'"
    ):
        models.from_huggingface(path, params)


def test_missing_tensors_are_named_ten_at_most(tmp_path):
    tensors, params = tensors_of("bert", None), params_of(model_of("bert", None))
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    with pytest.raises(ValueError, match=r"lacks the tensors 'encoder\.layer\.1\.output\.dense\.bias'$"):
        models.from_huggingface(write(tmp_path, tensors), params)
    few = {name: tensor for name, tensor in tensors.items() if "query.weight" in name}
    with pytest.raises(ValueError, match=r"lacks the tensors ('[\w.]+'(, )?){10} and 25 more$"):
        models.from_huggingface(write(tmp_path, few), params)


def test_tensors_of_whole_numbers_are_refused(tmp_path):
    tensors = tensors_of("bert", None)
    name = "bert.encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].astype(np.int8)
    with pytest.raises(ValueError, match=r"'encoder\.layer\.0\.output\.dense\.weight' of .* is int8, expected floats"):
        models.from_huggingface(write(tmp_path, tensors), params_of(model_of("bert", None)))


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
def test_what_no_tensor_tells_is_compared_with_the_configuration(architecture, config, message, tmp_path):
    if architecture == "vit":
        path, params = write(tmp_path, vit_tensors(None)), vit_params(None)
    else:
        path, params = write(tmp_path, tensors_of(architecture, None)), params_of(model_of(architecture, None))
    path.with_name("config.json").write_text(json.dumps(config))
    for place in (path, path.parent):
        if message is None:
            models.from_huggingface(place, params)
        else:
            with pytest.raises(ValueError, match=message):
                models.from_huggingface(place, params)


def test_params_of_other_models_are_refused(tmp_path):
    path, params = write(tmp_path, tensors_of("bert", None)), params_of(model_of("bert", None))
    message = "no 'embeddings/word/embedding' or 'patch/kernel'; did you mean 'params/embeddings"
    with pytest.raises(ValueError, match=message):
        models.from_huggingface(path, {"params": params})
    with pytest.raises(ValueError, match=r"of no text model or vision transformer, .*; there is 'fc/kernel'"):
        models.to_huggingface({"fc": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match="params have the leaf 'mine/kernel', for which a BERT has no name"):
        models.to_huggingface({"encoder": params, "mine": {"kernel": jnp.ones((2, 2))}})


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
