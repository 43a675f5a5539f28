"""Converts vision transformers from and to files of timm, big_vision and google-research/vision_transformer."""

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from merge_jax.checkpoints.names import without_prefix
from merge_jax.checkpoints.weights.load import load_weights, weight_shapes
from merge_jax.checks import check_at_least_one, check_choice
from merge_jax.layouts import matrix_spec
from merge_jax.models.key_maps import Layout, Place, PretrainedVariables, take, write
from merge_jax.models.vit import VisionTransformer
from merge_jax.paths import flatten, near_misses, some_of

__all__ = [
    "CLASS_TOKEN",
    "PATCH",
    "POSITION",
    "FlaxLibrary",
    "check_patches",
    "encoder_of",
    "from_flax",
    "from_timm",
    "is_vit",
    "library_of",
    "positions_of",
    "to_flax",
    "torch_layout",
    "write_timm",
]

FlaxLibrary = Literal["big_vision", "vision_transformer"]
"""The library whose names the tensors have: google-research/big_vision, or google-research/vision_transformer's files,
whose modules are numbered as before Linen."""

PATCH, POSITION, CLASS_TOKEN = "patch/kernel", "position/embedding", "class_token"
_ENCODER, _LAST = "params/encoder/", "params/classifier/"


class _Names(NamedTuple):
    """A library's names of a vision transformer's modules and leaves, and its gelu.

    Attributes:
      leaves: names of leaves outside modules.
      modules: names of modules by our path, with `{}` for the number of a layer.
      kinds: names of the kinds of leaves in modules.
      joint: separator between the parts of a name.
      approximate_gelu: see `VisionTransformer`.
      heads: names of the layers after the encoder, of this model and of others.
    """

    leaves: Mapping[str, str]
    modules: Mapping[str, str]
    kinds: Mapping[str, str]
    joint: str
    approximate_gelu: bool
    heads: tuple[str, ...]


def _of_flax(position: str, attention: str, norm2: str, mlp: str) -> _Names:
    layer = "Transformer/encoderblock_{}"
    modules = {
        "patch": "embedding",
        "layer_{}/norm1": f"{layer}/LayerNorm_0",
        **{f"layer_{{}}/attention/{name}": f"{layer}/{attention}/{name}" for name in ("query", "key", "value", "out")},
        "layer_{}/norm2": f"{layer}/{norm2}",
        "layer_{}/up": f"{layer}/{mlp}/Dense_0",
        "layer_{}/down": f"{layer}/{mlp}/Dense_1",
        "norm": "Transformer/encoder_norm",
        "classifier": "head",
    }
    kinds = {name: name for name in ("kernel", "bias", "scale")}
    # The gelu of flax.linen is approximate by default.
    return _Names({CLASS_TOKEN: "cls", POSITION: position}, modules, kinds, "/", True, ("head", "pre_logits"))


