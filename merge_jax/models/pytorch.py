"""Weights of image networks between files of PyTorch models and the networks here; a table of names for both ways."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.torch_files import load_weights
from merge_jax.checks import check_choice
from merge_jax.layouts import MatrixSpec, as_matrix, from_matrix, matrix_spec
from merge_jax.paths import flatten, natural_order, near_misses, replace, some_of

__all__ = ["Library", "PretrainedVariables", "from_pytorch", "to_pytorch"]

Library = Literal["efficientnet_lite_pytorch", "timm", "torchvision"]
"""Whose names tensors have."""

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


class _Names(NamedTuple):
    """The names that a library gives to the modules of networks of inverted residuals.

    Attributes:
      modules: those outside of blocks.
      block: what comes before those of a block, of its `number` in all stages, its `stage` and `place` in it, from 0.
      parts: those of a block.
      unexpanded: the same of a block without an expansion, where they are others.
    """

    modules: Mapping[str, str]
    block: str
    parts: Mapping[str, str]
    unexpanded: Mapping[str, str]


_FILTER = ("depthwise", "depthwise_norm", "project", "project_norm")
_PARTS = ("expand", "expand_norm", *_FILTER)
_MODULES = ("stem", "stem_norm", "head", "head_norm", "fc")


def _named(names: Sequence[str], theirs: str) -> dict[str, str]:
    return dict(zip(names, theirs.split(), strict=True))


_LIBRARIES = {
    "efficientnet_lite_pytorch": _Names(
        _named(_MODULES, "_conv_stem _bn0 _conv_head _bn1 _fc"),
        "_blocks.{number}.",
        _named(_PARTS, "_expand_conv _bn0 _depthwise_conv _bn1 _project_conv _bn2"),
        {},
    ),
    "timm": _Names(
        _named(_MODULES, "conv_stem bn1 conv_head bn2 classifier"),
        "blocks.{stage}.{place}.",
        _named(_PARTS, "conv_pw bn1 conv_dw bn2 conv_pwl bn3"),
        _named(_FILTER, "conv_dw bn1 conv_pw bn2"),
    ),
    "torchvision": _Names(
        _named(_MODULES, "features.0.0 features.0.1 features.{last}.0 features.{last}.1 classifier.1"),
        "features.{next}.conv.",
        _named(_PARTS, "0.0 0.1 1.0 1.1 2 3"),
        _named(_FILTER, "0.0 0.1 1 2"),
    ),
}
_COUNTER = "num_batches_tracked"  # Of each BatchNorm; no computation in evaluation reads it.


class PretrainedVariables(NamedTuple):
    """The variables of a model with a file's weights in them.

    Attributes:
      variables: `{"params": ..., "batch_stats": ...}`.
      kept: paths of the leaves that kept their values: the last layer's, where its number of classes is another.
      left: names of the tensors that are no leaf's: counters of BatchNorm, and that last layer's.
    """

    variables: Any
    kept: tuple[str, ...]
    left: tuple[str, ...]


def from_pytorch(path: str | os.PathLike[str], variables: Any) -> PretrainedVariables:
    """Returns the variables of an `EfficientNetLite` or a `MobileNetV2` with the weights of a PyTorch library's.

    The names in the file tell the library: `efficientnet_lite_pytorch`, `timm` (`tf_efficientnet_lite0` to 4,
    `mobilenetv2_050` to 140) or `torchvision` (`mobilenet_v2`). What names do not tell, the model has to have: padding
    and the epsilon of BatchNorm are as in `efficientnet_lite` and `mobilenet_v2_imagenet`.

    Every tensor is taken, with the statistics of BatchNorm, or named as left. The last layer keeps its values where the
    file's has another number of classes. Leaves keep the dtype of `variables`.

    Args:
      path: of a `.safetensors` file (or folder) or a `.pth` file of PyTorch's state dict, or `package:NAME`.
      variables: of the model, or their shapes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read, or is of another model: a tensor that is missing, is no leaf's, has another
        shape or no floats; variables of another model.
    """
    leaves = flatten(variables)
    tensors = {name.replace("/", "."): tensor for name, tensor in flatten(load_weights(path)).items()}
    names = max((_names(leaves, library) for library in _LIBRARIES), key=lambda of: len(tensors.keys() & of.values()))
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        known = near_misses(missing[0], tensors)
        raise ValueError(f"{path} lacks the tensors {some_of(map(repr, missing), 3)}; {known}")
    taken, kept = {}, []
    for leaf, name in names.items():
        spec, shape = _layout(leaf, leaves[leaf].shape)
        tensor: Any = np.asarray(tensors[name])
        if _is_last(leaf) and tensor.shape[1:] == shape[1:] and len(tensor) != shape[0]:
            kept.append(leaf)
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"the tensor {name!r} of {path} is {list(tensor.shape)}, the model needs {list(shape)} for {leaf!r}"
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"the tensor {name!r} of {path} is {tensor.dtype}, expected floats")
        taken[leaf] = jnp.asarray(from_matrix(tensor, spec, leaves[leaf].shape), leaves[leaf].dtype)
    left = tuple(name for name in tensors if name not in {names[leaf] for leaf in taken})
    surplus = [name for name in left if not name.endswith(_COUNTER) and name not in names.values()]
    if surplus:
        raise ValueError(f"{path} has the tensors {some_of(map(repr, surplus), 3)}, which are no leaf's of the model")
    return PretrainedVariables(replace(variables, taken), tuple(kept), left)


def to_pytorch(variables: Any, library: Library = "efficientnet_lite_pytorch") -> dict[str, np.ndarray]:
    """Returns a model's variables by the names and in the layout that `from_pytorch` reads, for `save_safetensors`.

    Counters of BatchNorm are left out; PyTorch's `load_state_dict` asks for them unless it is not strict.

    Args:
      variables: of an `EfficientNetLite` or a `MobileNetV2`.
      library: whose names.

    Raises:
      ValueError: variables of another model, or an unknown library.
    """
    check_choice("library", library, _LIBRARIES)
    tensors, leaves = {}, flatten(variables)
    for leaf, name in _names(leaves, library).items():
        array: Any = np.asarray(leaves[leaf])
        spec, shape = _layout(leaf, array.shape)
        tensors[name] = np.ascontiguousarray(as_matrix(array, spec)).reshape(shape)
    return tensors


def _is_last(leaf: str) -> bool:
    return leaf.startswith("params/fc/")


def _names(leaves: Mapping[str, Any], library: str) -> dict[str, str]:
    """Returns the name of the tensor that is each leaf of ours."""
    blocks = sorted({leaf.split("/")[1] for leaf in leaves if leaf.count("/") == 3}, key=natural_order)
    theirs, names = _LIBRARIES[library], {}
    for leaf in leaves:
        _, *modules, kind = leaf.split("/")
        *block, module = modules or [""]
        expanded = not block or f"params/{block[0]}/expand/kernel" in leaves
        table = theirs.modules if not block else theirs.parts if expanded else theirs.unexpanded or theirs.parts
        place = re.fullmatch(r"stage(\d+)_(\d+)", block[0]) if block else None
        if module not in table or kind not in _LEAVES or (block and place is None):
            raise ValueError(
                f"variables have the leaf {leaf!r}, which no EfficientNetLite or MobileNetV2 of these libraries has:"
                " give {'params': ..., 'batch_stats': ...} of one"
            )
        prefix = ""
        if place is not None:
            number = blocks.index(place[0])
            prefix = theirs.block.format(number=number, next=number + 1, stage=int(place[1]) - 1, place=place[2])
        names[leaf] = f"{prefix}{table[module].format(last=len(blocks) + 1)}.{_LEAVES[kind]}"
    return names


def _layout(leaf: str, shape: tuple[int, ...]) -> tuple[MatrixSpec, tuple[int, ...]]:
    """Returns how a leaf is a matrix, and the shape of its tensor: `[out, in, kh, kw]`, `[out, in]` or `[n]`."""
    spec = matrix_spec(leaf, shape)
    if not spec.rows:
        return spec, shape
    window = (1, 1) if len(shape) == 2 and not _is_last(leaf) else ()
    return spec, (*spec.blocks(shape), *window)
