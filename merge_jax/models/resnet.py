"""ResNets (He et al., arXiv:1512.03385): for small images, with a 3x3 stem and no initial pooling, and for ImageNet."""

from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.checks import check_above_zero, check_choice
from merge_jax.models.layers import Layers

__all__ = [
    "ResNet",
    "ResNetStage",
    "ResNetStem",
    "resnet18",
    "resnet18_imagenet",
    "resnet34_imagenet",
    "resnet50",
    "resnet50_imagenet",
    "small_resnet",
]

ResNetStem = Literal["3x3", "pooled_7x7"]
"""The first layer: a 3x3 convolution without a stride, or a 7x7 one with stride 2 and a 3x3 max pool with stride 2."""

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ResNetStage(NamedTuple):
    """A stage of residual blocks: width, number of blocks, and stride of the first."""

    width: int
    blocks: int
    stride: int


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, `[B, H, W, C] -> [B, H/s, W/s, width]`."""

    width: int
    stride: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.layers.conv(self.width, self.stride, "conv1")(x)
        y = nn.relu(self.layers.batch_norm("norm1")(y))
        y = self.layers.conv(self.width, 1, "conv2")(y)
        y = self.layers.batch_norm("norm2")(y)
        return nn.relu(y + _shortcut(x, self.width, self.stride, self.layers))


class _BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, `[B, H, W, C] -> [B, H/s, W/s, 4 width]`."""

    width: int
    stride: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.layers.pointwise_conv(self.width, "conv1")(x)
        y = nn.relu(self.layers.batch_norm("norm1")(y))
        y = self.layers.conv(self.width, self.stride, "conv2")(y)
        y = nn.relu(self.layers.batch_norm("norm2")(y))
        y = self.layers.pointwise_conv(4 * self.width, "conv3")(y)
        y = self.layers.batch_norm("norm3")(y)
        return nn.relu(y + _shortcut(x, 4 * self.width, self.stride, self.layers))


def _shortcut(x: jax.Array, features: int, stride: int, layers: Layers) -> jax.Array:
    if stride == 1 and x.shape[-1] == features:
        return x
    if stride > 1:
        # XLA's GPU compiler aborts when it fuses a strided slice into a product (openxla/xla#47381).
        x = lax.optimization_barrier(x[:, ::stride, ::stride])
    x = layers.pointwise_conv(features, "shortcut")(x)
    return layers.batch_norm("shortcut_norm")(x)


