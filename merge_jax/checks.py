"""Checks of options, so that a wrong one is named before anything is computed."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from merge_jax.paths import near_misses

__all__ = ["check_at_least_one", "check_choice", "check_dropout", "check_flag", "check_float_dtype"]


def check_at_least_one(**options: Any) -> None:
    """Raises ValueError unless every option is a whole number of at least 1."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_dropout(**options: float) -> None:
    """Raises ValueError unless every option is a rate in [0, 1)."""
    for name, rate in options.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {rate}")


def check_flag(**options: Any) -> None:
    """Raises ValueError unless every option is True or False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(noun: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless the value is one of the choices; near misses are named."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"unknown {noun} {value!r}; {near_misses(str(value), choices)}")


def check_float_dtype(dtype: Any) -> None:
    """Raises ValueError unless computation can be in this dtype."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a float type, got {jnp.dtype(dtype)}")
