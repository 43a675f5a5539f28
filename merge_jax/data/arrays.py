"""Arrays of examples, their splits, and batches of them as a pure function of the step."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge_jax.checks import check_at_least_one, count_examples
from merge_jax.data.streams import Streamed
from merge_jax.paths import near_misses

__all__ = [
    "Arrays",
    "Splits",
    "batches_of",
    "class_balanced",
    "fingerprint",
    "indices_of",
    "num_examples",
    "split",
    "take",
]

_FINGERPRINTED = 3  # Examples of a streamed entry that a fingerprint reads.

Arrays = Mapping[str, Any]  # np.ndarray or Streamed: most entries are plain arrays, and used as such.
"""Examples by entry, e.g. `{"image": [N, H, W, C], "label": [N]}`, all with N on the leading axis.

An entry may also be `Streamed`: then `entry[rows]` reads rows, and `take` takes them unread.
"""


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets: training, validation, and a test set to read once, at the end."""

    train: Arrays
    validation: Arrays
    test: Arrays


def indices_of(size: int, batch_size: int, seed: int, stream: int = 0) -> Callable[[int, int], np.ndarray]:
    """Returns `(first step, count) -> indices [count, batch_size]` of the examples in each batch, int32.

    Every example occurs once per epoch, in a new order drawn from `seed`; another `stream` of the same seed, such as
    that of another model, has different orders. The indices of a step depend on nothing else, so a resumed run sees the
    same batches. Every batch is full; it may span two epochs.

    Raises:
      ValueError: no examples, or a batch size below 1.
    """
    if size == 0 or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batches need examples and a size of at least 1, got {size} and {batch_size!r}")

    # We do not use grain: its map datasets build a batch one index at a time, which took five times as long as a small
    # model's step.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch, stream]).permutation(size).astype(np.int32)

    def indices_at(first: int, count: int) -> np.ndarray:
        positions = np.arange(first * batch_size, (first + count) * batch_size)
        epochs = range(positions[0] // size, positions[-1] // size + 1)
        orders = np.concatenate([order(epoch) for epoch in epochs])
        return orders[positions - epochs.start * size].reshape(count, batch_size)

    return indices_at


def batches_of(arrays: Arrays, batch_size: int, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """Returns `step -> batch`, the examples that `indices_of` names.

    Raises:
      ValueError: no examples, entries of unequal lengths, or a batch size below 1.
    """
    indices_at = indices_of(num_examples(arrays), batch_size, seed)

    def batch_at(step: int) -> dict[str, np.ndarray]:
        (indices,) = indices_at(step, 1)
        return {name: array[indices] for name, array in arrays.items()}

    return batch_at


def num_examples(arrays: Arrays) -> int:
    """Returns N.

    Raises:
      ValueError: entries of unequal lengths.
    """
    return count_examples(arrays)


def split(arrays: Arrays, size: int, seed: int) -> tuple[Arrays, Arrays]:
    """Returns `size` examples and the rest, drawn from `seed` and stratified by `label`.

    A class whose share of a side is below one example may be missing there.

    Raises:
      ValueError: either side would be empty or have fewer examples than there are classes, or a class has only one.
    """
    chosen, rest = _drawn(arrays, size, seed)
    return take(arrays, chosen), take(arrays, rest)


def _drawn(arrays: Arrays, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of both sides of a split."""
    from sklearn.model_selection import train_test_split  # The import takes half a second.

    indices, labels = np.arange(num_examples(arrays)), arrays.get("label")
    _check_size(size, len(indices), labels)
    rest, chosen = train_test_split(indices, test_size=size, stratify=labels, random_state=seed)
    return np.asarray(chosen), np.asarray(rest)


def _check_size(size: int, total: int, labels: np.ndarray | None) -> None:
    check_at_least_one(size=size)
    least, sides = 1, ""
    if labels is not None and total:
        values, counts = np.unique(labels, return_counts=True)
        if counts.min() < 2:
            raise ValueError(f"a split needs two examples of each label, there is one of {values[counts.argmin()]}")
        least, sides = len(values), f" with each of {len(values)} labels on either side"
    if not least <= size <= total - least:
        raise ValueError(
            f"the size of a split of {total} examples{sides} must lie in [{least}, {total - least}], got {size}"
        )


def class_balanced(arrays: Arrays, size: int, seed: int) -> Arrays:
    """Returns `size` examples, drawn from `seed` and stratified by class, at least one of each class.

    Raises:
      ValueError: fewer examples than `size`, less than one per class, or no labels.
    """
    if "label" not in arrays:
        raise ValueError(f"entry 'label' is missing; {near_misses('label', arrays)}")
    total, classes = len(arrays["label"]), len(np.unique(arrays["label"]))
    if not classes <= size <= total:
        raise ValueError(
            f"the number of labels must lie between {classes}, one of each class, and {total}, "
            f"the number there is, got {size}"
        )
    if size > total - classes:  # Too few would remain for a stratified split.
        chosen = np.random.default_rng(seed).permutation(total)[:size]
    else:
        chosen, _ = _drawn(arrays, size, seed)
    return take(arrays, _with_each_class(chosen, np.asarray(arrays["label"]), seed))


def _with_each_class(chosen: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Returns the choice with an example of each class that it lacks, in place of one of its largest class."""
    chosen, random = chosen.copy(), np.random.default_rng(seed)
    for lost in np.setdiff1d(labels, labels[chosen]):
        values, counts = np.unique(labels[chosen], return_counts=True)
        place = np.flatnonzero(labels[chosen] == values[counts.argmax()])[-1]
        chosen[place] = random.choice(np.flatnonzero(labels == lost))
    return chosen


def take(arrays: Arrays, indices: np.ndarray) -> dict[str, Any]:
    """Returns the examples with these indices; streamed entries stay unread."""
    return {
        name: array.take(indices) if isinstance(array, Streamed) else array[indices] for name, array in arrays.items()
    }


def fingerprint(arrays: Arrays) -> str:
    """Returns a digest of examples in order: names, shapes, dtypes and values, as 16 hexadecimal digits.

    A resumed run uses it to verify that its examples are unchanged. For a streamed entry, it covers the row indices and
    the first, middle and last example.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        entry = arrays[name]
        digest.update(f"{name} {entry.dtype} {tuple(entry.shape)}".encode())
        if isinstance(entry, Streamed):
            digest.update(np.ascontiguousarray(entry.rows).data)
            some = np.unique(np.linspace(0, len(entry) - 1, _FINGERPRINTED).astype(int)) if len(entry) else []
            digest.update(np.ascontiguousarray(entry[some]).tobytes())
        else:
            digest.update(np.ascontiguousarray(entry).tobytes())
    return digest.hexdigest()[:16]
