"""Files and folders that are no safetensors file: what they are, and how one is made of them."""

import contextlib
from pathlib import Path

__all__ = ["explain_file", "explain_folder", "is_orbax"]

_BY_SUFFIX = {
    (".pt", ".pth", ".bin", ".ckpt"): "PyTorch",
    (".msgpack",): "Flax",
    (".keras", ".h5", ".hdf5"): "Keras",
    (".npy", ".npz"): "NumPy",
    (".gguf",): "llama.cpp",
    (".onnx",): "ONNX",
    (".pickle", ".pkl"): "a pickle",
}
_GIT_LFS = b"version https://git-lfs"
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA")  # In every checkpoint of its newer and of its older interface.


def explain_file(file: Path) -> str:
    """Returns what a file that is no safetensors file is, and what to do with it; empty where that is not known."""
    suffix = file.suffix.lower()
    for suffixes, library in _BY_SUFFIX.items():
        if suffix in suffixes:
            return (
                f"weights of other formats ({suffix}, {library}) are not read here: mj.load_weights({str(file)!r})"
                f" reads those that it knows, and merge-jax convert {file} new.safetensors makes a file of them"
            )
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if opened.read(len(_GIT_LFS)) == _GIT_LFS:
            return "it is the pointer of Git LFS to one; git lfs pull fetches the file itself"
    return ""


def explain_folder(folder: Path) -> str:
    """Returns what a folder without weights is, and what to do with it; empty where that is not known."""
    if any(is_orbax(step) for step in (folder, *folder.iterdir()) if step.name.isdigit()):
        return f"it is of checkpoints; of those of merge_jax, merge-jax export {folder} FILE makes a file"
    if is_orbax(folder):
        return (
            "it is a checkpoint of Orbax; make a file of it: mj.save_safetensors('new.safetensors',"
            f" mj.load_weights({str(folder)!r}))"
        )
    return ""


def is_orbax(folder: Path) -> bool:
    """Returns whether a folder is one checkpoint that Orbax has written."""
    return any((folder / name).exists() for name in _ORBAX)
