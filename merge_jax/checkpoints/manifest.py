"""The manifest of a checkpoint: a digest of every saved leaf, and the run that saved it.

Orbax does not detect changes to the saved values; the manifest does.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from merge_jax.paths import flatten

__all__ = [
    "NO_MANIFEST",
    "LeafRecord",
    "Manifest",
    "RunFingerprint",
    "changes",
    "differing_leaves",
    "environment_of",
    "misfits",
    "shapes_of",
    "specs_of",
]

_FORMAT = 1
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_WHOLE = ""

NO_MANIFEST = "it has no manifest"
"""What is wrong with a step that something else has saved."""

RunFingerprint = Mapping[str, str | int | float | bool | None]
"""What saved steps depend on beside the state, by name, such as a fingerprint of the data."""


@dataclass(frozen=True)
class LeafRecord:
    """The record of one saved leaf.

    Attributes:
      shape: the array's shape; for a random key, that of its underlying integers.
      dtype: the dtype's name.
      sha256: the digest of the bytes in row-major order, under `""`; for an array on several hosts, of each part under
        its position, `0:4,0:8`.
      key: a random key's type, `key<fry>`; "" for numbers; None (unknown) in steps of 0.2.0 and before.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None

    def __str__(self) -> str:
        """Returns e.g. `float32[3, 4]`, or `uint32[2] of key<fry>`."""
        return f"{self.dtype}{list(self.shape)}{f' of {self.key}' if self.key else ''}"

    def fits(self, wanted: "LeafRecord") -> bool:
        """Returns whether this record can be restored as another."""
        same = (self.shape, self.dtype) == (wanted.shape, wanted.dtype)
        return same and (self.key is None or self.key == wanted.key)


