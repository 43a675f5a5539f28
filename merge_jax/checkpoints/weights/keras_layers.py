"""The variable names and matrix layouts of Keras layers, whose files only number both."""

import re
from collections.abc import Mapping
from typing import Any

from merge_jax.layouts import MatrixSpec

__all__ = [
    "SPECTRAL",
    "Config",
    "class_of",
    "name_of",
    "scaled_axis",
    "spec_of",
    "sublayers",
    "variables_of",
    "wrapped",
]

Config = Mapping[str, Any]
"""A layer in the `config.json` of a model: `class_name`, and its options in `config`."""

SPECTRAL = "spectral_normalization"
"""The class of the wrapper that divides its layer's kernel by its spectral norm."""

_KERNEL = ("kernel", "bias")
_AFFINE = ("gamma", "beta")
_CELL = ("kernel", "recurrent_kernel", "bias")
_VARIABLES = {
    **dict.fromkeys(("dense", "einsum_dense", "conv1d", "conv2d", "conv3d"), _KERNEL),
    **dict.fromkeys(("conv1d_transpose", "conv2d_transpose", "conv3d_transpose"), _KERNEL),
    **dict.fromkeys(("depthwise_conv1d", "depthwise_conv2d"), _KERNEL),
    **dict.fromkeys(("separable_conv1d", "separable_conv2d"), ("depthwise_kernel", "pointwise_kernel", "bias")),
    **dict.fromkeys(("simple_rnn_cell", "gru_cell", "lstm_cell"), _CELL),
    **dict.fromkeys(("layer_normalization", "group_normalization"), _AFFINE),
    "batch_normalization": (*_AFFINE, "moving_mean", "moving_variance"),
    "normalization": ("mean", "variance", "count"),
    "rms_normalization": ("scale",),
    SPECTRAL: ("kernel", "vector_u"),
    "embedding": ("embeddings",),
    "p_re_lu": ("alpha",),
    "seed_generator": ("seed_generator_state",),
}
# The layer option that omits a variable.
_OPTIONS = {"bias": "use_bias", "gamma": "scale", "beta": "center"}
# The matrix axis that a layer's last variable scales, after `quantize("int8")`.
_SCALED_AXES = {"dense": 1, "embedding": 0}
# Layers' names for their sublayers.
_SUBLAYERS = {
    **dict.fromkeys(("query_dense", "key_dense", "value_dense", "output_dense"), "einsum_dense"),
    "seed_generator": "seed_generator",
}


def class_of(name: str, config: Config | None) -> str:
    """Returns the class of a layer in Keras's snake case, by its configuration or its name in a file.

    >>> class_of("conv2d_transpose_3", None)
    'conv2d_transpose'
    """
    if config is not None:
        return _small(str(config.get("class_name", "")))
    bare = name.lstrip("_")
    return _SUBLAYERS.get(bare, re.sub("_[0-9]+$", "", bare))


def name_of(config: Config | None) -> str | None:
    """Returns the name of a layer in its configuration."""
    options = (config or {}).get("config")
    name = options.get("name") if isinstance(options, Mapping) else None
    return name if isinstance(name, str) else None


def _mode_of(config: Config | None) -> str | None:
    """Returns a layer's quantisation mode by its configuration, such as `int8`."""
    for name in ("config", "dtype", "config", "mode"):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config if isinstance(config, str) else None


def scaled_axis(kind: str, config: Config | None) -> int | None:
    """Returns the axis along which a layer's matrix was scaled to int8; None if it was not, or is unknown."""
    return _SCALED_AXES.get(kind) if _mode_of(config) == "int8" else None


def sublayers(config: Config | None) -> dict[str, Config]:
    """Returns the layers of a Sequential or Functional model by their names in its weight files."""
    layers = (config or {}).get("config")
    layers = layers.get("layers") if isinstance(layers, Mapping) else None
    found: dict[str, Config] = {}
    counts: dict[str, int] = {}
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, Mapping):
            name = _small(str(layer.get("class_name", "")))
            counts[name] = counts.get(name, -1) + 1
            found[f"{name}_{counts[name]}" if counts[name] else name] = layer
    return found


def wrapped(config: Config | None) -> Config | None:
    """Returns the configuration of the layer that a wrapper holds, if it is one."""
    options = (config or {}).get("config")
    layer = options.get("layer") if isinstance(options, Mapping) else None
    return layer if isinstance(layer, Mapping) else None


def variables_of(kind: str, config: Config | None, count: int) -> tuple[str, ...] | None:
    """Returns the names of a layer's variables in file order; None if unknown."""
    names = _VARIABLES.get(kind)
    options = (config or {}).get("config")
    if names is not None and isinstance(options, Mapping):
        names = tuple(name for name in names if options.get(_OPTIONS.get(name, ""), True))
    elif names is not None and names[-1] == "bias" and count == len(names) - 1:
        names = names[:-1]
    return names if names is not None and len(names) == count else None


def spec_of(kind: str, variable: str, rank: int) -> MatrixSpec | None:
    """Returns a variable's matrix spec, if its class tells more than its name."""
    if variable == "bias" and rank > 1:  # Heads, or the two products of a GRU.
        return MatrixSpec((), tuple(range(rank)))
    out, before, window = rank - 1, rank - 2, tuple(range(rank - 2))
    if variable.endswith("kernel") and rank > 2:
        if "depthwise" in kind or variable == "depthwise_kernel":
            return MatrixSpec((before, out), (), window)
        if re.fullmatch("conv[123]d_transpose", kind):
            return MatrixSpec((before,), (out,), window)
        if re.fullmatch("(separable_)?conv[123]d", kind):
            return MatrixSpec((out,), (before,), window)
    return None


def _small(name: str) -> str:
    """Returns a class name as Keras writes it in files: `Conv2DTranspose` as `conv2d_transpose`."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
