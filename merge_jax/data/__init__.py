"""Data as NumPy arrays in memory, and batches of them as a pure function of the step."""

from merge_jax.data.arrays import Arrays, Splits, batches_of, class_balanced
from merge_jax.data.images import load_digits

__all__ = ["Arrays", "Splits", "batches_of", "class_balanced", "load_digits"]