@dataclass(frozen=True)
class Manifest:
    """The metadata of a saved step.

    Attributes:
      step: the step.
      leaves: the saved leaves, by path.
      facts: what the run's steps depend on besides the state.
      environment: what bit-exact further steps depend on: devices, processes, threads and versions.
      score: the step's score, higher is better; or None.
    """

    step: int
    leaves: Mapping[str, LeafRecord]
    facts: RunFingerprint
    environment: Mapping[str, Any]
    score: float | None = None

    @classmethod
    def of(
        cls, step: int, state: Any, facts: RunFingerprint, environment: Mapping[str, Any], score: float | None
    ) -> Self:
        """Returns the manifest of a state; if several processes hold it, all must call this together."""
        specs = specs_of(state)
        digests = _gather_from_processes(_digests({path: dict(_parts(leaf)) for path, leaf in _arrays(state)}))
        leaves = {path: replace(leaf, sha256=digests[path]) for path, leaf in specs.items()}
        return cls(step, leaves, dict(facts), environment, score)

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as JSON types, with its digest."""
        content = json.loads(json.dumps({"format": _FORMAT, **asdict(self)}))
        return {"content": content, "sha256": _seal(content)}

    @classmethod
    def from_json(cls, sealed: Any) -> Self:
        """Returns the manifest from the output of `to_json`.

        Raises:
          ValueError: it is missing, has changed since, or has another format.
        """
        if not isinstance(sealed, dict) or not isinstance(sealed.get("content"), dict):
            raise ValueError(NO_MANIFEST)
        content = sealed["content"]
        if sealed.get("sha256") != _seal(content):
            raise ValueError("its manifest has changed since it was written")
        if content["format"] != _FORMAT:
            raise ValueError(f"its manifest has the format {content['format']}, this version reads {_FORMAT}")
        leaves = {
            path: LeafRecord(tuple(leaf["shape"]), leaf["dtype"], leaf["sha256"], leaf.get("key"))
            for path, leaf in content["leaves"].items()
        }
        return cls(content["step"], leaves, content["facts"], content["environment"], content["score"])


# Made once: `jax.eval_shape` retains half a KiB per call.
shapes_of = jax.jit(lambda tree: tree).eval_shape
"""Returns a tree of arrays or shapes as one of shapes."""


def specs_of(tree: Any) -> dict[str, LeafRecord]:
    """Returns the shape and dtype of each leaf (array or shape), by path."""
    keys = shapes_of(tree)
    pairs = zip(flatten(keys).items(), flatten(_shapes_without_keys(keys)).values(), strict=True)
    return {
        path: LeafRecord(tuple(leaf.shape), str(leaf.dtype), key="" if leaf.dtype == key.dtype else str(key.dtype))
        for (path, key), leaf in pairs
    }


def misfits(
    saved: Mapping[str, LeafRecord], wanted: Mapping[str, LeafRecord], parts: Sequence[str] | None = None
) -> list[str]:
    """Returns every difference of two trees by path: Orbax's error is long, and it casts dtypes silently.

    Args:
      saved: shapes and dtypes of the saved leaves.
      wanted: those of the requested leaves.
      parts: the paths of the request, if it is partial.
    """
    problems = [f"{path} is not saved" for path in wanted.keys() - saved.keys()]
    problems += [
        f"{path} is saved, but not wanted"
        for path in saved.keys() - wanted.keys()
        if parts is None or any(path.startswith(f"{part}/") for part in parts)
    ]
    problems += [
        f"{path} is saved as {saved[path]}, wanted as {wanted[path]}"
        for path in wanted.keys() & saved.keys()
        if not saved[path].fits(wanted[path])
    ]
    return sorted(problems)


def differing_leaves(manifest: Manifest, tree: Any) -> tuple[list[str], int]:
    """Returns the paths whose values have changed since saving, and how many parts no process could check.

    A part of an array on several hosts can be checked only by a process that holds all of it, as under the saved
    placement; otherwise it is counted as unchecked. Several processes must call this together.

    Args:
      manifest: the step's manifest.
      tree: the restored tree.
    """
    saved = {path: leaf.sha256 for path, leaf in manifest.leaves.items()}
    parts = {path: {place: _part(leaf, place) for place in saved[path]} for path, leaf in _arrays(tree)}
    seen = _digests(
        {path: {at: part for at, part in places.items() if part is not None} for path, places in parts.items()}
    )
    wrong = {
        path: {place: digest for place, digest in found.items() if digest != saved[path][place]}
        for path, found in seen.items()
    }
    wrong, seen = _gather_from_processes(wrong), _gather_from_processes(seen)
    unchecked = sum(len(manifest.leaves[path].sha256) - len(places) for path, places in seen.items())
    return sorted(path for path, places in wrong.items() if places), unchecked


def environment_of(tree: Any) -> dict[str, Any]:
    """Returns what a run's bits depend on besides its program: devices, processes, threads and versions."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    return {
        "backend": jax.default_backend(),
        "devices": max((len(sharding.device_set) for sharding in shardings if sharding is not None), default=1),
        "processes": jax.process_count(),
        # On a CPU, XLA splits sums over this many threads, so it changes the last bits.
        "threads": _num_threads(),
        "python": platform.python_version(),
        **_versions(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    """Returns the versions of the packages; read once, since every save needs them."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _num_threads() -> int:
    """Returns the number of threads XLA uses for a computation on a CPU."""
    if os.environ.get("NPROC", "").isdigit():
        return int(os.environ["NPROC"])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the differences of two mappings, as `name was old, is new`."""
    absent = "(absent)"
    return [
        f"{name} was {old.get(name, absent)!r}, is {new.get(name, absent)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent)
    ]


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_keys(tree: Any) -> Any:
    def numbers(leaf: Any) -> Any:
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(numbers, tree)


_shapes_without_keys = jax.jit(_without_keys).eval_shape


def _arrays(tree: Any) -> Iterator[tuple[str, Any]]:
    yield from flatten(_without_keys(tree)).items()


def _parts(leaf: Any) -> Iterator[tuple[str, Any]]:
    """Yields a leaf, or those of its parts whose first copy this process holds, by position."""
    whole = _part(leaf, _WHOLE)
    if whole is not None:
        yield _WHOLE, whole
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            bounds = (index.indices(size)[:2] for index, size in zip(shard.index, leaf.shape, strict=True))
            yield ",".join(f"{start}:{stop}" for start, stop in bounds), shard.data


def _part(leaf: Any, place: str) -> np.ndarray | None:
    """Returns the part of a leaf at a position, or None if this process does not hold all of it."""
    index = tuple(slice(*map(int, bounds.split(":"))) for bounds in place.split(",")) if place else ()
    if getattr(leaf, "is_fully_addressable", True):
        return np.asarray(leaf)[index]
    for shard in leaf.addressable_shards:
        starts = [axis.indices(size)[:2] for axis, size in zip(shard.index, leaf.shape, strict=True)]
        wanted = index or tuple(slice(0, size) for size in leaf.shape)
        if all(start <= one.start and one.stop <= stop for (start, stop), one in zip(starts, wanted, strict=True)):
            local = tuple(
                slice(one.start - start, one.stop - start) for (start, _), one in zip(starts, wanted, strict=True)
            )
            return np.asarray(shard.data)[local]
    return None


def _digests(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Returns the digest of each part of each leaf, several at a time: hashlib releases the GIL."""
    with ThreadPoolExecutor() as pool:
        futures = {
            path: {place: pool.submit(_sha256, part) for place, part in places.items()}
            for path, places in parts.items()
        }
        return {path: {place: future.result() for place, future in places.items()} for path, places in futures.items()}


def _sha256(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _gather_from_processes(own: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Returns the merged entries of all processes, which share the same outer names."""
    if jax.process_count() == 1:
        return own
    text = np.frombuffer(json.dumps(own).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    together: dict[str, dict[str, str]] = {path: {} for path in own}
    for row, size in zip(rows, sizes, strict=True):
        for path, entries in json.loads(row[: int(size)].tobytes()).items():
            together[path].update(entries)
    return together
