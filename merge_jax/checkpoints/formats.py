"""Files and folders of weights that are not read: what they are, and how a safetensors file is made of them."""

import contextlib
from pathlib import Path

__all__ = ["explain_file", "explain_folder", "is_orbax"]

_BY_SUFFIX = {
    (".pt", ".pth", ".bin", ".ckpt"): (
        "PyTorch",
        "in torch, safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in"
        " torch.load(FILE, weights_only=True).items()}, NEW)",
    ),
    (".msgpack",): (
        "Flax",
        "mj.save_safetensors(NEW, flax.serialization.msgpack_restore(pathlib.Path(FILE).read_bytes()))",
    ),
    (".keras", ".h5", ".hdf5"): (
        "Keras",
        "in Keras, mj.save_safetensors(NEW, {weight.path: weight.numpy() for weight in model.weights})",
    ),
    (".npy", ".npz"): ("NumPy", "mj.save_safetensors(NEW, dict(numpy.load(FILE)))"),
    (".pickle", ".pkl"): ("a pickle", "unpickle it only if you trust it, then mj.save_safetensors(NEW, arrays)"),
}
_GIT_LFS = b"version https://git-lfs"
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA")  # In every checkpoint of its newer and of its older interface.


def explain_file(file: Path) -> str:
    """Returns what a file that is no safetensors file is, and what to do with it; empty where that is not known."""
    suffix = file.suffix.lower()
    for suffixes, (library, how) in _BY_SUFFIX.items():
        if suffix in suffixes:
            how = how.replace("FILE", repr(str(file))).replace("NEW", "'new.safetensors'")
            return (
                f"weights of other formats ({suffix}, {library}) are not read, since some run code when they are;"
                f" convert it: {how}"
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
            f" orbax.checkpoint.StandardCheckpointer().restore({str(folder.absolute())!r}))"
        )
    return ""


def is_orbax(folder: Path) -> bool:
    """Returns whether a folder is one checkpoint that Orbax has written."""
    return any((folder / name).exists() for name in _ORBAX)
