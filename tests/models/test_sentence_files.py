"""How a sentence transformer makes the vector of a text."""

import json

import pytest

from merge_jax import models

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.base.modules.transformer."

NO_PATH = '[{"type": "sentence_transformers.models.Pooling", "path": null}]'


def files(folder, kinds=("Transformer", "Pooling", "Normalize"), *, prefix=OLD, **config):
    """Writes the files of a sentence transformer, but its weights."""
    paths = ["" if kind == "Transformer" else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    layers = [{"path": path, "type": f"{prefix}{kind}"} for kind, path in zip(kinds, paths, strict=True)]
    (folder / "modules.json").write_text(json.dumps(layers))
    if "Pooling" in kinds and config:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "pooler"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "first"),
        ({"embedding_dimension": 8, "pooling_mode": "cls"}, "first"),
        ({"embedding_dimension": 8, "pooling_mode": ["mean"]}, "mean"),
        ({"word_embedding_dimension": 8}, "mean"),  # The default, old and new.
    ],
)
@pytest.mark.parametrize("prefix", [OLD, NEW])
def test_the_pooler_is_read_from_files_old_and_new(config, pooler, prefix, tmp_path):
    files(tmp_path, prefix=prefix, **config)
    assert models.pooler_of(tmp_path) == models.pooler_of(tmp_path / "model.safetensors") == pooler


def test_the_weights_may_be_one_folder_below(tmp_path, monkeypatch):
    (files(tmp_path, pooling_mode="cls") / "0_Transformer").mkdir()
    assert models.pooler_of(tmp_path / "0_Transformer" / "pytorch_model.bin") == "first"
    monkeypatch.chdir(tmp_path / "0_Transformer")
    assert models.pooler_of("pytorch_model.bin") == "first"


def test_a_folder_without_them_has_no_pooler(tmp_path):
    assert models.pooler_of(tmp_path) is None


@pytest.mark.parametrize(
    ("kinds", "config", "message"),
    [
        (("Transformer", "Pooling"), {"pooling_mode": "max"}, "made by max; TextClassifier supports one of mean, cls"),
        (("Transformer", "Pooling"), {"pooling_mode": ["cls", "mean"]}, r"made by cls \+ mean;"),
        (("Transformer", "Pooling", "Dense"), {"pooling_mode_cls_token": True}, r"made by cls \+ Dense;"),
        (("Transformer", "Pooling"), {"pooling_mode": None}, "made by None;"),
        (("Transformer",), {}, "made by no pooling;"),
        (("Transformer", "Pooling"), {}, r"1_Pooling/config\.json is missing, which says how"),
    ],
)
def test_a_vector_that_no_pooler_makes_is_refused(kinds, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        models.pooler_of(files(tmp_path, kinds, **config))


@pytest.mark.parametrize("content", ["{", '{"layers": 2}', "[1]", '[{"type": 1, "path": ""}]', '[{"idx": 0}]', NO_PATH])
def test_another_file_of_that_name_is_refused(content, tmp_path):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"modules\.json does not list the layers of a sentence transformer: "):
        models.pooler_of(tmp_path)
