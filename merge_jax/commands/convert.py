"""`merge-jax convert`: weights of any format as a safetensors file."""

from collections.abc import Sequence
from pathlib import Path

from merge_jax.checkpoints.safetensors import save_safetensors
from merge_jax.checkpoints.weights.load import find_format, find_weights, load_weights
from merge_jax.paths import flatten

__all__ = ["convert"]


def convert(path: Path, file: Path, select: Sequence[str] | None) -> None:
    """Writes the output of `load_weights` to a new safetensors file: names joined by dots, layouts unchanged.

    Raises:
      FileNotFoundError, ImportError: as `load_weights`.
      ValueError: the file exists or has another suffix, or as `load_weights`.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} must end in .safetensors, the format that is written")
    if file.exists():
        raise ValueError(f"{file} already exists and is not overwritten: choose another name")
    kind = find_format(find_weights(path)).name
    tree = load_weights(path, select)
    save_safetensors(file, tree, metadata={"converted_from": kind})
    leaves = flatten(tree).values()
    print(f"{path} ({kind}): {len(leaves)} leaves, {sum(leaf.size for leaf in leaves):,} numbers: {file}")
