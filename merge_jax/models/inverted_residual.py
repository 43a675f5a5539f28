"""The block of MobileNetV2 and of EfficientNet-lite (Sandler et al., arXiv:1801.04381)."""

import flax.linen as nn
import jax

from merge_jax.models.layers import Layers

__all__ = ["InvertedResidual"]


class InvertedResidual(nn.Module):
    """Expand (1x1), filter (depthwise), project (1x1), `[B, H, W, C] -> [B, H/s, W/s, width]`.

    Leaves: `{expand,depthwise,project}/kernel`, and a norm after each. The input is added if the shapes are equal.

    Attributes:
      expansion: channels of the filter, as a multiple of the input's.
      width: channels of the output.
      stride: of the filter.
      layers: creates the layers.
      window: of the filter, in pixels.
      expands_by_one: whether there is an `expand` if the expansion is 1.
      use_bias: whether convolutions have biases.
      clipped: whether activations are `min(relu(x), 6)` instead of `relu(x)`.
    """

    expansion: int
    width: int
    stride: int
    layers: Layers
    window: int = 3
    expands_by_one: bool = False
    use_bias: bool = False
    clipped: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H/s, W/s, width]`."""
        layers, y = self.layers, x
        activation = nn.relu6 if self.clipped else nn.relu
        if self.expansion > 1 or self.expands_by_one:
            y = layers.pointwise_conv(self.expansion * x.shape[-1], "expand", use_bias=self.use_bias)(y)
            y = activation(layers.batch_norm("expand_norm")(y))
        y = layers.depthwise_conv(self.stride, "depthwise", use_bias=self.use_bias, size=self.window)(y)
        y = activation(layers.batch_norm("depthwise_norm")(y))
        y = layers.pointwise_conv(self.width, "project", use_bias=self.use_bias)(y)
        y = layers.batch_norm("project_norm")(y)
        return x + y if self.stride == 1 and x.shape[-1] == self.width else y
