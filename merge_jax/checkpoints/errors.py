"""Errors of saved steps: public ones, those between modules, and their wording."""

from collections.abc import Mapping
from pathlib import Path

from merge_jax.checkpoints.manifest import NO_MANIFEST

__all__ = [
    "CheckpointError",
    "DamagedCheckpointWarning",
    "DamagedStepError",
    "NotBitExactWarning",
    "PrunedStepError",
    "first_line",
    "list_damage",
    "refusal",
]


class CheckpointError(ValueError):
    """The checkpoint is damaged, or belongs to another run or model."""


class DamagedCheckpointWarning(UserWarning):
    """A saved step is damaged, and an older one was used."""


class NotBitExactWarning(UserWarning):
    """A run resumes in another environment: correctly, but not bit for bit."""


class DamagedStepError(Exception):
    """A saved step cannot be read, or has changed since it was saved."""


class PrunedStepError(DamagedStepError):
    """The writer has removed a saved step since it was listed."""


def first_line(error: Exception) -> str:
    """Returns an error's type and the first line of its message; Orbax's messages have many."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
    return line if type(error) is ValueError else f"{type(error).__name__}: {line}"


def list_damage(folder: Path, damaged: Mapping[int, str]) -> str:
    """Returns the damaged steps of a folder, and how each is damaged."""
    listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    return f"damaged checkpoint{'s' * (len(damaged) > 1)} in {folder}: {listed}"


def refusal(folder: Path, damaged: Mapping[int, str], ending: str = "") -> str:
    """Returns why none of the steps can be used."""
    if all(reason == NO_MANIFEST for reason in damaged.values()):
        listed = ", ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        return (
            f"{folder} has no step that Checkpoints saved: {listed}. Orbax by itself writes none: read such a step with"
            " orbax.checkpoint, and save it by Checkpoints into another folder"
        )
    return list_damage(folder, damaged) + ending
