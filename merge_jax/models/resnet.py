"""ResNets for small images (He et al., arXiv:1512.03385): a 3x3 stem and no pooling before the first stage."""

from typing import NamedTuple

import flax.linen as nn
import jax

from merge_jax.models.layers import batch_norm, conv3x3, pointwise_conv

__all__ = ["ResNet", "ResNetStage", "resnet50", "small_resnet"]


class ResNetStage(NamedTuple):
    """A stage of residual blocks: their width, their number, and the stride of the first."""

    width: int
    blocks: int
    stride: int


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, `[B, H, W, C] -> [B, H/s, W/s, width]`."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = conv3x3(self.width, self.stride, "conv1")(x)
        y = nn.relu(batch_norm(train, "norm1")(y))
        y = conv3x3(self.width, 1, "conv2")(y)
        y = batch_norm(train, "norm2")(y)
        return nn.relu(y + _shortcut(x, self.width, self.stride, train))


class _BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, `[B, H, W, C] -> [B, H/s, W/s, 4 width]`."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = pointwise_conv(self.width, "conv1")(x)
        y = nn.relu(batch_norm(train, "norm1")(y))
        y = conv3x3(self.width, self.stride, "conv2")(y)
        y = nn.relu(batch_norm(train, "norm2")(y))
        y = pointwise_conv(4 * self.width, "conv3")(y)
        y = batch_norm(train, "norm3")(y)
        return nn.relu(y + _shortcut(x, 4 * self.width, self.stride, train))


def _shortcut(x: jax.Array, features: int, stride: int, train: bool) -> jax.Array:
    if stride == 1 and x.shape[-1] == features:
        return x
    x = pointwise_conv(features, "shortcut")(x[:, ::stride, ::stride])
    return batch_norm(train, "shortcut_norm")(x)


class ResNet(nn.Module):
    """A residual network, images `[B, H, W, C]` to logits `[B, num_classes]`.

    Leaves: `stem/kernel`, `stage<i>_<j>/conv<k>/kernel` with `i` from 1 and `j` from 0, `fc/kernel`.

    Attributes:
      stages: width, number of blocks and first stride of each stage.
      num_classes: size of the output.
      stem_width: channels after the stem.
      bottleneck: blocks of three convolutions (as ResNet50) instead of two (as ResNet18).
    """

    stages: tuple[ResNetStage, ...]
    num_classes: int
    stem_width: int = 64
    bottleneck: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`; `train` takes the batch's statistics."""
        x = conv3x3(self.stem_width, 1, "stem")(x)
        x = nn.relu(batch_norm(train, "stem_norm")(x))
        block = _BottleneckBlock if self.bottleneck else _BasicBlock
        for i, stage in enumerate(self.stages, start=1):
            for j in range(stage.blocks):
                stride = stage.stride if j == 0 else 1
                x = block(stage.width, stride, name=f"stage{i}_{j}")(x, train=train)
        return nn.Dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))


def resnet50(num_classes: int = 100) -> ResNet:
    """Returns the ResNet50 of the published CIFAR-100 run; 23,705,252 parameters at 100 classes and 3 channels."""
    stages = (
        ResNetStage(64, 3, 1),
        ResNetStage(128, 4, 2),
        ResNetStage(256, 6, 2),
        ResNetStage(512, 3, 2),
    )
    return ResNet(stages, num_classes)


def small_resnet(num_classes: int = 10, num_stages: int = 3) -> ResNet:
    """Returns a ResNet of up to three basic blocks for 8x8 images, for examples that run in seconds."""
    stages = (ResNetStage(16, 1, 1), ResNetStage(32, 1, 2), ResNetStage(64, 1, 2))
    return ResNet(stages[:num_stages], num_classes, stem_width=16, bottleneck=False)
