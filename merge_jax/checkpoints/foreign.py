"""Identifies files and folders that are not read as weights, with advice for each."""

import contextlib
from pathlib import Path

from merge_jax.checkpoints.weights.archives import member_names
from merge_jax.paths import some_of

__all__ = ["explain", "explain_unsafe", "is_orbax"]

_PICKLE = (
    "a pickle, and reading one runs code: where you trust it, unpickle it there and save its arrays,"
    " mj.save_safetensors('new.safetensors', arrays)"
)
_BY_HEAD = {
    b"\x1f\x8b": "compressed with gzip: decompress it first, gzip -dk FILE",
    b"BZh": "compressed with bzip2: decompress it first, bzip2 -dk FILE",
    b"\xfd7zXZ": "compressed with xz: decompress it first, xz -dk FILE",
    b"(\xb5/\xfd": "compressed with zstd: decompress it first, zstd -d FILE",
    b"7z\xbc\xaf": "an archive of 7-Zip: unpack it first, 7z x FILE",
    b"\x04\x22M\x18": "compressed with lz4: decompress it first, lz4 -d FILE",
    b"Rar!": "an archive of RAR: unpack it first, unrar x FILE",
    b"age-encryption.org": "encrypted with age: decrypt it first, age -d FILE",
    b"-----BEGIN PGP": "encrypted or signed with PGP: decrypt it first, gpg -d FILE",
    b"Salted__": "encrypted with OpenSSL: decrypt it first, openssl enc -d",
    b"\x93NUMPY": "an array without a name, or several as Equinox saves them: numpy.savez gives each a name",
    b"version https://git-lfs": "the pointer of Git LFS to a file; git lfs pull fetches the file itself",
    b"{": "a text of JSON, such as a configuration: name the file of weights that it is of",
    b"<": "a page of the web or XML: what was downloaded is not the file itself",
}
_TFLITE, _TAR = b"TFL3", b"ustar"
_EXPORTED = "/models/model.json"  # Ends the name of the graph in an archive of torch.export.
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA")  # In every checkpoint of its newer and older interfaces.
_LONGEST = 512  # Enough bytes to identify all of these.


def explain(path: Path, head: bytes) -> str:
    """Returns what an unsupported file or folder is, with advice; empty if unknown."""
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            return "it is the folder of a run: name one in its checkpoints, such as checkpoints/METHOD-seed0"
        if (path / "saved_model.pb").exists():
            return (
                "it is a SavedModel of TensorFlow: load it there, and save the arrays of its variables (numpy.savez)"
                " under names of your own, since several may be called kernel:0"
            )
        if any(path.glob("*.distcp")):
            return (
                "it is a checkpoint of torch.distributed: make a file of it, python -m"
                f" torch.distributed.checkpoint.format_utils dcp_to_torch {str(path)!r} new.pt"
            )
        files = sorted(child.name for child in path.iterdir() if child.is_file())
        return f"name one of its files: {some_of(files, 5)}" if files else ""
    if not head:
        return "it is empty"
    for magic, what in _BY_HEAD.items():
        if head.lstrip().startswith(magic) if magic in (b"<", b"{") else head.startswith(magic):
            return f"it is {what.replace('FILE', repr(str(path)))}"
    if len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return f"it is {_PICKLE}"
    if head[257:262] == _TAR:
        return f"it is an archive of tar: unpack it first, tar -xf {str(path)!r}"
    if head[4:8] == _TFLITE:
        return "it is a model of TensorFlow Lite, made to be run and not trained: take the weights that it was made of"
    if head.startswith(b"PK\3\4"):
        names = member_names(path, head)
        if not names:
            return "it is a zip archive that is truncated"
        if any(name.endswith(_EXPORTED) for name in names):
            return (
                "it is a program of torch.export: save the tensors in it,"
                f" torch.save(torch.export.load({str(path)!r}).state_dict, 'new.pt')"
            )
        return f"it is a zip archive of {', '.join(names[:3])}: unpack it first"
    return ""


def explain_unsafe(path: Path) -> str:
    """Returns what a path that `load_safetensors` cannot read is, with advice; empty if unknown."""
    if path.is_dir():
        if any(is_orbax(step) for step in (path, *path.iterdir()) if step.name.isdigit()):
            return f"it holds checkpoints; if they are of merge_jax, merge-jax export {path} FILE makes a file of one"
        return (
            "it is a checkpoint of Orbax; make a file of it: mj.save_safetensors('new.safetensors',"
            f" mj.load_weights({str(path)!r}))"
            if is_orbax(path)
            else ""
        )
    head = b""
    with contextlib.suppress(OSError), path.open("rb") as opened:
        head = opened.read(_LONGEST)
    kind = "a zip archive" if path.suffix.lower() in ("", ".safetensors") else path.suffix
    if head.startswith(b"PK") or kind == path.suffix:
        return (
            f"weights of other formats ({kind}) are not read here: mj.load_weights({str(path)!r}) reads those"
            f" that it knows, and merge-jax convert {path} new.safetensors makes a file of them"
        )
    return explain(path, head)


def is_orbax(folder: Path) -> bool:
    """Returns whether a folder is a single Orbax checkpoint."""
    return any((folder / name).exists() for name in _ORBAX)
