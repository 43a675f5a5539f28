"""A model as lines of Python, for who takes its weights out of a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

__all__ = ["model_code"]

# What a module has, but a trained model does not need: where it hangs, how it started, and the devices of its training.
_LEFT_OUT = ("parent", "name", "kernel_init", "axis_name")


def model_code(model: nn.Module, inputs: Mapping[str, str], pixels: Sequence[Sequence[float]] | None = None) -> str:
    """Returns lines that make `model`, its variables as shapes, `like`, and its `apply` function.

    They need `jax`, `jax.numpy` as `jnp` and `merge_jax` as `mj`.

    Args:
      model: of `merge_jax.models`.
      inputs: what it is called with, as expressions, and what they are, in words.
      pixels: mean and deviation of each channel that uint8 images are scaled by; None for inputs as they are.
    """
    apply = "model.apply"
    if pixels is not None:
        mean, std = (tuple(round(float(one), 8) for one in numbers) for numbers in pixels)
        apply = f"mj.on_pixels(model.apply, {mean}, {std})"
    return "\n".join(
        [
            f"model = {_expression(model)}",
            f"like = jax.eval_shape(model.init, jax.random.key(0), {', '.join(inputs)})",
            f"apply = {apply}  # Of {' and '.join(inputs.values())}.",
        ]
    )


def _expression(value: Any) -> str:
    if isinstance(value, nn.Module):
        given = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.name not in _LEFT_OUT and getattr(value, field.name) != field.default
        }
        return _call(value, given)
    if hasattr(value, "_asdict"):
        return _call(value, value._asdict())
    if isinstance(value, tuple):
        return f"({', '.join(map(_expression, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, type | np.dtype) or hasattr(value, "dtype"):
        return f"jnp.{jnp.dtype(value).name}"
    return repr(value)


def _call(value: Any, arguments: dict[str, Any]) -> str:
    given = ", ".join(f"{name}={_expression(one)}" for name, one in arguments.items())
    return f"mj.models.{type(value).__name__}({given})"
