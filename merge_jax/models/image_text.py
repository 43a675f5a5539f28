"""Models of images with text: visual question answering, and image and text embeddings in one space."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from merge_jax.checks import check_at_least_one, check_below_one
from merge_jax.models.blocks import attention, check_heads, dense, feed_forward, layer_norm, not_padding
from merge_jax.models.transformer import TextEncoder
from merge_jax.models.vit import VisionTransformer

__all__ = ["DualEncoder", "Embeddings", "VisualAnswerer"]

# With BERT's 0.02, small models learn to see late: an attention of width 64 would add a fiftieth of its input.
_INIT = nn.initializers.xavier_uniform()
_LOG_SCALE = math.log(1 / 0.07)
_MAX_LOG_SCALE = math.log(100)


class _FusionLayer(nn.Module):
    """Attention to the image, among the words, and a feed-forward block, each followed by a shortcut and a norm.

    Text `[B, L, width]` and image `[B, N, width]` to text.
    """

    num_heads: int
    hidden: int
    dropout_rate: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, image: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        look = attention(self.num_heads, self.dropout_rate, self.dtype, _INIT, "cross_attention", train=train)
        attend = attention(self.num_heads, self.dropout_rate, self.dtype, _INIT, "attention", train=train)
        x = layer_norm(self.dtype, "norm1")(x + dropout(look(x, image)))
        x = layer_norm(self.dtype, "norm2")(x + dropout(attend(x, mask=mask)))
        return layer_norm(self.dtype, "norm3")(x + dropout(feed_forward(x, self.hidden, self.dtype, _INIT)))


class VisualAnswerer(nn.Module):
    """Answers to questions on images, images `[B, H, W, C]` and tokens `[B, L]` to logits `[B, num_answers]`, float32.

    The output of the image encoder, `v [B, N, width]`, is projected to the width of the text if the widths differ. Each
    fusion layer is `x = norm1(x + cross_attention(x, v)); x = norm2(x + attention(x));
    x = norm3(x + down(gelu(up(x))))`, starting from the encoded text, and the logits are `answer(dropout(x_0))`. So
    every word attends to the image, and the first token then to the words. `x_0` is sown as `intermediates/features`,
    before dropout.

    The order within a layer is that of LXMERT's cross-modality layers (arXiv:1908.07490) for the text. There, the image
    also attends to the words, which matters less if the answer is read from the text. A norm follows each block, as in
    the text encoder, so input and output of the fusion layers are both normalised.

    Leaves: those of the encoders below `image_encoder` and `text_encoder`, `image_projection/{kernel,bias}` if the
    widths differ, `fusion_<i>/{cross_attention,norm1,attention,norm2,up,down,norm3}` with `i` from 0, and
    `answer/{kernel,bias}`. All attentions are blocks for routes in the view `attention`.

    Attributes:
      image_encoder: encoder of the image.
      text_encoder: encoder of the question; fusion layers have its width, inner width and dtype.
      num_answers: size of the output.
      num_layers: number of fusion layers.
      num_heads: heads of each attention in them.
      dropout_rate: of dropout in the fusion layers and before the answer, in [0, 1); the encoders have separate rates.
    """

    image_encoder: VisionTransformer
    text_encoder: TextEncoder
    num_answers: int
    num_layers: int = 1
    num_heads: int = 4
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, images: jax.Array, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, C]` and tokens `[B, L]`, 0 for padding, to logits `[B, num_answers]`.

        `train` turns dropout on.

        Raises:
          ValueError: while tracing, as the encoders, for an attribute out of range, and for images and tokens of
            different batches.
        """
        check_at_least_one(num_answers=self.num_answers, num_layers=self.num_layers, num_heads=self.num_heads)
        check_below_one(dropout_rate=self.dropout_rate)
        image = self.image_encoder(images, train=train)
        x = self.text_encoder(tokens, train=train)
        if len(image) != len(x):
            raise ValueError(f"each question needs its image, got {len(image)} images and {len(x)} questions")
        width, dtype = self.text_encoder.width, self.text_encoder.dtype
        check_heads(width, self.num_heads)
        if image.shape[-1] != width:
            image = dense(width, dtype, _INIT, "image_projection")(image)
        mask = not_padding(tokens)
        for i in range(self.num_layers):
            hidden = self.text_encoder.hidden
            layer = _FusionLayer(self.num_heads, hidden, self.dropout_rate, dtype, name=f"fusion_{i}")
            x = layer(x, image, mask, train=train)
        features = x[:, 0].astype(jnp.float32)
        self.sow("intermediates", "features", features)
        features = nn.Dropout(self.dropout_rate, deterministic=not train)(features)
        return dense(self.num_answers, jnp.float32, _INIT, "answer")(features)


class Embeddings(NamedTuple):
    """Images and texts as vectors of length 1, float32 `[B, D]`, and the scale of their cosines, a scalar.

    `scale * image @ text.T` are the logits of which text belongs to which image.
    """

    image: jax.Array
    text: jax.Array
    scale: jax.Array


class DualEncoder(nn.Module):
    """Images and texts as vectors of length 1 in one space, as in CLIP (arXiv:2103.00020).

    `image_projection(v_0) / |image_projection(v_0)|` of the image's class token, the same with `text_projection` of
    the text's first token, and the scale `exp(min(log_scale, log 100))`, the inverse of a softmax temperature.
    `log_scale` starts at `log(1 / 0.07)` and has no gradient above the limit. The encoders differ from CLIP's: its text
    encoder has causal attention and uses the last token.

    Leaves: those of the encoders below `image_encoder` and `text_encoder`, `image_projection/kernel`,
    `text_projection/kernel` and `log_scale []`.

    Attributes:
      image_encoder: encoder of the image.
      text_encoder: encoder of the text.
      embedding_size: D, size of the vectors.
    """

    image_encoder: VisionTransformer
    text_encoder: TextEncoder
    embedding_size: int

    def setup(self) -> None:
        """Creates the projections and the scale."""
        check_at_least_one(embedding_size=self.embedding_size)
        # Flax's default initialiser has CLIP's standard deviation, width^(-1/2).
        self.image_projection = nn.Dense(self.embedding_size, use_bias=False)
        self.text_projection = nn.Dense(self.embedding_size, use_bias=False)
        self.log_scale = self.param("log_scale", nn.initializers.constant(_LOG_SCALE), ())

    def __call__(self, images: jax.Array, tokens: jax.Array, *, train: bool = False) -> Embeddings:
        """Maps images `[B, H, W, C]` and tokens `[M, L]`, 0 for padding, to vectors; `train` turns dropout on.

        There may be more images than texts, or fewer.

        Raises:
          ValueError: while tracing, as the encoders, and for an empty embedding.
        """
        image, text = self.embed_images(images, train=train), self.embed_texts(tokens, train=train)
        return Embeddings(image, text, jnp.exp(jnp.minimum(self.log_scale, _MAX_LOG_SCALE)))

    def embed_images(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, C]` to vectors of length 1, `[B, D]`."""
        return _unit(self.image_projection(self.image_encoder(images, train=train)[:, 0].astype(jnp.float32)))

    def embed_texts(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps tokens `[B, L]` to vectors of length 1, `[B, D]`."""
        return _unit(self.text_projection(self.text_encoder(tokens, train=train)[:, 0].astype(jnp.float32)))


def _unit(x: jax.Array) -> jax.Array:
    """Returns vectors `[B, D]` scaled to length 1; those below 1e-6, whose direction means nothing, stay shorter."""
    return x / optax.safe_norm(x, 1e-6, axis=-1, keepdims=True)
