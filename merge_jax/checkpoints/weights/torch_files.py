"""PyTorch: a state dict, or a training state that holds one, as written by `torch.save`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.torch_files import open_torch, torch_array
from merge_jax.checkpoints.weights.archives import member_names
from merge_jax.checkpoints.weights.stored import Format, Stored
from merge_jax.checks import error_context

__all__ = ["TORCH"]

_OLDER = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # The first bytes of files that are not zip.
_IN_FOLDERS = "pytorch_model.bin"


def _detect(path: Path, head: bytes) -> bool:
    if path.is_dir():
        return (path / _IN_FOLDERS).is_file()
    if not head.startswith(b"PK\3\4"):
        return head.startswith(_OLDER)
    names = member_names(path, head)
    return any(name.endswith("/data.pkl") for name in names) or (not names and b"/data.pkl" in head)


def _open(path: Path) -> Stored:
    tensors, model = open_torch(
        path / _IN_FOLDERS if path.is_dir() else path
    )  # For a newer file, mapped: no values are read.

    def shape(name: str) -> jax.ShapeDtypeStruct:
        tensor = tensors[name]
        dtype = jnp.dtype(str(tensor.dtype).removeprefix("torch."))
        return jax.ShapeDtypeStruct(tuple(tensor.shape), dtype)

    def array(name: str) -> np.ndarray:
        with error_context(f"{path} has {name!r}"):
            return torch_array(tensors[name])

    return Stored(
        paths=tuple(tensors),
        shapes=lambda paths: {name: shape(name) for name in paths},
        read=lambda paths: {name: array(name) for name in paths},
        model=model,
    )


TORCH = Format("PyTorch", _detect, _open)
