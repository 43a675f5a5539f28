"""MobileNetV2 (Sandler et al., arXiv:1801.04381): the original, and two variants of that name for small images."""

from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from merge_jax.checks import check_above_zero, check_choice
from merge_jax.models.inverted_residual import InvertedResidual
from merge_jax.models.layers import Layers, Padding, rounded_width

__all__ = [
    "InvertedResidualStage",
    "MobileNetV2",
    "Stem",
    "mobilenet_v2",
    "mobilenet_v2_half",
    "mobilenet_v2_imagenet",
    "small_mobilenet_v2",
]

Stem = Literal["padded_1x1", "strided_3x3"]
"""The first layer: a 1x1 convolution with padding 1 (32x32 becomes 34x34), or a 3x3 one with stride 2 (16x16)."""


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InvertedResidualStage(NamedTuple):
    """A stage of inverted residuals: expansion, output channels, number of blocks, stride of the first."""

    expansion: int
    width: int
    blocks: int
    stride: int


class MobileNetV2(nn.Module):
    """MobileNetV2, images `[B, H, W, C]` to logits `[B, num_classes]`, float32.

    Leaves: `stem/kernel`, `stage<i>_<j>/{expand,depthwise,project}/kernel` with `i` from 1 and `j` from 0,
    `head/kernel` (a 1x1 convolution), `fc/kernel`. The input of `fc` is sown as `intermediates/features`.

    Attributes:
      stages: expansion, width, number of blocks and first stride of each stage.
      num_classes: size of the output.
      stem_width: channels after the stem.
      head_width: channels before the pooling.
      stem: the first layer.
      use_bias: whether convolutions have biases, which have no effect before a BatchNorm.
      clipped: whether activations are `min(relu(x), 6)` instead of `relu(x)`.
      expands_by_one: whether blocks of expansion 1 have an `expand`.
      padding: of the convolutions with a window.
      momentum: share of the running statistics of BatchNorm that a step keeps.
      epsilon: of BatchNorm.
      dtype: of the computation up to the features, e.g. bfloat16; parameters and logits are float32.
      axis_name: the `pmap` axis over which BatchNorm computes the batch's statistics, if any.
      pixels: mean and standard deviation of each channel, for pixels in [0, 1], that scale images for the pretrained
        networks; for `merge_jax.on_pixels`. None if there are none.
    """

    stages: tuple[InvertedResidualStage, ...]
    num_classes: int
    stem_width: int = 32
    head_width: int = 1280
    stem: Stem = "padded_1x1"
    use_bias: bool = True
    clipped: bool = True
    expands_by_one: bool = True
    padding: Padding = "even"
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: str | None = None
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`; `train` uses the batch's statistics."""
        check_choice("stem", self.stem, get_args(Stem))
        layers = Layers(self.dtype, self.axis_name, train, self.momentum, self.epsilon, self.padding)
        activation = nn.relu6 if self.clipped else nn.relu
        if self.stem == "padded_1x1":
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = layers.pointwise_conv(self.stem_width, "stem", use_bias=self.use_bias)(x)
        else:
            x = layers.conv(self.stem_width, 2, "stem")(x)
        x = activation(layers.batch_norm("stem_norm")(x))
        for i, stage in enumerate(self.stages, start=1):
            for j in range(stage.blocks):
                stride = stage.stride if j == 0 else 1
                x = InvertedResidual(
                    stage.expansion,
                    stage.width,
                    stride,
                    layers,
                    expands_by_one=self.expands_by_one,
                    use_bias=self.use_bias,
                    clipped=self.clipped,
                    name=f"stage{i}_{j}",
                )(x)
        x = layers.pointwise_conv(self.head_width, "head", use_bias=self.use_bias)(x)
        x = activation(layers.batch_norm("head_norm")(x))
        features = x.mean(axis=(1, 2), dtype=jnp.float32)
        self.sow("intermediates", "features", features)
        return nn.Dense(self.num_classes, name="fc")(features)


def mobilenet_v2(num_classes: int = 100, **options: Any) -> MobileNetV2:
    """Returns the MobileNetV2 of the published CIFAR-100 run; 2,369,380 parameters at 100 classes, 3 channels.

    The distillation literature uses a different network, `mobilenet_v2_half`. Options are the other attributes of
    `MobileNetV2`, such as `dtype`.
    """
    stages = (
        InvertedResidualStage(1, 16, 1, 1),
        InvertedResidualStage(6, 24, 2, 2),
        InvertedResidualStage(6, 32, 3, 2),
        InvertedResidualStage(6, 64, 4, 2),
        InvertedResidualStage(6, 96, 3, 1),
        InvertedResidualStage(6, 160, 3, 1),
        InvertedResidualStage(6, 320, 1, 1),
    )
    return MobileNetV2(stages, num_classes, **options)


def mobilenet_v2_half(num_classes: int = 100, **options: Any) -> MobileNetV2:
    """Returns the half-width MobileNetV2 of the distillation literature; 812,836 parameters at 100 classes.

    As in RepDistiller (Tian et al., arXiv:1910.10699) and later work, which call it MobileNetV2. Expansion is 6, and
    width 0.5 except for the 1280 channels before the pooling. It has a 3x3 stem with stride 2, no biases, and an
    unclipped `relu`. Options are the other attributes of `MobileNetV2`, such as `dtype`.
    """
    stages = (
        InvertedResidualStage(1, 8, 1, 1),
        InvertedResidualStage(6, 12, 2, 1),
        InvertedResidualStage(6, 16, 3, 2),
        InvertedResidualStage(6, 32, 4, 2),
        InvertedResidualStage(6, 48, 3, 1),
        InvertedResidualStage(6, 80, 3, 2),
        InvertedResidualStage(6, 160, 1, 1),
    )
    return MobileNetV2(stages, num_classes, stem_width=16, stem="strided_3x3", use_bias=False, clipped=False, **options)


def mobilenet_v2_imagenet(num_classes: int = 1000, width: float = 1.0, **options: Any) -> MobileNetV2:
    """Returns the MobileNetV2 of the paper, for ImageNet; 3,504,872 parameters at 1000 classes and 3 channels.

    As in torchvision and timm: a total stride of 32, no expansion in the first block, no biases. The Keras version has
    `padding="same"`, `epsilon=1e-3` and `momentum=0.999`.

    Args:
      num_classes: size of the output.
      width: multiplies the channels, rounded to multiples of 8; the last layer keeps at least 1280.
      **options: other attributes of `MobileNetV2`.

    Raises:
      ValueError: a width that is not above 0.
    """
    check_above_zero(width=width)
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    scaled = [InvertedResidualStage(t, rounded_width(width * c), n, s) for t, c, n, s in stages]
    sizes = {"stem_width": rounded_width(width * 32), "head_width": rounded_width(max(1, width) * 1280)}
    as_there = {"stem": "strided_3x3", "use_bias": False, "expands_by_one": False, "pixels": _IMAGENET}
    return MobileNetV2(tuple(scaled), num_classes, **{**sizes, **as_there, **options})


def small_mobilenet_v2(num_classes: int = 10, num_stages: int = 3, **options: Any) -> MobileNetV2:
    """Returns a MobileNetV2 of up to three blocks for 8x8 images, for examples that run in seconds."""
    stages = (
        InvertedResidualStage(2, 8, 1, 1),
        InvertedResidualStage(2, 16, 1, 2),
        InvertedResidualStage(2, 32, 1, 2),
    )
    return MobileNetV2(stages[:num_stages], num_classes, stem_width=8, head_width=64, **options)
