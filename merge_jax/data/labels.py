"""Checks labels before training: a compiled loss cannot report a wrong one."""

import numpy as np

__all__ = ["check_labels"]


def check_labels(name: str, labels: np.ndarray, size: int, num_classes: int, *, noun: str = "texts") -> None:
    """Raises ValueError unless labels of `size` examples are integers `[size]` in `[0, num_classes)`.

    The message names the data set `name` and the first wrong label.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}: labels must be of an integer type, got {labels.dtype}{_first_between(labels)}")
    if labels.shape != (size,):
        raise ValueError(f"{name}: labels of {size} {noun} must be [{size}], got shape {labels.shape}")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        index = wrong[0]
        raise ValueError(
            f"{name}: labels must lie in [0, {num_classes}), got {labels[index]} at index {index}"
            f" ({len(wrong)} of {len(labels)} are out of range)"
        )


def _first_between(labels: np.ndarray) -> str:
    """Returns the position of the first label that is not an integer, if any."""
    if not np.issubdtype(labels.dtype, np.floating) or labels.ndim != 1:
        return ""
    wrong = np.flatnonzero(labels != np.floor(labels))
    return f", such as {labels[wrong[0]]} at index {wrong[0]}" if len(wrong) else ""
