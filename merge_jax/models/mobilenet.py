"""MobileNetV2 for small images (Sandler et al., arXiv:1801.04381)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from merge_jax.models.layers import DepthwiseConv, batch_norm, pointwise_conv

__all__ = ["InvertedResidualStage", "MobileNetV2", "mobilenet_v2", "small_mobilenet_v2"]


class InvertedResidualStage(NamedTuple):
    """A stage of inverted residuals: expansion, output channels, number of blocks, stride of the first."""

    expansion: int
    width: int
    blocks: int
    stride: int


class _InvertedResidual(nn.Module):
    """Expand (1x1), filter (3x3 depthwise), project (1x1), `[B, H, W, C] -> [B, H/s, W/s, width]`."""

    expansion: int
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = pointwise_conv(self.expansion * x.shape[-1], "expand", use_bias=True)(x)
        y = nn.relu6(batch_norm(train, "expand_norm")(y))
        y = DepthwiseConv(self.stride, name="depthwise")(y)
        y = nn.relu6(batch_norm(train, "depthwise_norm")(y))
        y = pointwise_conv(self.width, "project", use_bias=True)(y)
        y = batch_norm(train, "project_norm")(y)
        return x + y if self.stride == 1 and x.shape[-1] == self.width else y


class MobileNetV2(nn.Module):
    """MobileNetV2 as in the published CIFAR-100 run, images `[B, H, W, C]` to logits `[B, num_classes]`.

    The stem is a 1x1 convolution with padding 1 (so 32x32 becomes 34x34), convolutions have biases, and the
    head is a 1x1 convolution. Leaves: `stem/kernel`, `stage<i>_<j>/{expand,depthwise,project}/kernel` with
    `i` from 1 and `j` from 0, `head/kernel`, `fc/kernel`.

    Attributes:
      stages: expansion, width, number of blocks and first stride of each stage.
      num_classes: size of the output.
      stem_width: channels after the stem.
      head_width: channels before the pooling.
    """

    stages: tuple[InvertedResidualStage, ...]
    num_classes: int
    stem_width: int = 32
    head_width: int = 1280

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`; `train` takes the batch's statistics."""
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = pointwise_conv(self.stem_width, "stem", use_bias=True)(x)
        x = nn.relu6(batch_norm(train, "stem_norm")(x))
        for i, stage in enumerate(self.stages, start=1):
            for j in range(stage.blocks):
                stride = stage.stride if j == 0 else 1
                block = _InvertedResidual(stage.expansion, stage.width, stride, name=f"stage{i}_{j}")
                x = block(x, train=train)
        x = pointwise_conv(self.head_width, "head", use_bias=True)(x)
        x = nn.relu6(batch_norm(train, "head_norm")(x))
        return nn.Dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))


def mobilenet_v2(num_classes: int = 100) -> MobileNetV2:
    """Returns the MobileNetV2 of the published CIFAR-100 run; 2,369,380 parameters at 100 classes, 3 channels."""
    stages = (
        InvertedResidualStage(1, 16, 1, 1),
        InvertedResidualStage(6, 24, 2, 2),
        InvertedResidualStage(6, 32, 3, 2),
        InvertedResidualStage(6, 64, 4, 2),
        InvertedResidualStage(6, 96, 3, 1),
        InvertedResidualStage(6, 160, 3, 1),
        InvertedResidualStage(6, 320, 1, 1),
    )
    return MobileNetV2(stages, num_classes)


def small_mobilenet_v2(num_classes: int = 10, num_stages: int = 3) -> MobileNetV2:
    """Returns a MobileNetV2 of up to three blocks for 8x8 images, for examples that run in seconds."""
    stages = (
        InvertedResidualStage(2, 8, 1, 1),
        InvertedResidualStage(2, 16, 1, 2),
        InvertedResidualStage(2, 32, 1, 2),
    )
    return MobileNetV2(stages[:num_stages], num_classes, stem_width=8, head_width=64)
