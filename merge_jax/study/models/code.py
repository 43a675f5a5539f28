"""A model as lines of Python, for users who export its weights from a run."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from merge_jax import models

__all__ = ["model_code"]

# Attributes that a trained model does not need: its parent, its initialisation, and its training devices.
_LEFT_OUT = ("parent", "name", "kernel_init", "axis_name")


def model_code(model: nn.Module, inputs: Mapping[str, str], pixels: Sequence[Sequence[float]] | None = None) -> str:
    """Returns lines that define `model`, its variables as shapes, `like`, and its `apply` function.

    They need `jax`, `jax.numpy` as `jnp` and `merge_jax` as `mj`; further lines import names outside
    `merge_jax.models`.

    Args:
      model: any Flax model.
      inputs: its inputs as expressions, with descriptions.
      pixels: each channel's mean and deviation, which normalise uint8 images; None for unscaled inputs.
    """
    apply = "model.apply"
    if pixels is not None:
        mean, std = (tuple(round(float(one), 8) for one in numbers) for numbers in pixels)
        apply = f"mj.on_pixels(model.apply, {mean}, {std})"
    own: dict[str, str] = {}
    made = _expression(model, own)
    return "\n".join(
        [
            *own.values(),
            f"model = {made}",
            f"like = jax.eval_shape(model.init, jax.random.key(0), {', '.join(inputs)})",
            f"apply = {apply}  # Of {' and '.join(inputs.values())}.",
        ]
    )


def _expression(value: Any, own: dict[str, str]) -> str:
    """Returns the expression of a value, and adds the import lines of its names to `own`, by name."""
    if isinstance(value, nn.Module):
        given = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.name not in _LEFT_OUT and getattr(value, field.name) != field.default
        }
        return _call(value, given, own)
    if hasattr(value, "_asdict"):
        return _call(value, value._asdict(), own)
    if isinstance(value, tuple):
        return f"({', '.join(_expression(one, own) for one in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, type | np.dtype) or hasattr(value, "dtype"):
        return f"jnp.{jnp.dtype(value).name}"
    return _named(value, own) if callable(value) and hasattr(value, "__qualname__") else repr(value)


def _call(value: Any, arguments: dict[str, Any], own: dict[str, str]) -> str:
    given = ", ".join(f"{name}={_expression(one, own)}" for name, one in arguments.items())
    return f"{_named(type(value), own)}({given})"


def _named(value: Any, own: dict[str, str]) -> str:
    """Returns the name of a class or function: one of ours, or one that a line imports."""
    name, module = value.__qualname__, value.__module__
    if getattr(models, name, None) is value:
        return f"mj.models.{name}"
    if module == "__main__":  # A script, or a module run with -m.
        module = getattr(getattr(sys.modules[module], "__spec__", None), "name", module)
    if "." in name:  # Inside a function or a class.
        own[name] = f"# {name} is of {module}; no import reaches it."
    else:
        own[name] = f"from {module} import {name}"
    return name
