"""What is wrong with saved steps: the errors that users see, those between the modules, and how they are worded."""

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
    """The checkpoint does not match the request: damaged, of another run, or of another model."""


class DamagedCheckpointWarning(UserWarning):
    """A saved step is damaged, and an older one was taken."""


class NotBitExactWarning(UserWarning):
    """A run resumes in another environment: correct, but not bit for bit."""


class DamagedStepError(Exception):
    """A saved step cannot be read, or is not what was saved."""


class PrunedStepError(DamagedStepError):
    """A saved step has been removed by its writer since it was listed."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, of which Orbax writes many, after the error's type."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
    return line if type(error) is ValueError else f"{type(error).__name__}: {line}"


def list_damage(folder: Path, damaged: Mapping[int, str]) -> str:
    """Returns which steps of a folder are damaged, and how each is."""
    listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    return f"damaged checkpoint{'s' * (len(damaged) > 1)} in {folder}: {listed}"


def refusal(folder: Path, damaged: Mapping[int, str], ending: str = "") -> str:
    """Returns why none of some steps can be taken."""
    if all(reason == NO_MANIFEST for reason in damaged.values()):
        listed = ", ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        return (
            f"{folder} has no step that Checkpoints saved: {listed}. Orbax by itself writes none: read such a step with"
            " orbax.checkpoint, and save it by Checkpoints into another folder"
        )
    return list_damage(folder, damaged) + ending