_FLAX = {
    "big_vision": _of_flax("pos_embedding", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
    "vision_transformer": _of_flax(
        "Transformer/posembed_input/pos_embedding", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"
    ),
}
_FUSED = ("query", "key", "value")
_TIMM = _Names(
    {CLASS_TOKEN: "cls_token", POSITION: "pos_embed"},
    {
        "patch": "patch_embed.proj",
        "layer_{}/norm1": "blocks.{}.norm1",
        **{f"layer_{{}}/attention/{name}": "blocks.{}.attn.qkv" for name in _FUSED},
        "layer_{}/attention/out": "blocks.{}.attn.proj",
        "layer_{}/norm2": "blocks.{}.norm2",
        "layer_{}/up": "blocks.{}.mlp.fc1",
        "layer_{}/down": "blocks.{}.mlp.fc2",
        "norm": "norm",
        "classifier": "head",
    },
    {"kernel": "weight", "scale": "weight", "bias": "bias"},
    ".",
    False,
    ("head",),
)
_EPSILON = 1e-6  # Of the norms in all three libraries.


def from_flax(path: str | os.PathLike[str], variables: Any, *, resize_positions: bool = False) -> PretrainedVariables:
    """Returns a vision transformer's variables with the weights of big_vision or google-research/vision_transformer.

    The names identify the library. The model must have the original's epsilon and gelu, 1e-6 and the approximate one,
    which the tensors do not contain: `vision_transformer_of` returns such a model. In big_vision, the class token has
    no position: its row is zeros here. Parts that the model lacks are refused: `pre_logits`, pooling by attention or by
    a mean, layers stacked by `scan`. For a bare encoder, layers after it are left.

    The last layer keeps its values if the file has none or one with other classes. Leaves keep the dtype of
    `variables`.

    Args:
      path: an `.npz` file with a name for each tensor, or any file that `from_pytorch` reads.
      variables: `{"params": ...}` of a `VisionTransformer` or an `ImageClassifier`, or their shapes.
      resize_positions: whether positions on a grid of another size are resized, bicubic. By default they are refused.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read or contains another model, i.e. a tensor is missing, belongs to no leaf, has
        another shape or is not float; variables of another model.
    """
    library, tensors = _read(path)
    if library == "timm":
        raise ValueError(f"{path} has the names of timm, {some_of(map(repr, tensors), 3)}: from_pytorch reads it")
    return _take(path, tensors, variables, library, resize_positions)


def to_flax(
    variables: Any, library: FlaxLibrary = "vision_transformer", num_channels: int = 3
) -> dict[str, np.ndarray]:
    """Returns a vision transformer's variables by the names and in the layout that `from_flax` reads.

    For `numpy.savez(file, **tensors)`. For big_vision, the position of the class token is added to the token.

    Args:
      variables: `{"params": ...}` of a `VisionTransformer` or an `ImageClassifier`.
      library: library whose names to use.
      num_channels: channels of the images, which the shape of `patch/kernel` does not determine.

    Raises:
      ValueError: variables of another model, an unknown library, or patches that are not squares with this number of
        channels.
    """
    check_choice("library", library, _FLAX)
    check_at_least_one(num_channels=num_channels)
    tensors = write(variables, _places(flatten(variables), library, num_channels))
    if library == "big_vision":
        names = _FLAX[library].leaves
        token, table = tensors[names[CLASS_TOKEN]], tensors[names[POSITION]]
        tensors |= {names[CLASS_TOKEN]: token + table[:, :1], names[POSITION]: table[:, 1:].copy()}
    return tensors


def encoder_of(
    path: str | os.PathLike[str], num_heads: int | None, image_size: int | None, options: Mapping[str, Any]
) -> VisionTransformer:
    """Returns the encoder that fits a file, except for Hugging Face files; see `vision_transformer_of`."""
    library, tensors = _read(path, weight_shapes)
    names, torch = _names_of(library), library == "timm"

    def shape(leaf: str) -> tuple[int, ...]:
        name = _name(names, leaf)
        if name is None or name not in tensors:
            raise ValueError(
                f"{path} lacks the tensor {name!r}: it is of no ViT with a class token of timm, big_vision,"
                f" vision_transformer or Hugging Face; it has {some_of(map(repr, tensors), 3)}"
            )
        return np.shape(tensors[name])

    patch, up, table = shape(PATCH), shape("layer_0/up/kernel"), shape(POSITION)
    shape(CLASS_TOKEN)
    if (len(patch), len(up), len(table)) != (4, 2, 3):
        raise ValueError(f"{path} has a patch kernel {list(patch)}, a layer {list(up)} and positions {list(table)}")
    query = () if torch else shape("layer_0/attention/query/kernel")
    heads = num_heads if torch else query[1] if len(query) == 3 else None
    if heads is None:
        raise ValueError(f"no tensor of {path} tells its number of heads: give num_heads")
    if num_heads not in (None, heads):
        raise ValueError(f"num_heads is {num_heads}, {path} has {heads}")
    check_at_least_one(num_heads=heads)
    if table[2] % heads:
        raise ValueError(f"num_heads is {heads}, which does not divide the width {table[2]} of {path}")
    side = patch[-1] if torch else patch[0]
    grid = math.isqrt(table[1] - (library != "big_vision"))
    block = re.compile(re.escape(names.modules["layer_{}/norm1"]).replace(r"\{\}", r"\d+") + r"\W\w+")
    made = {"epsilon": _EPSILON, "approximate_gelu": names.approximate_gelu, **options}
    return VisionTransformer(
        image_size=grid * side if image_size is None else image_size,
        patch_size=side,
        width=table[2],
        num_layers=sum(block.fullmatch(name) is not None for name in tensors) // 2,  # A scale and a bias for each.
        num_heads=heads,
        hidden=up[0] if torch else up[1],
        **made,
    )


def is_vit(leaves: Mapping[str, Any]) -> bool:
    """Returns whether leaves, by path, are the variables of a vision transformer."""
    return not leaves.keys().isdisjoint({_ENCODER + PATCH, f"params/{PATCH}"})


def from_timm(path: Any, variables: Any, resize_positions: bool) -> PretrainedVariables:
    """Returns a vision transformer's variables with the weights of timm; see `from_flax`."""
    library, tensors = _read(path)
    if library != "timm":
        raise ValueError(f"{path} has the names of {library}, {some_of(map(repr, tensors), 3)}: from_flax reads it")
    return _take(path, tensors, variables, library, resize_positions)


def write_timm(variables: Any, num_channels: int) -> dict[str, np.ndarray]:
    """Returns a vision transformer's variables as tensors of timm."""
    return write(variables, _places(flatten(variables), "timm", num_channels))


def torch_layout(leaf: str, shape: tuple[int, ...], num_channels: int) -> Layout:
    """Returns the torch layout of a transformer's leaf, given its path in the encoder or the head.

    Torch's tensor is `[out, in]` or a vector. A ViT's patches are a convolution, `[width, C, p, p]`, whose kernel
    `[p, p, C, width]` is flat here; its class token and positions have leading axes of size 1.
    """
    if leaf == PATCH:
        side = _side(shape[0], num_channels)
        shape = (side, side, num_channels, shape[1])
        return Layout(shape, matrix_spec(leaf, shape), (shape[3], num_channels, side, side))
    spec = matrix_spec(leaf, shape)
    theirs = spec.matrix_shape(shape) if spec.rows else (math.prod(shape),)
    if leaf in (CLASS_TOKEN, POSITION):
        theirs = (1,) * (3 - len(theirs)) + theirs
    return Layout(shape, spec, theirs)


def check_patches(path: Any, kernel: Any, size: int) -> int:
    """Returns the number of channels of a patch kernel `[width, C, p, p]`, after a check of the patch size."""
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f"{path} has a kernel of patches {list(kernel.shape)}, expected [width, channels, p, p]")
    _, channels, side, _ = kernel.shape
    if channels * side * side != size:
        raise ValueError(
            f"{path} has patches of {side}x{side} pixels of {channels} channels, {kernel[0].size} numbers; those of"
            f" the model have {size}"
        )
    return channels


