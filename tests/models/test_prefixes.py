"""Files of models that something has wrapped: all their names begin with what is no model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from tests.models import huggingface_files, test_resnet_imagenet, test_vit_files


def of_huggingface(path):
    assert mj.models.text_encoder_of(path).num_layers == huggingface_files.LAYERS
    params = huggingface_files.params_of(huggingface_files.model_of("bert", "classes"))
    loaded = mj.models.from_huggingface(path, params)
    assert loaded.kept == ()
    return loaded.params


def of_flax(path):
    assert mj.models.vision_transformer_of(path).num_layers == test_vit_files.LAYERS
    return mj.models.from_flax(path, test_vit_files.shapes_of()).variables


READERS = {
    "ResNet": (
        test_resnet_imagenet.tensors_of("basic"),
        lambda path: mj.models.from_pytorch(path, test_resnet_imagenet.shapes_of("basic")).variables,
    ),
    "ViT of timm": (
        test_vit_files.tensors_of("timm"),
        lambda path: mj.models.from_pytorch(path, test_vit_files.shapes_of()).variables,
    ),
    "ViT of big_vision": (
        {name.replace("/", "."): tensor for name, tensor in test_vit_files.tensors_of("big_vision").items()},
        of_flax,
    ),
    "BERT": (huggingface_files.tensors_of("bert", "classes"), of_huggingface),
}


@pytest.mark.parametrize(("tensors", "read"), READERS.values(), ids=READERS)
def test_what_wraps_all_of_a_model_is_left_out(tensors, read, tmp_path):
    def file_of(tensors):
        mj.save_safetensors(tmp_path / "m.safetensors", tensors, overwrite=True)
        return tmp_path / "m.safetensors"

    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    expected = mj.flatten(read(file_of(tensors)))
    for prefix in ("module.", "module._orig_mod.", "model."):
        wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
        found = mj.flatten(read(file_of(wrapped)))
        assert all(np.array_equal(found[path], leaf) for path, leaf in expected.items())
    with pytest.raises(ValueError, match=r"under 'model/', and beside them 'metric/total': make a file of the former"):
        read(file_of({**wrapped, "metric.total": np.ones(2, np.float32)}))


def test_what_is_like_a_wrapped_file_has_its_bare_names(tmp_path):
    leaves = {"fc": {"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)}}
    mj.save_safetensors(tmp_path / "m.safetensors", {"module": {"_orig_mod": leaves}})
    found = mj.load_weights(tmp_path / "m.safetensors", like=jax.eval_shape(lambda: jax.tree.map(jnp.asarray, leaves)))
    assert jax.tree.structure(found) == jax.tree.structure(leaves)
    mj.save_safetensors(tmp_path / "n.safetensors", {"module": leaves, "step": np.ones(1)})
    line = r"mj\.load_weights\('.*n\.safetensors', 'module/\*\*'\)\['module'\]\)$"
    with pytest.raises(ValueError, match=line):
        mj.load_weights(tmp_path / "n.safetensors", like=leaves)
    assert mj.load_weights(tmp_path / "n.safetensors", "module/**", like=leaves).keys() == {"fc"}
    half = {**leaves, "conv": leaves}  # Of fewer than half, the names are those of the file.
    for other, name in ((half, "fc/bias"), ({**half, "norm": np.ones(2)}, "module/_orig_mod/fc/bias")):
        with pytest.raises(ValueError, match=f"conv/fc/bias is missing; did you mean '{name}'"):
            mj.load_weights(tmp_path / "m.safetensors", like=other)
