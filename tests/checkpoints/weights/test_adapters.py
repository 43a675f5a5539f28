"""Adapters of PEFT, under the names of its files (0.21.2), and other tensors that weights are computed from."""

import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import merge_jax as mj

KERNEL = {"base_layer.weight": np.ones((3, 4)), "lora_A.default.weight": np.ones((2, 4))}


@pytest.mark.parametrize(
    "tensors",
    [
        {"base_model.model.embed.token_adapter.trainable_tokens_delta": np.ones((2, 4))},
        {"base_model.model.fc.ia3_l": np.ones((3, 1))},
        {f"fc.{name}": tensor for name, tensor in KERNEL.items()},  # A state dict of a model with its adapter.
    ],
)
def test_adapters_are_warned_of(tensors, tmp_path):
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"has adapters of PEFT, .*they are stored apart.*merge_and_unload"):
        found = mj.load_weights(tmp_path)
    assert {path.replace("/", ".") for path in mj.flatten(found)} == set(tensors)


def test_an_adapter_in_place_of_a_model_is_named(tmp_path):
    save_file({"base_model.model.fc.lora_A.weight": np.ones((2, 4))}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"fc/weight is missing;.*It has adapters of PEFT"):
        mj.load_weights(tmp_path / "m.safetensors", like={"fc": {"weight": jax.ShapeDtypeStruct((3, 4), np.float64)}})


def test_a_model_without_adapters_is_not_warned_of(tmp_path):
    save_file(
        {"fc.weight": KERNEL["base_layer.weight"], "base_model.fc.weight": np.ones(2)}, tmp_path / "m.safetensors"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mj.load_weights(tmp_path / "m.safetensors")


def test_factors_of_lora_are_warned_of(tmp_path):
    layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
    mj.save_safetensors(tmp_path / "m.safetensors", {"fc": nnx.state(layer)})
    with pytest.warns(UserWarning, match=r"has factors of LoRA, fc/lora/lora_a, .*its kernel plus their product"):
        mj.load_weights(tmp_path / "m.safetensors")


def test_what_pytorch_computes_weights_from_is_warned_of(tmp_path):
    names = ("fc.parametrizations.weight.original", "fc.parametrizations.weight.0.base")  # Of `orthogonal`, 2.13.
    save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match=r"has no weights for fc/parametrizations/.*remove_parametrizations"):
        mj.load_weights(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"fc/weight is missing;.*It has no weights for .*remove_parametrizations"):
        mj.load_weights(tmp_path / "m.safetensors", like={"fc": {"weight": jax.ShapeDtypeStruct((2, 2), np.float32)}})