def positions_of(
    path: Any, table: Any, rows: int, side: int, *, resize: bool, token: bool = True, antialias: bool = True
) -> Any:
    """Returns positions `[1, rows, width]`, that of the class token first, from a file's `[1, N, width]`.

    Args:
      path: of the file, for errors.
      table: the file's table; one of another rank is returned unchanged, and refused later by its shape.
      rows: number of the model's positions.
      side: height of a patch, pixels.
      resize: whether a grid of another size is resized, bicubic.
      token: whether the file's table has a row for the class token; otherwise that row is zeros.
      antialias: resize as timm does; otherwise as Hugging Face. PyTorch then has another cubic, also for larger grids.

    Raises:
      ValueError: a grid of another size without `resize`, or one that is not square.
    """
    table = np.asarray(table)
    if table.ndim != 3 or len(table) != 1:
        return table
    first, grid = (table[0, :1], table[0, 1:]) if token else (np.zeros_like(table[0, :1]), table[0])
    wanted = rows - 1
    if len(grid) != wanted:
        old, new = math.isqrt(len(grid)), math.isqrt(wanted)
        if not resize or old**2 != len(grid) or new**2 != wanted:
            squares = " (they are no squares to resize)" if resize else "; resize_positions=True resizes them, bicubic"
            raise ValueError(
                f"{path} has positions for {len(grid)} patches, the model for {wanted}, in images of"
                f" {new * side}x{new * side} pixels{squares}"
            )
        square = grid.reshape(old, old, -1).astype(np.float32)
        shape = (new, new, square.shape[2])
        grid = np.asarray(jax.image.resize(square, shape, "bicubic-pytorch", antialias)).reshape(wanted, -1)
    return np.concatenate([first, grid.astype(table.dtype)])[None]


def library_of(path: str | os.PathLike[str]) -> str:
    """Returns the library whose names match most tensors of a file."""
    return _read(path, weight_shapes)[0]


def _read(
    path: str | os.PathLike[str], load: Callable[[Any], Mapping[str, Any]] = lambda path: flatten(load_weights(path))
) -> tuple[str, dict[str, Any]]:
    """Returns the library whose names match most tensors of a file, and the tensors (or shapes) by these names."""
    found = {name.removeprefix("params/"): tensor for name, tensor in load(path).items()}
    for library in (*_FLAX, "timm"):
        found = without_prefix(path, found, {name.replace(".", "/") for name in _wanted(_names_of(library))})
    dotted = {name.replace("/", "."): tensor for name, tensor in found.items()}
    return max(
        [*((library, found) for library in _FLAX), ("timm", dotted)],
        key=lambda one: len(_wanted(_names_of(one[0])) & one[1].keys()),
    )