class ResNet(nn.Module):
    """A residual network, images `[B, H, W, C]` to logits `[B, num_classes]`, float32.

    Leaves: `stem/kernel`, `stage<i>_<j>/conv<k>/kernel` with `i` from 1 and `j` from 0, `fc/kernel`. The input of
    `fc` is sown as `intermediates/features`.

    Attributes:
      stages: width, number of blocks and first stride of each stage.
      num_classes: size of the output.
      stem_width: channels after the stem.
      bottleneck: blocks of three convolutions (as ResNet50) instead of two (as ResNet18).
      dtype: of the computation up to the features, e.g. bfloat16; parameters and logits are float32.
      axis_name: the `pmap` axis over which BatchNorm computes the batch's statistics, if any.
      stem: the first layer.
      pixels: mean and standard deviation of each channel, for pixels in [0, 1], that scale images for the pretrained
        networks; for `merge_jax.on_pixels`. None if there are none.
    """

    stages: tuple[ResNetStage, ...]
    num_classes: int
    stem_width: int = 64
    bottleneck: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None
    stem: ResNetStem = "3x3"
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`; `train` uses the batch's statistics.

        Raises:
          ValueError: while tracing, for an unknown stem.
        """
        check_choice("stem", self.stem, get_args(ResNetStem))
        layers, pooled = Layers(self.dtype, self.axis_name, train), self.stem == "pooled_7x7"
        x = layers.conv(self.stem_width, 2 if pooled else 1, "stem", size=7 if pooled else 3)(x)
        x = nn.relu(layers.batch_norm("stem_norm")(x))
        if pooled:
            sides: Any = ((1, 1), (1, 1))  # Flax's annotation allows only names.
            x = nn.max_pool(x, (3, 3), (2, 2), sides)
        block = _BottleneckBlock if self.bottleneck else _BasicBlock
        for i, stage in enumerate(self.stages, start=1):
            for j in range(stage.blocks):
                stride = stage.stride if j == 0 else 1
                x = block(stage.width, stride, layers, name=f"stage{i}_{j}")(x)
        features = x.mean(axis=(1, 2), dtype=jnp.float32)
        self.sow("intermediates", "features", features)
        return nn.Dense(self.num_classes, name="fc")(features)


def resnet50(num_classes: int = 100, **options: Any) -> ResNet:
    """Returns the ResNet50 of the published CIFAR-100 run; 23,705,252 parameters at 100 classes and 3 channels.

    Options are the other attributes of `ResNet`, such as `dtype`.
    """
    stages = (
        ResNetStage(64, 3, 1),
        ResNetStage(128, 4, 2),
        ResNetStage(256, 6, 2),
        ResNetStage(512, 3, 2),
    )
    return ResNet(stages, num_classes, **options)


def resnet18(num_classes: int = 100, width: float = 1.0, **options: Any) -> ResNet:
    """Returns a ResNet18 for small images; 11,220,132 parameters at 100 classes, 3 channels and width 1.

    Args:
      num_classes: size of the output.
      width: multiplies all numbers of channels (64 to 512); at 0.25 there are 0.7 million parameters.
      **options: the other attributes of `ResNet`, such as `dtype`.
    """
    widths = [round(width * channels) for channels in (64, 128, 256, 512)]
    stages = tuple(ResNetStage(w, 2, stride) for w, stride in zip(widths, (1, 2, 2, 2), strict=True))
    return ResNet(stages, num_classes, stem_width=widths[0], bottleneck=False, **options)


def small_resnet(num_classes: int = 10, num_stages: int = 3, width: float = 1.0, **options: Any) -> ResNet:
    """Returns a ResNet of up to three basic blocks for 8x8 images, for examples that run in seconds.

    `width` scales its 16, 32 and 64 channels.
    """
    widths = [round(width * channels) for channels in (16, 32, 64)]
    stages = [ResNetStage(channels, 1, stride) for channels, stride in zip(widths, (1, 2, 2), strict=True)]
    return ResNet(tuple(stages[:num_stages]), num_classes, stem_width=widths[0], bottleneck=False, **options)


def resnet18_imagenet(num_classes: int = 1000, width: float = 1.0, **options: Any) -> ResNet:
    """Returns the ResNet18 of torchvision and timm, for ImageNet; 11,689,512 parameters at 1000 classes and width 1.

    A 7x7 stem with stride 2 and a max pool. The first 3x3 convolution of a stage has its stride, as in torchvision; in
    the paper's larger networks, a 1x1 convolution has it.

    Args:
      num_classes: size of the output.
      width: multiplies all numbers of channels.
      **options: the other attributes of `ResNet`, such as `dtype`.

    Raises:
      ValueError: a width that is not above 0.
    """
    return _imagenet(num_classes, width, (2, 2, 2, 2), bottleneck=False, **options)


def resnet34_imagenet(num_classes: int = 1000, width: float = 1.0, **options: Any) -> ResNet:
    """Returns the ResNet34, see `resnet18_imagenet`; 21,797,672 parameters at 1000 classes and width 1."""
    return _imagenet(num_classes, width, (3, 4, 6, 3), bottleneck=False, **options)


def resnet50_imagenet(num_classes: int = 1000, width: float = 1.0, **options: Any) -> ResNet:
    """Returns the ResNet50, see `resnet18_imagenet`; 25,557,032 parameters at 1000 classes and width 1."""
    return _imagenet(num_classes, width, (3, 4, 6, 3), bottleneck=True, **options)


def _imagenet(num_classes: int, width: float, blocks: tuple[int, ...], **options: Any) -> ResNet:
    check_above_zero(width=width)
    widths = [round(width * channels) for channels in (64, 128, 256, 512)]
    stages = tuple(map(ResNetStage, widths, blocks, (1, 2, 2, 2)))
    options = {"stem_width": widths[0], "stem": "pooled_7x7", "pixels": _IMAGENET, **options}
    return ResNet(stages, num_classes, **options)
