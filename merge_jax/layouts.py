"""The meaning of a leaf's axes, from its path and shape, and exact conversion between leaf and matrix."""

import math
import re
from dataclasses import dataclass

import jax

__all__ = [
    "MatrixSpec",
    "as_matrix",
    "copy_overlap",
    "from_matrix",
    "is_kernel_name",
    "is_patch_kernel",
    "is_table",
    "matrix_spec",
    "overlap_blocks",
    "overlap_shape",
]

_VECTORS = {"bias", "scale", "offset", "gamma", "beta"}
_KERNELS = {"kernel", "weight", "w"}
_EXPERTS = {"gate_up_proj", "down_proj"}  # Of transformers: [out, in] for some architectures, [in, out] for others.
_TABLES = {"embed", "embedding", "embeddings", "embedder", "emb", "wte", "wpe", "table", "encoding"}
_DENSE = {"proj", "project", "projection", "linear", "mapping", "decoder"}
_PATCHES = re.compile(r"patch(es|ify)?(_?(embed(ding|dings|der|s)?|proj(ection)?|conv|linear|dense|stem))*(_?[0-9]+)?")

# A leaf of rank 4 with a square window counts as a convolution, unless its name contains one of these.
_NO_CONVOLUTION = {
    *("einsum", "qkv", "kv", "q", "k", "v", "query", "key", "value", "attention", "attn"),
    *("expert", "experts", "moe", "mixture"),
}
_TRANSPOSED = {"transpose", "transposed", "deconv", "deconvolution", "upconv", "convtranspose"}
_LARGEST_WINDOW = 16


@dataclass(frozen=True)
class MatrixSpec:
    """Assigns the axes of a leaf to rows (outputs) and columns (inputs, then the kernel window).

    The matrix is `[prod(rows), prod(inputs) * prod(window)]`, each group in the given order, the last axis varying
    fastest. A torch weight `[out, in, kh, kw]` reshaped to `[out, -1]` has the same order.

    Attributes:
      rows: axes of the outputs; may be empty (a vector is one row).
      inputs: axes of the inputs.
      window: axes of a convolution's window, separate from the inputs so that `copy_overlap` can align the
        centres of windows of different sizes.
    """

    rows: tuple[int, ...]
    inputs: tuple[int, ...]
    window: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes of the leaf, in the order of the matrix."""
        return self.rows + self.inputs + self.window

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless the groups name every axis of a leaf of this shape exactly once."""
        if sorted(self.axes) != list(range(len(shape))):
            raise ValueError(
                f"{self} must name each axis of the shape {shape} once, "
                f"that is {tuple(range(len(shape)))}; found {self.axes}"
            )

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape `(rows, inputs, *window)` of a leaf of this shape."""
        rows, inputs = (math.prod(shape[a] for a in group) for group in (self.rows, self.inputs))
        return (rows, inputs, *(shape[a] for a in self.window))

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the shape `(rows, columns)` of the matrix of a leaf of this shape."""
        rows, *columns = self.blocks(shape)
        return rows, math.prod(columns)


def as_matrix(leaf: jax.Array, spec: MatrixSpec) -> jax.Array:
    """Returns the leaf as its matrix `[rows, columns]`; `from_matrix` is the exact inverse."""
    spec.check(leaf.shape)
    return leaf.transpose(spec.axes).reshape(spec.matrix_shape(leaf.shape))


def from_matrix(matrix: jax.Array, spec: MatrixSpec, shape: tuple[int, ...]) -> jax.Array:
    """Returns the leaf of this shape that has the given matrix."""
    spec.check(shape)
    inverse = tuple(spec.axes.index(axis) for axis in range(len(shape)))
    return matrix.reshape([shape[axis] for axis in spec.axes]).transpose(inverse)


