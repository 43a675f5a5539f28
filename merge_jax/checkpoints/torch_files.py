"""Weights saved by PyTorch."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.names import leaves_of, paths_of, put
from merge_jax.checkpoints.weights.training_state import MODEL, model_part
from merge_jax.paths import some_of
from merge_jax.types import Params

__all__ = ["load_torch", "open_torch", "torch_array"]

_LARGEST_RATIO = 1032  # As for a zip; a tensor that repeats its numbers more often is not a weight.
_ADVICE = "save the state dict that is in it, torch.save(model.state_dict(), FILE)"


def load_torch(path: str | os.PathLike[str]) -> Params:
    """Returns the tensors of a PyTorch file as a parameter tree of NumPy arrays, like `load_safetensors`.

    Uses `torch.load(..., weights_only=True)`, which executes no code from the file.

    Args:
      path: a state dict (tensors by name) written by `torch.save` in its current or older format; or a dict that holds
        one, as scripts save it with the optimizer's state: `model`, `state_dict` or `model_state_dict`.

    Raises:
      FileNotFoundError: no such file.
      ImportError: PyTorch is not installed.
      ValueError: the file is broken, holds other objects than tensors, or its names collide as paths.
    """
    tree: dict[str, Any] = {}
    tensors, model = open_torch(Path(path))
    for name, leaf in model.items():
        put(tree, name, torch_array(tensors[leaf]))
    return tree


def open_torch(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the tensors of a PyTorch file by path, and the model's names, each with its path in the file.

    Tensors of the current format are mapped, not read.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `load_torch`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if file.suffix == ".json":
        raise ValueError(f"{file} is an index of shards: mj.load_weights reads them")
    try:
        import torch  # pyright: ignore[reportMissingImports]  # Not at the top: it is optional.
    except ImportError:
        raise ImportError(
            f"{file} is read by PyTorch, which is not installed: pip install 'merge_jax[torch]'; or make a safetensors "
            "file of it where PyTorch is, which needs none afterwards: safetensors.torch.save_file({name: "
            f"tensor.contiguous() for name, tensor in torch.load({str(file)!r}, weights_only=True).items()}}, "
            "'new.safetensors')"
        ) from None
    try:
        content = torch.load(  # noqa: TID251  # Tensors alone.
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except Exception:  # Many types; its own message suggests disabling weights_only.
        raise ValueError(
            f"{file} is not read by torch.load(..., weights_only=True): it is broken, or holds more than tensors,"
            f" and unpickling these runs code: where you trust it, load it there, and {_ADVICE}"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} must hold tensors by name, found {type(content).__name__}: {_ADVICE}")
    models = [f"{name}/" for name in MODEL if isinstance(content.get(name), Mapping)]
    leaves = leaves_of(content, file) if models else content
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(name, str) and isinstance(leaf, torch.Tensor)}
    # Beside a state dict, scripts save numbers and strings, such as the epoch; inside it, nothing is skipped.
    others = [name for name in leaves if name not in tensors and (not models or name.startswith(tuple(models)))]
    if others:
        raise ValueError(f"{file} must hold tensors by name, found {some_of(map(repr, others), 5)}: {_ADVICE}")
    # Before splitting names at dots: a name such as `model.norm.weight` belongs to the model.
    model = model_part(tensors) if models else {name: name for name in tensors}
    paths, names = paths_of(tensors, file), paths_of(model, file)
    return {paths[leaf]: tensors[leaf] for leaf in tensors}, {names[name]: paths[leaf] for name, leaf in model.items()}


def torch_array(tensor: Any) -> np.ndarray:
    """Returns a PyTorch tensor as a NumPy array; raises ValueError if it is sparse or quantised."""
    dtype, tensor = str(tensor.dtype).removeprefix("torch."), tensor.detach()
    try:
        stored = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > _LARGEST_RATIO * stored:  # By strides of 0 (expand).
            raise ValueError(
                f"a tensor of PyTorch claims to be {dtype}{list(tensor.shape)} of {stored} bytes: save it with"
                " tensor.contiguous()"
            )
        tensor = tensor.resolve_conj().resolve_neg()  # Saved as a flag beside the numbers.
        if dtype == "bfloat16" or dtype.startswith("float8"):  # NumPy lacks this dtype.
            import torch  # pyright: ignore[reportMissingImports]  # Not at the top: it is optional.

            same_size = torch.int16 if dtype == "bfloat16" else torch.uint8
            return tensor.contiguous().view(same_size).numpy().view(jnp.dtype(dtype))
        return tensor.contiguous().numpy()
    except (TypeError, RuntimeError, NotImplementedError):
        raise ValueError(f"a tensor of PyTorch that is {dtype}, {tensor.layout}, is none of NumPy's") from None