def _names_of(library: str) -> _Names:
    return _TIMM if library == "timm" else _FLAX[library]


def _wanted(names: _Names) -> set[str]:
    """Returns tensor names of this library's files."""
    return {*names.leaves.values(), *(str(_name(names, f"{module.format(0)}/bias")) for module in names.modules)}


def _take(path: Any, tensors: Mapping[str, Any], variables: Any, library: str, resize: bool) -> PretrainedVariables:
    whole = flatten(variables)
    if not is_vit(whole):
        raise ValueError(f"variables are of no vision transformer: they have {some_of(map(repr, whole), 3)}")
    names, leaves = _names_of(library), {_bare(leaf): shape for leaf, shape in whole.items()}
    patch, position = str(_name(names, PATCH)), names.leaves[POSITION]
    if patch not in tensors:
        raise ValueError(f"{path} lacks the tensors {patch!r}; {near_misses(patch, tensors)}")
    kernel = np.asarray(tensors[patch])
    theirs = kernel if library == "timm" or kernel.ndim != 4 else kernel.transpose(3, 2, 0, 1)
    channels = check_patches(path, theirs, leaves[PATCH].shape[0])
    if position in tensors:
        rows, side = leaves[POSITION].shape[0], theirs.shape[-1]
        token = library != "big_vision"
        table = positions_of(path, tensors[position], rows, side, resize=resize, token=token)
        tensors = {**tensors, position: table}
    spare = re.compile(rf"({'|'.join(names.heads)})\{names.joint}.*")
    headless = not any(leaf.startswith("classifier/") for leaf in leaves)
    return take(
        path,
        tensors,
        variables,
        _places(whole, library, channels),
        last=_LAST,
        class_axis=0 if library == "timm" else -1,
        spare=spare.fullmatch if headless else lambda name: False,
    )


def _places(leaves: Mapping[str, Any], library: str, num_channels: int) -> dict[str, Place]:
    """Returns the place of each leaf of a vision transformer's variables."""
    names, places = _names_of(library), {}
    for leaf, array in leaves.items():
        bare = _bare(leaf)
        name = _name(names, bare) if leaf.startswith("params/") else None
        if name is None:
            raise ValueError(
                f"variables have the leaf {leaf!r}, which no vision transformer has: give {{'params': ...}} of a"
                " VisionTransformer or an ImageClassifier"
            )
        layout = (torch_layout if library == "timm" else _flax_layout)(bare, array.shape, num_channels)
        part = bare.split("/")[-2] if library == "timm" and "/attention/" in bare else ""
        fused = part in _FUSED
        places[leaf] = Place(name, layout, _FUSED.index(part) if fused else 0, len(_FUSED) if fused else 1)
    return places


def _flax_layout(leaf: str, shape: tuple[int, ...], num_channels: int) -> Layout:
    theirs = shape
    if leaf == PATCH:
        side = _side(shape[0], num_channels)
        theirs = (side, side, num_channels, shape[1])
    elif leaf in (CLASS_TOKEN, POSITION):
        theirs = (1,) * (3 - len(shape)) + shape
    return Layout(shape, None, theirs)


def _bare(leaf: str) -> str:
    return leaf.removeprefix("params/").removeprefix("encoder/")


def _name(names: _Names, leaf: str) -> str | None:
    """Returns the tensor name of one of our leaves, given its path in the encoder or the head; None for none."""
    if leaf in names.leaves:
        return names.leaves[leaf]
    module, _, kind = leaf.rpartition("/")
    number = re.search(r"(?<=layer_)\d+", module)
    module = re.sub(r"(?<=layer_)\d+", "{}", module)
    if module not in names.modules or kind not in names.kinds:
        return None
    theirs = f"{names.modules[module]}{names.joint}{names.kinds[kind]}"
    return theirs.format(number[0]) if number else theirs


def _side(size: int, num_channels: int) -> int:
    """Returns the height of a patch with this many entries."""
    side = math.isqrt(size // num_channels)
    if side * side * num_channels != size:
        raise ValueError(f"patches of {size} numbers are no squares of num_channels {num_channels}")
    return side
