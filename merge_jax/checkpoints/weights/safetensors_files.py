"""safetensors: one file, an index of shards, or a folder with one of them."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from merge_jax.checkpoints.safetensors import leaf_shapes, read_leaves, tensor_names, written_by_mlx
from merge_jax.checkpoints.shards import index_ending
from merge_jax.checkpoints.weights.stored import Format, Stored
from merge_jax.layouts import MatrixSpec
from merge_jax.paths import flatten, some_of

__all__ = ["SAFETENSORS"]

_KERNEL = "weight"


def _detect(path: Path, head: bytes) -> bool:
    if path.is_dir():
        return any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))
    # Eight bytes of length, then an object of JSON.
    return head[4:9] == b"\0\0\0\0{" or index_ending(path, head) == ".safetensors"


def _open(path: Path) -> Stored:
    names = tensor_names(path)
    ranks: dict[str, int] = {}
    if names and written_by_mlx(path):
        kernels = [leaf for leaf in names if leaf.rpartition("/")[2] == _KERNEL]
        ranks = {leaf: len(spec.shape) for leaf, spec in leaf_shapes(path, kernels).items()}

    def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
        turned = [leaf for leaf in paths if ranks.get(leaf, 0) > 2]
        if turned:
            warnings.warn(
                f"{path} was written by MLX: of kernels of convolutions, such as {some_of(turned, 3)}, the last axis is"
                " the inputs', which in PyTorch is the second. mlx-lm also adds 1 to the norms of Qwen3-Next and"
                " Qwen3.5. All are read as stored",
                stacklevel=4,
            )
        return flatten(read_leaves(path, paths))

    return Stored(
        paths=tuple(names),
        tensors=names,
        shapes=lambda paths: leaf_shapes(path, paths),
        read=read,
        specs={leaf: _convolution(rank) for leaf, rank in ranks.items() if rank > 3},  # Experts may be stacked in 3.
    )


def _convolution(rank: int) -> MatrixSpec:
    return MatrixSpec(rows=(0,), inputs=(rank - 1,), window=tuple(range(1, rank - 1)))


SAFETENSORS = Format("safetensors", _detect, _open)
