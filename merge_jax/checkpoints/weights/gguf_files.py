"""GGUF: weights of llama.cpp; what is quantised comes as float32, axes in the order of PyTorch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.names import paths_of
from merge_jax.checkpoints.weights.stored import Format, Stored, needing, reading

__all__ = ["GGUF"]

_PLAIN = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}
_PLAIN |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}


def _detect(path: Path, head: bytes) -> bool:
    del path
    return head.startswith(b"GGUF")


def _open(path: Path) -> Stored:
    try:
        import gguf  # pyright: ignore[reportMissingImports]  # Not at the top: it is optional.
    except ImportError:
        raise needing(path, "gguf", "gguf") from None
    # The library computes with the numbers of a broken header, and NumPy warns of them before it raises.
    with reading(path, "GGUF file"), np.errstate(all="ignore"):
        reader = gguf.GGUFReader(path)
        tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    tensors = {leaf: tensors[name] for name, leaf in paths_of(tensors, path).items()}

    def shape(tensor: Any) -> jax.ShapeDtypeStruct:
        dtype = _PLAIN.get(tensor.tensor_type.name, "float32")
        # The file has the fastest axis first.
        return jax.ShapeDtypeStruct(tuple(map(int, tensor.shape))[::-1], jnp.dtype(dtype))

    def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
        arrays = {}
        for leaf in paths:
            tensor, kind = tensors[leaf], tensors[leaf].tensor_type.name
            if reader.byte_order != "I" and tensor.data.dtype == np.uint8:
                raise ValueError(
                    f"{path} is of a machine with another order of bytes, and {tensor.name!r} is {kind}, whose blocks"
                    " are not read so: turn the file, gguf-convert-endian FILE little"
                )
            with reading(path, f"GGUF file that is read: the tensor {tensor.name!r} is {kind}"):
                data = np.asarray(tensor.data)  # Mapped.
                if kind not in _PLAIN:
                    data = gguf.dequantize(data, tensor.tensor_type)
                arrays[leaf] = (data.view(jnp.bfloat16) if kind == "BF16" else data).reshape(shape(tensor).shape)
        return arrays

    return Stored(tuple(tensors), lambda paths: {leaf: shape(tensors[leaf]) for leaf in paths}, read)


GGUF = Format("GGUF", _detect, _open)
