"""An index of shards in Hugging Face's format for PyTorch, `pytorch_model.bin.index.json`, and Flax."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_jax.checkpoints.names import paths_of
from merge_jax.checkpoints.shards import check_shard, index_ending, only_file, read_index
from merge_jax.checkpoints.weights.flax_files import FLAX
from merge_jax.checkpoints.weights.stored import HEAD, Format, Stored
from merge_jax.checkpoints.weights.torch_files import TORCH

__all__ = ["INDEX"]

_OTHERS = (".safetensors", ".h5")  # These formats read their shards themselves.
_IN_FOLDERS = "*.index.json"


def _detect(path: Path, head: bytes) -> bool:
    if path.is_dir():
        return any(path.glob(_IN_FOLDERS))
    return index_ending(path, head) not in (None, *_OTHERS)


def _open(path: Path) -> Stored:
    file = only_file(path, path.glob(_IN_FOLDERS)) or path  # Globbing a file finds nothing.
    index = read_index(file, single=True)
    paths = paths_of(index, file)
    shards = {paths[name]: found for name, found in index.items()}

    def by_shard(leaves: Sequence[str], of: Callable[[Stored, list[str]], Mapping[str, Any]]) -> dict[str, Any]:
        """Applies a function to each shard that holds one of the leaves; only these are opened."""
        wanted: dict[Path, list[str]] = {}
        for leaf in leaves:
            wanted.setdefault(shards[leaf][0], []).append(leaf)
        found: dict[str, Any] = {}
        for shard, inside in wanted.items():
            stored = _open_shard(shard, file)
            check_shard(shard, stored.paths, shards)
            found |= of(stored, inside)
        return {leaf: found[leaf] for leaf in leaves}

    return Stored(
        tuple(shards),
        lambda leaves: by_shard(leaves, lambda stored, inside: stored.shapes(inside)),
        lambda leaves: by_shard(leaves, lambda stored, inside: stored.read(inside)),
    )


def _open_shard(shard: Path, file: Path) -> Stored:
    if not shard.is_file():
        raise FileNotFoundError(f"the file {shard} is missing, which {file} names")
    with shard.open("rb") as opened:
        head = opened.read(HEAD)
    kind = next((kind for kind in (TORCH, FLAX) if kind.detect(shard, head)), None)
    if kind is None:
        raise ValueError(f"{shard}, which {file} names, is truncated or of neither {TORCH.name} nor {FLAX.name}")
    return kind.open(shard)


INDEX = Format("index of shards", _detect, _open)
