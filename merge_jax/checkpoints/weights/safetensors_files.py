"""safetensors: one file, an index of shards, or a folder with one of them."""

from pathlib import Path

from merge_jax.checkpoints.safetensors import leaf_shapes, read_leaves, tensor_names
from merge_jax.checkpoints.shards import index_ending
from merge_jax.checkpoints.weights.stored import Format, Stored
from merge_jax.paths import flatten

__all__ = ["SAFETENSORS"]


def _detect(path: Path, head: bytes) -> bool:
    if path.is_dir():
        return any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))
    # Eight bytes of length, then an object of JSON.
    return head[4:9] == b"\0\0\0\0{" or index_ending(path, head) == ".safetensors"


def _open(path: Path) -> Stored:
    names = tensor_names(path)
    return Stored(
        paths=tuple(names),
        tensors=names,
        shapes=lambda paths: leaf_shapes(path, paths),
        read=lambda paths: flatten(read_leaves(path, paths)),
    )


SAFETENSORS = Format("safetensors", _detect, _open)