def copy_overlap(target: jax.Array, source: jax.Array, target_spec: MatrixSpec, source_spec: MatrixSpec) -> jax.Array:
    """Returns the target leaf with its leading rows and inputs overwritten by the source's.

    Both leaves are reshaped to `[rows, inputs, *window]`. Rows and inputs overlap from the first index on, windows
    at their centres (our choice: a 1x1 kernel is the centre tap of a 3x3 one, not its first corner). Values outside
    the overlap do not change. If both leaves have the same shape, the result is the source.

    Shapes: target `[...]` and source `[...]` of any rank; the result has the target's shape and dtype.
    """
    target_spec.check(target.shape)
    source_spec.check(source.shape)
    target_blocks = as_matrix(target, target_spec).reshape(target_spec.blocks(target.shape))
    source_blocks = as_matrix(source, source_spec).reshape(source_spec.blocks(source.shape))
    blocks = overlap_blocks(target_blocks, source_blocks)
    return from_matrix(blocks.reshape(target_spec.matrix_shape(target.shape)), target_spec, target.shape)


def overlap_blocks(target: jax.Array, source: jax.Array) -> jax.Array:
    """Returns `target [rows, inputs, *window]` with the overlapping block of `source` copied in, as `copy_overlap`."""
    shape = target.shape
    # Missing window axes have size 1.
    rank = max(target.ndim, source.ndim)
    target, source = _pad_window(target, rank), _pad_window(source, rank)
    target_slices, source_slices = [], []
    for axis, (t, s) in enumerate(zip(target.shape, source.shape, strict=True)):
        size = min(t, s)
        t_start, s_start = ((t - size) // 2, (s - size) // 2) if axis >= 2 else (0, 0)
        target_slices.append(slice(t_start, t_start + size))
        source_slices.append(slice(s_start, s_start + size))
    block = source[tuple(source_slices)].astype(target.dtype)
    return target.at[tuple(target_slices)].set(block).reshape(shape)


def overlap_shape(target: tuple[int, ...], source: tuple[int, ...]) -> tuple[int, int]:
    """Returns the shape of the overlap `[rows, inputs x window]` of blocks of these two shapes."""
    common = [min(sizes) for sizes in zip(target[:2], source[:2], strict=True)]
    rank = max(len(target), len(source))
    # As in `overlap_blocks`, missing window axes have size 1.
    windows = ((*(1,) * (rank - len(blocks)), *blocks[2:]) for blocks in (target, source))
    return common[0], common[1] * math.prod(map(min, zip(*windows, strict=True)))


def _pad_window(blocks: jax.Array, rank: int) -> jax.Array:
    rows, inputs, *window = blocks.shape
    return blocks.reshape(rows, inputs, *(1,) * (rank - blocks.ndim), *window)


def matrix_spec(path: str, shape: tuple[int, ...]) -> MatrixSpec:
    """Returns the spec of a leaf in the layout of Flax, Haiku, Keras, torch or Equinox, from its path and shape.

    =====================================  ========================================  ================  =================
    leaf                                   shape                                     rows              columns
    =====================================  ========================================  ================  =================
    bias, scale, offset                    `[out]`, `[1, out]`, `[out, 1, 1]`        1                 out
    bias of query, key, value              `[h, d]`                                  1                 h d
    embedding, embeddings, pos_embed       `[tokens, d]`, `[1, tokens, d]`           tokens            d
    attention query, key, value            `[in, h, d]`                              h d               in
    attention out                          `[h, d, out]`                             out               h d
    dense kernel                           `[in, out]`                               out               in
    convolution (depthwise: in = 1)        `[*window, in, out]`                      out               in x window
    depthwise convolution of Keras         `[*window, c, m]`                         c m               window
    transposed, Flax's `ConvTranspose`     `[*window, in, out]`                      out               in x window
    transposed, of Haiku and Keras         `[*window, out, in]`                      out               in x window
    weight (torch, Equinox)                `[out, in, *window]`                      out               in x window
    =====================================  ========================================  ================  =================

    A leaf is a torch weight if its name contains the word `weight` (`weight`, `in_proj_weight`, `weight_ih_l0`), which
    no Flax or Haiku leaf has. By that rule, the rows of a torch embedding are its tokens.

    **Convolutions.** A rank above 2 is not enough: `[a, b, c]` may be a fused `qkv`, experts, heads of an einsum, or
    layers stacked by `nn.scan` or `vmap`. So a leaf is a convolution if the name of its module contains `conv`,
    `depthwise`, `pointwise` or `patch`. Its window has one or two axes, or the number in the name (`conv3d`,
    `conv3_d`). A leaf of rank 4 is one too, if its window is square and at most 16 wide, and no name mentions attention
    or experts. Any other leaf of rank 3 or more is refused with specs to choose from (our choice: a route with a spec
    is right, a guess is silently wrong).

    Two rows of the table are our choice. A vector is one row, not one column: the adapter normalises rows, and a row of
    one number normalises to a constant. The rows of an embedding are its tokens, since the adapter's feed-forward block
    grows with the square of the columns.

    Raises:
      ValueError: the leaf is a scalar, has no elements, or neither its name nor its shape determines its axes.
    """
    if not shape or 0 in shape:
        raise ValueError(f"{path!r} of shape {shape} is not a matrix: it needs a rank of 1 or more and elements")
    *_, parent, name = ("", *path.split("/"))
    rank = len(shape)
    whole = MatrixSpec(rows=(), inputs=tuple(range(rank)))
    if rank == 1:
        return whole
    if name in _VECTORS:
        # Vectors with more than one axis are biases of heads, or arrays that broadcast.
        if _is_flat(shape) or (rank == 2 and parent in ("query", "key", "value")):
            return whole
        raise _unknown(path, shape, {"one vector of all entries": whole})
    if is_table(path, shape):
        # An axis of size 1 before the tokens broadcasts over a batch.
        rows = (0,) if rank == 2 else tuple(range(1, rank - 1))
        return MatrixSpec(rows, tuple(axis for axis in range(rank) if axis not in rows))
    if rank == 2 and name in _EXPERTS and "experts" in path.split("/"):
        raise _unknown(path, shape, {"[out, in]": MatrixSpec((0,), (1,)), "[in, out]": MatrixSpec((1,), (0,))})
    if rank == 2:
        return MatrixSpec((0,), (1,)) if _is_torch(name) else MatrixSpec((1,), (0,))
    if name not in _KERNELS and _is_flat(shape):
        return whole
    if rank == 3 and parent in ("query", "key", "value"):
        return MatrixSpec(rows=(1, 2), inputs=(0,))
    if rank == 3 and parent in ("out", "attention_output"):
        return MatrixSpec(rows=(2,), inputs=(0, 1))
    spec = _convolution(path, shape)
    if spec is None:
        raise _unknown(path, shape, _candidates(name, rank))
    return spec


def is_table(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a leaf is an embedding, with a separate row for each word, position or the like.

    Its name is `embedding`, `embeddings`, `pos_embed` or `relative_position_bias_table`, or it is the `weight` of a
    module with such a name (`word_embeddings/weight`, `wte/weight`); `[n, d]`, or `[1, n, d]` and `[1, h, w, d]`.
    """
    *modules, name = path.split("/")
    parent = ("", *_named(modules))[-1]
    if len(shape) < 2 or (len(shape) > 2 and shape[0] != 1):
        return False
    if name == "weight":
        is_dense = _PATCHES.fullmatch(parent.lower()) or _has(parent, _DENSE)
        return len(shape) == 2 and _has(parent, _TABLES) and not is_dense
    return name not in _KERNELS and _has(name, _TABLES) and not _has(name, _DENSE)


def is_kernel_name(name: str) -> bool:
    """Returns whether the last part of a path names a layer's matrix: `kernel`, `w`, `weight`, `weight_ih_l0`."""
    return name in _VECTORS | _KERNELS or not _words(name).isdisjoint({"kernel", "weight"})


def is_patch_kernel(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether the inputs of a leaf are the pixels of a patch, judged by the name of its module.

    Such as `patch/kernel`, `PatchEmbed_0/Conv_0/kernel`, `patch_embeddings/projection/weight`; not `patch_merging`,
    whose inputs are channels.
    """
    *modules, name = path.split("/")
    parts = (re.sub("(?<=[a-z])(?=[A-Z])", "_", part).lower() for part in _named(modules)[-2:])
    return len(shape) >= 2 and name in _KERNELS and any(map(_PATCHES.fullmatch, parts))


def _named(modules: list[str]) -> list[str]:
    """Returns the modules that have a name, not a position in a list."""
    return [part for part in modules if not part.isdecimal()]


def _is_flat(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) <= 1


def _is_torch(name: str) -> bool:
    return "weight" in name.split("_")


def _words(part: str) -> set[str]:
    """Returns the words of a name, in lower case: `ConvTranspose_0`, `conv2_d` -> conv, transpose; conv, d."""
    return {word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}


def _has(part: str, words: set[str]) -> bool:
    return not _words(part).isdisjoint(words)


def _convolution(path: str, shape: tuple[int, ...]) -> MatrixSpec | None:
    """Returns the spec of a convolution's kernel of rank 3 or more; None if the leaf is not known to be one."""
    *modules, name = path.split("/")
    named = _named(modules)
    parent, rank = named[-1] if named else "", len(shape)
    torch = _is_torch(name)
    window = tuple(range(2, rank)) if torch else tuple(range(rank - 2))
    words = _words(parent) | _words(name)
    axes = re.search("conv[a-z_]*([123])_?d(?![a-z])", f"{parent}/{name}".lower())
    if axes and int(axes[1]) != len(window):
        return None
    by_name = any(word.startswith("conv") or word.endswith("conv") for word in words)
    by_name |= not words.isdisjoint({"depthwise", "pointwise"} | _TRANSPOSED) or is_patch_kernel(path, shape)
    sizes = {shape[axis] for axis in window}
    square = rank == 4 and len(sizes) == 1 and max(sizes) <= _LARGEST_WINDOW
    speaks_of_others = any(_has(part, _NO_CONVOLUTION) for part in (*named[-2:], name))
    if not (by_name and (axes or len(window) <= 2)) and not (square and not speaks_of_others):
        return None
    # The last axis of a depthwise kernel is a multiplier in Keras; in Flax and Haiku the axis before it is 1.
    of_keras = name == "depthwise_kernel" or re.search("depthwise_conv[12]d", parent)
    if of_keras or (name == "kernel" and "depthwise" in words and shape[-1] == 1):
        return MatrixSpec((rank - 2, rank - 1), (), window)
    if not words.isdisjoint(_TRANSPOSED) or (torch and not words.isdisjoint({"up", "upsample", "upsampling"})):
        # Torch and Equinox, and Flax with `transpose_kernel`, disagree, and no name tells them apart.
        if re.search("ConvTranspose(_[0-9]+)?$", parent) and name == "kernel":
            return MatrixSpec((rank - 1,), (rank - 2,), window)
        if re.fullmatch("conv[123]_?d_transpose(_[0-9]+)?", parent) and not torch:
            return MatrixSpec((rank - 2,), (rank - 1,), window)
        return None
    return MatrixSpec((0,), (1,), window) if torch else MatrixSpec((rank - 1,), (rank - 2,), window)


def _candidates(name: str, rank: int) -> dict[str, MatrixSpec]:
    """Returns the candidate specs of a leaf of rank 3 or more."""
    if _is_torch(name):
        window = tuple(range(2, rank))
        return {"a convolution": MatrixSpec((0,), (1,), window), "a transposed one": MatrixSpec((1,), (0,), window)}
    last = rank - 1
    return {
        "a dense layer of several axes of outputs": MatrixSpec(tuple(range(1, rank)), (0,)),
        "one of several axes of inputs": MatrixSpec((last,), tuple(range(last))),
        "heads first, [h, in, d]": MatrixSpec((*range(last - 1), last), (last - 1,)),
        "a convolution": MatrixSpec((last,), (last - 1,), tuple(range(last - 1))),
        "a transposed one": MatrixSpec((last - 1,), (last,), tuple(range(last - 1))),
    }


def _unknown(path: str, shape: tuple[int, ...], candidates: dict[str, MatrixSpec]) -> ValueError:
    choices = "; ".join(f"{_code(spec)} ({what})" for what, spec in candidates.items())
    return ValueError(
        f"give its route a target_spec or source_spec, since neither the name {path!r} nor the shape {shape} says "
        f"which axis is what: {choices}. Layers or experts stacked along an axis are taken apart first, "
        f"[jax.tree.map(operator.itemgetter(i), layers) for i in range({shape[0]})], so that each is a leaf of its own"
    )


def _code(spec: MatrixSpec) -> str:
    """Returns a spec as source code."""
    window = f", window={spec.window}" if spec.window else ""
    return f"MatrixSpec(rows={spec.rows}, inputs={spec.inputs}{window})"
