"""EfficientNet-lite (Tan and Le, arXiv:1905.11946): EfficientNet without squeeze-and-excitation, with `relu6`."""

import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from merge_jax.checks import check_above_zero
from merge_jax.models.inverted_residual import InvertedResidual
from merge_jax.models.layers import Layers, rounded_width

__all__ = ["EfficientNetLite", "EfficientNetStage", "efficientnet_lite"]


class EfficientNetStage(NamedTuple):
    """A stage of inverted residuals: expansion, output channels, number of blocks, first stride, depthwise window."""

    expansion: int
    width: int
    blocks: int
    stride: int
    window: int


class EfficientNetLite(nn.Module):
    """EfficientNet-lite, images `[B, H, W, C]` to logits `[B, num_classes]`, float32.

    Leaves: `stem/kernel`, `stage<i>_<j>/{expand,depthwise,project}/kernel` with `i` from 1 and `j` from 0 (`stage1_0`
    does not expand), `head/kernel` (a 1x1 convolution), `fc/kernel`. The input of `fc` is sown as
    `intermediates/features`. Padding is TensorFlow's SAME and the epsilon of BatchNorm 1e-3, as in the original. Its
    dropout and stochastic depth are left out (our choice: no other network here has them).

    The total stride is 32. So images of 224 pixels have 49 positions at the end. Images of 64 pixels have four, and of
    32 pixels one. Scale small images up; `stem_stride=1` keeps their pixels, a scale for which pretrained filters were
    not trained.

    Attributes:
      stages: expansion, width, number of blocks, first stride and window of each stage.
      num_classes: size of the output.
      stem_width: channels after the stem.
      head_width: channels before the pooling.
      stem_stride: of the first convolution; the original's is 2.
      momentum: of the running statistics of BatchNorm; the original's 0.99 needs a few hundred steps.
      dtype: of the computation up to the features, e.g. bfloat16; parameters and logits are float32.
      axis_name: the `pmap` axis over which BatchNorm computes the batch's statistics, if any.
      pixels: mean and standard deviation of each channel, for pixels in [0, 1], that scale images for the pretrained
        networks: `(x - 127) / 128` for uint8; for `merge_jax.on_pixels`.
    """

    stages: tuple[EfficientNetStage, ...]
    num_classes: int
    stem_width: int = 32
    head_width: int = 1280
    stem_stride: int = 2
    momentum: float = 0.99
    dtype: Any = jnp.float32
    axis_name: str | None = None
    pixels: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = ((127 / 255,) * 3, (128 / 255,) * 3)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`; `train` uses the batch's statistics."""
        layers = Layers(self.dtype, self.axis_name, train, self.momentum, epsilon=1e-3, padding="same")
        x = layers.conv(self.stem_width, self.stem_stride, "stem")(x)
        x = nn.relu6(layers.batch_norm("stem_norm")(x))
        for i, stage in enumerate(self.stages, start=1):
            for j in range(stage.blocks):
                stride = stage.stride if j == 0 else 1
                x = InvertedResidual(stage.expansion, stage.width, stride, layers, stage.window, name=f"stage{i}_{j}")(
                    x
                )
        x = layers.pointwise_conv(self.head_width, "head")(x)
        x = nn.relu6(layers.batch_norm("head_norm")(x))
        features = x.mean(axis=(1, 2), dtype=jnp.float32)
        self.sow("intermediates", "features", features)
        return nn.Dense(self.num_classes, name="fc")(features)


def efficientnet_lite(
    num_classes: int = 1000, width: float = 1.0, depth: float = 1.0, **options: Any
) -> EfficientNetLite:
    """Returns an EfficientNet-lite; lite0 by default, 4,652,008 parameters at 1000 classes and 3 channels.

    lite1 to lite4 have width and depth (1, 1.1), (1.1, 1.2), (1.2, 1.4) and (1.4, 1.8). A half-width lite0,
    `width=0.5`, has the same leaf paths. As in the original, stem, head and the numbers of blocks of the first and the
    last stage are not scaled, and widths are rounded to multiples of 8.

    Args:
      num_classes: size of the output.
      width: multiplies the channels of the stages.
      depth: multiplies the number of blocks of the inner stages.
      **options: the other attributes of `EfficientNetLite`, such as `dtype`.

    Raises:
      ValueError: a multiplier that is not above 0.
    """
    check_above_zero(width=width, depth=depth)
    stages = [
        EfficientNetStage(1, 16, 1, 1, 3),
        EfficientNetStage(6, 24, 2, 2, 3),
        EfficientNetStage(6, 40, 2, 2, 5),
        EfficientNetStage(6, 80, 3, 2, 3),
        EfficientNetStage(6, 112, 3, 1, 5),
        EfficientNetStage(6, 192, 4, 2, 5),
        EfficientNetStage(6, 320, 1, 1, 3),
    ]
    scaled = [
        stage._replace(
            width=rounded_width(width * stage.width),
            blocks=stage.blocks if stage in (stages[0], stages[-1]) else math.ceil(depth * stage.blocks),
        )
        for stage in stages
    ]
    return EfficientNetLite(tuple(scaled), num_classes, **options)
