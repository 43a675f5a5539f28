"""A model as lines of Python, for who takes its weights out of a run."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from merge_jax import models

__all__ = ["model_code"]

# What a module has, but a trained model does not need: where it hangs, how it started, and the devices of its training.
_LEFT_OUT = ("parent", "name", "kernel_init", "axis_name")


def model_code(model: nn.Module, inputs: Mapping[str, str], pixels: Sequence[Sequence[float]] | None = None) -> str:
    """Returns lines that make `model`, its variables as shapes, `like`, and its `apply` function.

    They need `jax`, `jax.numpy` as `jnp` and `merge_jax` as `mj`; a line of their own imports what is of no
    `merge_jax.models`.

    Args:
      model: any of Flax.
      inputs: what it is called with, as expressions, and what they are, in words.
      pixels: mean and deviation of each channel that uint8 images are scaled by; None for inputs as they are.
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
    """Returns the expression that makes a value, and adds the lines that its names need to `own`, by name."""
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
    """Returns the name of a class or a function: one of ours, or one that a line imports."""
    name, module = value.__qualname__, value.__module__
    if getattr(models, name, None) is value:
        return f"mj.models.{name}"
    if module == "__main__":  # A script, or a module that was run by -m.
        module = getattr(getattr(sys.modules[module], "__spec__", None), "name", module)
    if "." in name:  # Inside of a function or a class.
        own[name] = f"# {name} is of {module}; no import reaches it."
    else:
        own[name] = f"from {module} import {name}"
    return name
