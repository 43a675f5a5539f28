"""Post-norm text encoders, BERT and DistilBERT, and their heads; the only input is tokens."""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from merge_jax.checks import check_at_least_one, check_below_one, check_choice
from merge_jax.models.blocks import PADDING, attention, check_heads, dense, feed_forward, layer_norm, not_padding

__all__ = [
    "PoolerName",
    "SpanExtractor",
    "TextClassifier",
    "TextEncoder",
    "bert_base",
    "distilbert_base",
    "minilm",
    "minilm_half",
    "small_bert",
    "small_distilbert",
]

PoolerName = Literal["tanh", "relu", "mean", "first"]
"""The layer before a classifier. On the first token: `tanh` as in BERT, named `pooler`; `relu` as in DistilBERT, named
`pre_classifier`. Without a layer, as in sentence transformers: `mean` of all tokens but padding, or the `first` one."""

_INIT = nn.initializers.truncated_normal(0.02)
# Far below any logit, yet finite: a label at such a position has a large loss, not NaN.
_NEVER = -1e9


def _segments(tokens: jax.Array, separator: int) -> jax.Array:
    """Returns the segment of each token, `[B, L]`: 1 after the first separator, 0 before it and for padding."""
    is_separator = tokens == separator
    earlier = jnp.cumsum(is_separator, axis=1) - is_separator
    return ((earlier > 0) & (tokens != PADDING)).astype(jnp.int32)


class _Embeddings(nn.Module):
    """The sum of the embeddings of token, position and segment, `[B, L] -> [B, L, width]`."""

    vocab_size: int
    width: int
    max_length: int
    num_segments: int
    dropout_rate: float
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, segments: jax.Array, *, train: bool) -> jax.Array:
        x = self._embed(self.vocab_size, "word", tokens)
        x += self._embed(self.max_length, "position", jnp.arange(tokens.shape[1])[None])
        if self.num_segments:
            x += self._embed(self.num_segments, "segment", segments)
        return nn.Dropout(self.dropout_rate, deterministic=not train)(layer_norm(self.dtype, "norm")(x))

    def _embed(self, count: int, name: str, rows: jax.Array) -> jax.Array:
        # Cast after the lookup: the gradient of a row sums its uses in the lookup's dtype, and bfloat16 counts to 256.
        return nn.Embed(count, self.width, embedding_init=_INIT, name=name)(rows).astype(self.dtype)


class _Layer(nn.Module):
    """Attention and a feed-forward block, each followed by a shortcut and a norm, `[B, L, width]` to the same."""

    num_heads: int
    hidden: int
    dropout_rate: float
    dtype: Any
    kernel_init: nn.initializers.Initializer = _INIT

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        attend = attention(self.num_heads, self.dropout_rate, self.dtype, self.kernel_init, "attention", train=train)
        x = layer_norm(self.dtype, "norm1")(x + dropout(attend(x, mask=mask)))
        y = feed_forward(x, self.hidden, self.dtype, self.kernel_init)
        return layer_norm(self.dtype, "norm2")(x + dropout(y))


