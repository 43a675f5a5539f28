"""Weights of image networks between files of PyTorch models and the networks here; one table for both ways."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.torch_files import load_weights
from merge_jax.layouts import MatrixSpec, as_matrix, from_matrix, matrix_spec
from merge_jax.paths import flatten, natural_order, near_misses, replace, some_of

__all__ = ["PretrainedVariables", "from_pytorch", "to_pytorch"]

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Of efficientnet_lite_pytorch, which numbers blocks through all stages.
_MODULES = {"stem": "_conv_stem", "stem_norm": "_bn0", "head": "_conv_head", "head_norm": "_bn1", "fc": "_fc"}
_BLOCK = {
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "project": "_project_conv",
    "project_norm": "_bn2",
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
    """Returns the variables of an `EfficientNetLite` with the weights of `efficientnet_lite_pytorch`'s.

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
    names = _names(leaves)
    tensors = {name.replace("/", "."): tensor for name, tensor in flatten(load_weights(path)).items()}
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


def to_pytorch(variables: Any) -> dict[str, np.ndarray]:
    """Returns a model's variables by the names and in the layout that `from_pytorch` reads, for `save_safetensors`.

    Counters of BatchNorm are left out; PyTorch's `load_state_dict` asks for them unless it is not strict.

    Args:
      variables: of an `EfficientNetLite`.

    Raises:
      ValueError: variables of another model.
    """
    tensors, leaves = {}, flatten(variables)
    for leaf, name in _names(leaves).items():
        array: Any = np.asarray(leaves[leaf])
        spec, shape = _layout(leaf, array.shape)
        tensors[name] = np.ascontiguousarray(as_matrix(array, spec)).reshape(shape)
    return tensors


def _is_last(leaf: str) -> bool:
    return leaf.startswith("params/fc/")


def _names(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Returns the name of the tensor that is each leaf of ours."""
    blocks = sorted({leaf.split("/")[1] for leaf in leaves if leaf.count("/") == 3}, key=natural_order)
    names = {}
    for leaf in leaves:
        _, *modules, kind = leaf.split("/")
        *block, module = modules or [""]
        table = _BLOCK if block else _MODULES
        if module not in table or kind not in _LEAVES:
            raise ValueError(
                f"variables have the leaf {leaf!r}, which an EfficientNetLite has not: give {{'params': ..., "
                "'batch_stats': ...}} of one"
            )
        prefix = f"_blocks.{blocks.index(block[0])}." if block else ""
        names[leaf] = f"{prefix}{table[module]}.{_LEAVES[kind]}"
    return names


def _layout(leaf: str, shape: tuple[int, ...]) -> tuple[MatrixSpec, tuple[int, ...]]:
    """Returns how a leaf is a matrix, and the shape of its tensor: `[out, in, kh, kw]`, `[out, in]` or `[n]`."""
    spec = matrix_spec(leaf, shape)
    if not spec.rows:
        return spec, shape
    window = (1, 1) if len(shape) == 2 and not _is_last(leaf) else ()
    return spec, (*spec.blocks(shape), *window)
