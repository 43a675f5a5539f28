"""GGUF: weights of llama.cpp; quantised tensors become float32, axes follow PyTorch's order."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.names import paths_of
from merge_jax.checkpoints.shards import only_file
from merge_jax.checkpoints.weights.stored import Format, Stored, needing, reading
from merge_jax.paths import some_of

__all__ = ["GGUF"]

_PLAIN = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# What llama.cpp's converter changes besides names and shapes, by the pattern of the tensors.
_ONE_MORE = {r"(?<!ssm_)norm\.weight$": "1 more than the model's"}
_MOVED = "the model's rows in another order"
_NEGATIVE = {r"\.ssm_a\b": "-exp of the model's"}
_QUERIES, _FUSED = {r"\.attn_[qk]\.": _MOVED}, {r"\.attn_qkv\.": _MOVED}
_LINEAR = {r"\.(attn_qkv|attn_gate|ssm_(alpha|beta|dt|conv1d|out))\b": "perhaps the model's heads in another order"}
_CHANGED = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "nemotron"), _ONE_MORE),
    **dict.fromkeys(("llama", "olmo", "granite", "granitemoe"), _QUERIES),
    **dict.fromkeys(("bloom", "gptneox", "falcon"), _FUSED),
    **dict.fromkeys(("mamba", "mamba2", "jamba"), _NEGATIVE),
    "granitehybrid": _QUERIES | _NEGATIVE,
    "qwen3next": _ONE_MORE | _NEGATIVE | _FUSED,
    **dict.fromkeys(("qwen35", "qwen35moe"), _ONE_MORE | _NEGATIVE | _LINEAR),
}
_PLAIN |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}


def _detect(path: Path, head: bytes) -> bool:
    return head.startswith(b"GGUF") or (path.is_dir() and any(path.glob("*.gguf")))


def _open(path: Path) -> Stored:
    files = list(path.glob("*.gguf"))
    path = only_file(path, [file for file in files if not _is_later_part(file)] or files[:1]) or path
    try:
        import gguf  # pyright: ignore[reportMissingImports]  # Not at the top: it is optional.
    except ImportError:
        raise needing(path, "gguf", "gguf") from None
    parts = _parts(path, gguf.GGUFReader)
    tensors: dict[str, Any] = {}
    turned: set[str] = set()
    for part, reader in parts.items():
        for tensor in reader.tensors:
            name = str(tensor.name)
            if name in tensors:
                raise ValueError(f"{part} has the tensor {name!r}, which another part of it has too")
            tensors[name] = tensor
            turned |= {name} if reader.byte_order != "I" else set()
    tensors = {leaf: tensors[name] for name, leaf in paths_of(tensors, path).items()}

    def shape(tensor: Any) -> jax.ShapeDtypeStruct:
        dtype = _PLAIN.get(tensor.tensor_type.name, "float32")
        # The file lists the fastest axis first.
        return jax.ShapeDtypeStruct(tuple(map(int, tensor.shape))[::-1], jnp.dtype(dtype))

    patterns = _changed(path, parts[path])

    def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
        arrays = {}
        for pattern, how in patterns.items():
            changed = [leaf for leaf in paths if re.search(pattern, str(tensors[leaf].name))]
            if not changed:
                continue
            warnings.warn(
                f"llama.cpp changed the numbers at {some_of(changed, 3)} of {path} for its architecture ({how}):"
                " undo that before you use them in another model",
                stacklevel=4,
            )
        scaled = [
            leaf for leaf in paths if leaf.endswith("/weight") and leaf.removesuffix("weight") + "scale" in tensors
        ]
        if scaled:  # As of NVFP4, whose blocks have scales of their own.
            warnings.warn(
                f"{path} has a scale beside {some_of(scaled, 3)}, by which llama.cpp multiplies: they are read without"
                " it",
                stacklevel=4,
            )
        for leaf in paths:
            tensor, kind = tensors[leaf], tensors[leaf].tensor_type.name
            if str(tensor.name) in turned and tensor.data.dtype == np.uint8:
                raise ValueError(
                    f"{path} has another byte order than this machine, and the blocks of {tensor.name!r} ({kind}) "
                    "cannot be swapped: convert the file, gguf-convert-endian FILE little"
                )
            with reading(path, f"GGUF file that is read: the tensor {tensor.name!r} is {kind}"):
                data = np.asarray(tensor.data)  # Mapped.
                if kind not in _PLAIN:
                    data = gguf.dequantize(data, tensor.tensor_type)
                arrays[leaf] = (data.view(jnp.bfloat16) if kind == "BF16" else data).reshape(shape(tensor).shape)
        return arrays

    return Stored(tuple(tensors), lambda paths: {leaf: shape(tensors[leaf]) for leaf in paths}, read)


def _parts(path: Path, read: Callable[[Path], Any]) -> dict[Path, Any]:
    """Returns the readers of a file, or of all files of a split model, given any of them.

    Raises:
      FileNotFoundError: one of them is missing.
      ValueError: one is broken, or not part of the same model.
    """

    def opened(part: Path) -> Any:
        # The library computes with a broken header's numbers, and NumPy warns of them before it raises.
        with reading(part, "GGUF file"), np.errstate(all="ignore"):
            return read(part)

    reader = opened(path)
    count = _number(path, reader, "split.count")
    if count in (None, 1):
        return {path: reader}
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise ValueError(
            f"{path} is one of {count} parts of a model, but its name does not say which: rename the parts to"
            f" NAME-00001-of-{count:05d}.gguf"
        )
    parts = {}
    for i in range(count):
        part = path.with_name(f"{name[1]}-{i + 1:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise FileNotFoundError(f"the file {part} is missing, one of the {count} parts of {path}")
        parts[part] = opened(part)
        place = _number(part, parts[part], "split.no"), _number(part, parts[part], "split.count")
        if place != (i, count):
            raise ValueError(f"{part} says that it is part {place[0]} (from 0) of {place[1]}, expected {i} of {count}")
    found = sum(len(reader.tensors) for reader in parts.values())
    for part, reader in parts.items():  # Of every part: one may belong to another model.
        total = _number(part, reader, "split.tensors.count")
        if total not in (None, found):
            raise ValueError(f"{part} is of {total} tensors in {count} parts, but those beside it hold {found} in all")
    return parts


def _changed(path: Path, reader: Any) -> Mapping[str, str]:
    """Returns how tensors differ from those of the original model, by the pattern of their names."""
    field = reader.get_field("general.architecture")
    with reading(path, "GGUF file: general.architecture is no text"):
        return _CHANGED.get(str(field.contents()), {}) if field else {}


def _number(path: Path, reader: Any, key: str) -> int | None:
    field = reader.get_field(key)
    with reading(path, f"GGUF file: {key} is no number"):
        return None if field is None else int(field.contents())


def _is_later_part(file: Path) -> bool:
    name = _PART.fullmatch(file.name)
    return name is not None and int(name[2]) > 1


GGUF = Format("GGUF", _detect, _open)