class TextEncoder(nn.Module):
    """A transformer over tokens, `[B, L]` int32 to `[B, L, width]`.

    Each layer is `x = norm1(x + attention(x)); x = norm2(x + down(gelu(up(x))))`, with the exact gelu. Tokens 0 are
    padding, which no position attends to. Segments are computed from the tokens: 1 after the first separator, 0
    before it and for padding, as in BERT's tokenizers for `[CLS] question [SEP] passage [SEP]`. Dropout is as in BERT:
    on the embeddings, on attention weights and after each block (for DistilBERT too, whose code has none after
    attention: our choice).

    Leaves: `embeddings/{word,position,segment}/embedding`, `embeddings/norm/{scale,bias}`, and in `layer_<i>`, with `i`
    from 0, `attention/{query,key,value}/kernel [width, heads, d]`, `attention/out/kernel [heads, d, width]`,
    `up/kernel`, `down/kernel`, and the biases and norms. So `layer_<i>/attention` is a block for routes in the view
    `attention`. Sources: arXiv:1810.04805 (BERT), arXiv:1910.01108 (DistilBERT).

    Attributes:
      vocab_size: number of tokens.
      width: size of a position's vector.
      num_layers: number of layers.
      num_heads: heads of each attention, which split the width.
      hidden: inner width of the feed-forward blocks.
      max_length: number of positions, the maximum length of a text in tokens.
      num_segments: 2, or 0 for none, as in DistilBERT.
      separator: the token that ends a segment; 102 is [SEP] in BERT's uncased vocabulary.
      dropout_rate: of dropout, in [0, 1).
      dtype: of the computation and the output, e.g. bfloat16; parameters are float32.
      kernel_init: initialiser of the layers' kernels, by default BERT's. That suits its width; in small models it makes
        attention almost uniform, and they learn sooner with `nn.initializers.xavier_uniform()`.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    max_length: int
    num_segments: int = 2
    separator: int = 102
    dropout_rate: float = 0.1
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = _INIT

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps tokens `[B, L]` to `[B, L, width]`; `train` turns dropout on.

        Raises:
          ValueError: while tracing, for an attribute out of range, tokens that are not integers `[B, L]`, or more
            tokens than positions.
        """
        self._check(tokens)
        segments = _segments(tokens, self.separator)
        mask = not_padding(tokens)
        x = _Embeddings(
            self.vocab_size,
            self.width,
            self.max_length,
            self.num_segments,
            self.dropout_rate,
            self.dtype,
            name="embeddings",
        )(tokens, segments, train=train)
        for i in range(self.num_layers):
            options = (self.dropout_rate, self.dtype, self.kernel_init)
            layer = _Layer(self.num_heads, self.hidden, *options, name=f"layer_{i}")
            x = layer(x, mask, train=train)
        return x

    def _check(self, tokens: jax.Array) -> None:
        check_at_least_one(
            vocab_size=self.vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            hidden=self.hidden,
            max_length=self.max_length,
        )
        check_below_one(dropout_rate=self.dropout_rate)
        check_heads(self.width, self.num_heads)
        if self.num_segments not in (0, 2):
            raise ValueError(f"num_segments must be 2, or 0 for none, got {self.num_segments!r}")
        # With a separator outside the vocabulary, each text would silently be one segment.
        if not PADDING < self.separator < self.vocab_size:
            raise ValueError(f"separator must be a token in [1, {self.vocab_size}), got {self.separator}")
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be whole numbers [B, L], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[1] > self.max_length:
            raise ValueError(f"texts of {tokens.shape[1]} tokens do not fit in {self.max_length} positions")


