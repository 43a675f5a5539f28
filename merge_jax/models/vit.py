"""Vision transformers: an encoder of images as a sequence of patches, and a classifier on top."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from merge_jax.checks import check_at_least_one, check_below_one, check_float_dtype
from merge_jax.models.blocks import attention, check_heads, dense, feed_forward, layer_norm

__all__ = ["ImageClassifier", "VisionTransformer", "small_vit", "tiny_vit", "vit_base"]


_INIT = nn.initializers.xavier_uniform()


def _patches(images: jax.Array, size: int) -> jax.Array:
    """Returns the patches of images `[B, H, W, C]`, row by row, `[B, P, size size C]`."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
    return x.reshape(batch, rows * columns, size * size * channels)


class _Layer(nn.Module):
    """Attention and a feed-forward block, each with a preceding norm and a shortcut, `[B, N, width]` to the same."""

    num_heads: int
    hidden: int
    dropout_rate: float
    dtype: Any
    epsilon: float
    approximate_gelu: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        attend = attention(self.num_heads, self.dropout_rate, self.dtype, _INIT, "attention", train=train)
        x += dropout(attend(layer_norm(self.dtype, "norm1", self.epsilon)(x)))
        y = layer_norm(self.dtype, "norm2", self.epsilon)(x)
        return x + dropout(feed_forward(y, self.hidden, self.dtype, _INIT, approximate_gelu=self.approximate_gelu))


class VisionTransformer(nn.Module):
    """A transformer over patches, images `[B, H, W, C]` to `[B, 1 + P, width]`; the first position is the class token.

    The image is cut into P = (H / p)^2 patches, row by row, and one dense layer maps each to a vector: the paper's
    convolution as a matrix product, faster than XLA's on a CPU. Each layer is
    `x = x + attention(norm1(x)); x = x + down(gelu(up(norm2(x))))`, and a norm follows the last layer. Dropout is as in
    `TextEncoder`: on the embeddings, on attention weights and after each block.

    Leaves: `patch/kernel [p p C, width]`, whose rows are the pixels of a patch by row, column and channel,
    `class_token [width]`, `position/embedding [1 + P, width]`, `norm/{scale,bias}`, and in `layer_<i>` those of
    `TextEncoder`. So `layer_<i>/attention` is a block for routes in the view `attention`, from and to texts too.

    Source: arXiv:2010.11929, whose code (google-research/vision_transformer) also initialises kernels Xavier-uniform.
    Class token and positions start with the standard deviation width^(-1/2), our choice. With the code's 0 and 0.02, or
    BERT's value for all, a small model hardly distinguishes positions at first and needs several times the steps. The
    epsilon of the norms, 1e-12, and the exact gelu are those of Hugging Face's port. The original and big_vision have
    1e-6 and the approximate gelu, timm 1e-6 and the exact one (see `vision_transformer_of`).

    Attributes:
      image_size: height and width of the images, pixels.
      patch_size: height and width of a patch, divisors of the image size.
      width: size of a position's vector.
      num_layers: number of layers.
      num_heads: heads of each attention, which split the width.
      hidden: inner width of the feed-forward blocks.
      dropout_rate: of dropout, in [0, 1).
      dtype: of the computation and the output, e.g. bfloat16; parameters are float32.
      epsilon: of the norms, added to the variance.
      approximate_gelu: whether gelu is `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2` instead of exact, by erf.
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    epsilon: float = 1e-12
    approximate_gelu: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, C]` to `[B, 1 + P, width]`; `train` turns dropout on.

        Raises:
          ValueError: while tracing, for an attribute out of range, or images that are not floats of the image size.
        """
        self._check(images)
        x = dense(self.width, self.dtype, _INIT, "patch")(_patches(images, self.patch_size))
        token_init = nn.initializers.normal(self.width**-0.5)
        token = self.param("class_token", token_init, (self.width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        positions = nn.Embed(x.shape[1], self.width, dtype=self.dtype, name="position")
        x += positions(jnp.arange(x.shape[1])[None])
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        for i in range(self.num_layers):
            options = (self.dropout_rate, self.dtype, self.epsilon, self.approximate_gelu)
            x = _Layer(self.num_heads, self.hidden, *options, name=f"layer_{i}")(x, train=train)
        return layer_norm(self.dtype, "norm", self.epsilon)(x)

    def _check(self, images: jax.Array) -> None:
        check_at_least_one(
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            hidden=self.hidden,
        )
        check_below_one(dropout_rate=self.dropout_rate)
        check_float_dtype(self.dtype)
        check_heads(self.width, self.num_heads)
        size = self.image_size
        if size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {size}")
        floats = jnp.issubdtype(images.dtype, jnp.floating)
        if not floats or images.ndim != 4 or images.shape[1:3] != (size, size):
            found = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"images must be floats [B, {size}, {size}, C], got {found}")


class ImageClassifier(nn.Module):
    """Classes from an image's class token, images `[B, H, W, C]` to logits `[B, num_classes]`, float32.

    `classifier(x_0)`, with `x_0` after the encoder's last norm; it is sown as `intermediates/features`.

    Attributes:
      encoder: encoder of the image; its leaves are below `encoder`.
      num_classes: size of the output.
    """

    encoder: VisionTransformer
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`; `train` turns dropout on.

        Raises:
          ValueError: while tracing, as the encoder, and for no classes.
        """
        check_at_least_one(num_classes=self.num_classes)
        features = self.encoder(images, train=train)[:, 0].astype(jnp.float32)
        self.sow("intermediates", "features", features)
        return dense(self.num_classes, jnp.float32, _INIT, "classifier")(features)


def vit_base(image_size: int = 224, patch_size: int = 16, **options: Any) -> VisionTransformer:
    """Returns the encoder of ViT-B; 85,798,656 parameters for 3 channels and patches of 16 in images of 224 pixels.

    Options are the other attributes of `VisionTransformer`, such as `dtype`.
    """
    return VisionTransformer(image_size, patch_size, 768, 12, 12, 3072, **options)


def small_vit(
    image_size: int, patch_size: int = 4, num_layers: int = 4, width: int = 64, **options: Any
) -> VisionTransformer:
    """Returns a ViT of 4 layers, width 64 and 4 heads, for examples that run in seconds."""
    return VisionTransformer(image_size, patch_size, width, num_layers, 4, 4 * width, **options)


def tiny_vit(
    image_size: int, patch_size: int = 4, num_layers: int = 2, width: int = 48, **options: Any
) -> VisionTransformer:
    """Returns a ViT of 2 layers, width 48 and 4 heads, the partner of `small_vit`, smaller in depth and width."""
    return VisionTransformer(image_size, patch_size, width, num_layers, 4, 4 * width, **options)