class TextClassifier(nn.Module):
    """Classes of a text, tokens `[B, L]` to logits `[B, num_classes]`, float32.

    `classifier(dropout(tanh(pooler(x_0))))`, or `classifier(dropout(relu(pre_classifier(x_0))))`, of the first token;
    or `classifier(mean_l x_l)`, over all tokens but padding, or `classifier(x_0)`. The pooler's output is sown as
    `intermediates/features`, before dropout. An encoder trained as a sentence transformer (arXiv:1908.10084) represents
    a text by its mean, as all-MiniLM-L6-v2 does, or by its first token. `pooler_of` reads which. As there, neither has
    dropout: means of different texts differ by far less than dropout would change them, which would ruin a layer fitted
    to them.

    Attributes:
      encoder: encoder of the text; its leaves are below `encoder`.
      num_classes: size of the output.
      pooler: `tanh` as in BERT, `relu` as in DistilBERT, `mean` or `first` as in sentence transformers.
    """

    encoder: TextEncoder
    num_classes: int
    pooler: PoolerName = "tanh"

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps tokens `[B, L]` to logits `[B, num_classes]`; `train` turns dropout on.

        Raises:
          ValueError: while tracing, as the encoder, and for an unknown pooler or no classes.
        """
        check_choice("pooler", self.pooler, get_args(PoolerName))
        check_at_least_one(num_classes=self.num_classes)
        x = self.encoder(tokens, train=train).astype(jnp.float32)
        if self.pooler == "tanh":
            x = nn.tanh(dense(x.shape[-1], jnp.float32, _INIT, "pooler")(x[:, 0]))
        elif self.pooler == "relu":
            x = nn.relu(dense(x.shape[-1], jnp.float32, _INIT, "pre_classifier")(x[:, 0]))
        elif self.pooler == "first":
            x = x[:, 0]
        else:
            known = (tokens != PADDING).astype(jnp.float32)
            # At least one, for a text that is only padding.
            x = jnp.einsum("blc,bl->bc", x, known) / jnp.maximum(known.sum(axis=1, keepdims=True), 1)
        self.sow("intermediates", "features", x)
        if self.pooler in ("tanh", "relu"):
            x = nn.Dropout(self.encoder.dropout_rate, deterministic=not train)(x)
        return dense(self.num_classes, jnp.float32, _INIT, "classifier")(x)


class SpanExtractor(nn.Module):
    """Start and end of an answer, tokens `[B, L]` to logits `[B, L, 2]`, float32.

    `qa_outputs(x)` at tokens that can be in an answer, and -1e9 elsewhere. These are the passage, i.e. the tokens of
    segment 1 without separators, and the first token, which means "no answer".

    Attributes:
      encoder: encoder of the text; its leaves are below `encoder`.
    """

    encoder: TextEncoder

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps tokens `[B, L]` to logits `[B, L, 2]`; `train` turns dropout on.

        Raises:
          ValueError: while tracing, as the encoder.
        """
        x = self.encoder(tokens, train=train).astype(jnp.float32)
        logits = dense(2, jnp.float32, _INIT, "qa_outputs")(x)
        separator = self.encoder.separator
        in_passage = (_segments(tokens, separator) == 1) & (tokens != separator)
        answerable = in_passage.at[:, 0].set(True)
        return jnp.where(answerable[..., None], logits, _NEVER)


def bert_base(vocab_size: int = 30522, **options: Any) -> TextEncoder:
    """Returns the encoder of BERT base; 109,482,240 parameters with a classifier's pooler, for its uncased vocabulary.

    Options are the other attributes of `TextEncoder`, such as `dtype`.
    """
    return TextEncoder(vocab_size, 768, 12, 12, 3072, 512, **options)


def distilbert_base(vocab_size: int = 30522, **options: Any) -> TextEncoder:
    """Returns the encoder of DistilBERT base; 66,362,880 parameters for BERT's uncased vocabulary.

    Options are the other attributes of `TextEncoder`, such as `dtype`.
    """
    return TextEncoder(vocab_size, 768, 6, 12, 3072, 512, num_segments=0, **options)


def minilm(vocab_size: int = 30522, **options: Any) -> TextEncoder:
    """Returns the encoder of MiniLM with 6 layers, width 384 and 12 heads, as in all-MiniLM-L6-v2.

    Options are the other attributes of `TextEncoder`, such as `dtype`. Source: Wang et al., arXiv:2002.10957.
    """
    return TextEncoder(vocab_size, 384, 6, 12, 1536, 512, **options)


def minilm_half(vocab_size: int = 30522, **options: Any) -> TextEncoder:
    """Returns an encoder with half the layers, width and heads of `minilm`; its heads have the same width.

    Attention divides products of queries and keys by the root of the head width, so a whole head of `minilm` can be
    copied, but half a head only with a different softmax. Our choice.
    """
    options = {"kernel_init": nn.initializers.xavier_uniform(), **options}  # BERT's initialiser suits its width.
    return TextEncoder(vocab_size, 192, 3, 6, 768, 512, **options)


def small_bert(
    vocab_size: int, num_layers: int = 4, width: int = 64, *, max_length: int = 128, **options: Any
) -> TextEncoder:
    """Returns a BERT of 4 layers, width 64 and 4 heads, for examples that run in seconds."""
    return TextEncoder(vocab_size, width, num_layers, 4, 4 * width, max_length, **options)


def small_distilbert(
    vocab_size: int, num_layers: int = 2, width: int = 48, *, max_length: int = 128, **options: Any
) -> TextEncoder:
    """Returns a DistilBERT of 2 layers, width 48 and 4 heads, the partner of `small_bert` with other sizes."""
    return TextEncoder(vocab_size, width, num_layers, 4, 4 * width, max_length, num_segments=0, **options)
