"""Conversion between the published PyTorch adapter's parameters and ours."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from merge_jax.transfers.adapters.lpka import ATTENTIONS, LPKAOptions, attention_widths
from merge_jax.transfers.network import Sizes
from merge_jax.types import Adapter

__all__ = ["PublishedAdapter", "export_published_adapter", "load_published_adapter"]

_PUBLISHED_NUM_HEADS = 8

# Published module -> ours. It calls rows "x" and columns "y"; the misspelling is in the original.
_ATTENTIONS = {
    "attention_x_x": "rows_rows",
    "attention_x_y": "rows_cols",
    "attention_y_x": "cols_rows",
    "attention_y_y": "cols_cols",
}
_PROJECTIONS = {"fc_q": "query", "fc_k": "key", "fc_v": "value", "fc_output": "out"}
_FEED_FORWARD = {"dense_up": "up", "dense_dowm": "down"}
# Our parts, each with a module whose kernel determines the sizes.
_PARTS = {
    "target_rows": "query",
    "target_cols": "query",
    "source_rows": "key_value",
    "source_cols": "key_value",
    "feed_forward": "up",
}
# State of torch's spectral norm: the vectors of its power iteration, and optional extra entries of a file.
_STATE = re.compile(r"\.parametrizations\.weight\.0\._[uv]$|\.effective_weight$|num_batches_tracked$")


class PublishedAdapter(NamedTuple):
    """A published adapter in our layout.

    Attributes:
      params: parameters of `LPKA` for one route; the adapter of `lpka_transfer({target: source}, ...,
        output="published")` is `{target: params}`.
      num_layers: number of layers found.
      num_heads: number of heads: given, stored in the file, or 8 as published.
    """

    params: Adapter
    num_layers: int
    num_heads: int


def load_published_adapter(
    arrays: Mapping[str, Any],
    *,
    prefix: str = "",
    num_layers: int | None = None,
    num_heads: int | None = None,
) -> PublishedAdapter:
    """Maps the arrays of a published adapter, by their torch names, to parameters of our `LPKA`.

    Torch stores a linear weight as `[out, in]`, so kernels are transposed: `kernel [in, out] = weight^T`. Only the
    weight before spectral normalisation is read (`parametrizations.weight.original`), not the state of the norm.

    Args:
      arrays: `{torch name: array}`, e.g. a state dict as NumPy arrays or an opened `.npz`; a name may begin
        with `layer.`, as in a saved published model.
      prefix: only names with this prefix are read, e.g. `state/` or `init/adapter/`. By default, the prefix shared
        by all names of layers; the arrays `layers` and `heads` are then read too.
      num_layers: expected number of layers; by default the number found.
      num_heads: number of heads, which the weights do not determine. By default the array `heads`, or 8 as published.

    Raises:
      ValueError: no layer under the prefix, a missing layer or array, an array that does not belong to the adapter,
        or a number of layers or heads that does not fit the arrays.
    """
    if num_heads is None:
        num_heads = int(arrays["heads"]) if "heads" in arrays else _PUBLISHED_NUM_HEADS
    prefix = prefix or _only_prefix(arrays)
    params: dict[str, Any] = {}
    for name in arrays:
        if not name.startswith(prefix) or _STATE.search(name):
            continue
        place = _place(name.removeprefix(prefix).removeprefix("layer."))
        if place is None:
            continue
        *modules, leaf = place
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        value = np.asarray(arrays[name])
        node[leaf] = value.T if leaf == "kernel" else value
    found = len(params)
    if not found or sorted(params) != [f"layer_{i}" for i in range(found)]:
        raise ValueError(f"no complete stack of layers under the prefix {prefix!r}; found {sorted(params)}")
    if num_layers is not None and num_layers != found:
        raise ValueError(f"num_layers is {num_layers}, but the arrays hold {found}")
    _check_complete(params, num_heads)
    return PublishedAdapter(_fused([params[f"layer_{i}"] for i in range(found)]), found, num_heads)


def _fused(layers: Sequence[Mapping[str, Any]]) -> Adapter:
    """Returns our parameters from layers with separate attentions."""

    def concatenated(modules: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {leaf: np.concatenate([module[leaf] for module in modules], -1) for leaf in ("kernel", "bias")}

    def one(layer: Mapping[str, Any]) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for tokens in ("rows", "cols"):
            asking = [layer[name] for name in ATTENTIONS if name.startswith(f"{tokens}_")]
            answering = [layer[name] for name in ATTENTIONS if name.endswith(f"_{tokens}")]
            params[f"target_{tokens}"] = {
                "query": concatenated([attention["query"] for attention in asking]),
                "out": {
                    "kernel": np.concatenate([attention["out"]["kernel"] for attention in asking]),
                    "bias": np.stack([attention["out"]["bias"] for attention in asking]),
                },
                "norm": jax.tree.map(lambda *leaves: np.stack(leaves), *(attention["norm"] for attention in asking)),
            }
            modules = [attention[module] for attention in answering for module in ("key", "value")]
            params[f"source_{tokens}"] = {"key_value": concatenated(modules)}
        return {**params, "feed_forward": layer["feed_forward"]}

    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(one, layers))


def _split(params: Adapter, layer: int, widths: Mapping[str, int]) -> dict[str, Any]:
    """Returns the parameters of a layer with separate attentions; the inverse of `_fused`."""
    layer_params = jax.tree.map(lambda leaf: np.asarray(leaf)[layer], params)
    modules: dict[str, Any] = {name: {} for name in ATTENTIONS}
    for tokens in ("rows", "cols"):
        asks, answers = layer_params[f"target_{tokens}"], layer_params[f"source_{tokens}"]["key_value"]
        start = 0
        for i, name in enumerate(name for name in ATTENTIONS if name.startswith(f"{tokens}_")):
            part = slice(start, start := start + widths[name])
            modules[name]["query"] = {leaf: asks["query"][leaf][..., part] for leaf in ("kernel", "bias")}
            modules[name]["out"] = {"kernel": asks["out"]["kernel"][part], "bias": asks["out"]["bias"][i]}
            modules[name]["norm"] = {leaf: asks["norm"][leaf][i] for leaf in ("scale", "bias")}
        start = 0
        for name in (name for name in ATTENTIONS if name.endswith(f"_{tokens}")):
            for module in ("key", "value"):
                part = slice(start, start := start + widths[name])
                modules[name][module] = {leaf: answers[leaf][..., part] for leaf in ("kernel", "bias")}
    return {**modules, "feed_forward": layer_params["feed_forward"]}


def export_published_adapter(
    params: Adapter, *, num_heads: int = _PUBLISHED_NUM_HEADS, max_width: int | None = None, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Returns the parameters of one `LPKA` as the state dict of the published adapter; the inverse of loading.

    Kernels are transposed to torch's `[out, in]`. The state of the spectral norms, the vectors of a power iteration,
    is set to its limit: the leading singular vectors. In torch:
    `module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})`.

    Args:
      params: the parameters of one route: `adapter[target path]` of a transfer with `output="published"`, all four
        attentions, and one route.
      num_heads: that of the transfer; it determines where to split the concatenated kernels of the attentions.
      max_width: that of the transfer; None as published.
      prefix: prefix of the names, e.g. `layer.`.

    Raises:
      ValueError: parameters that are not those of a published `LPKA`, or with other heads or widths.
    """
    missing = [name for name in _PARTS if name not in params]
    if missing or len(params) > len(_PARTS):
        raise ValueError(f"the parameters of an LPKA are {', '.join(_PARTS)}; got {sorted(params)}")
    kernels = {name: np.shape(params[name][part]["kernel"]) for name, part in _PARTS.items()}
    if {len(shape) for shape in kernels.values()} != {3}:
        raise ValueError(f"the parameters must be of one route, its kernels [layers, in, out]; got {kernels}")
    sizes = Sizes(*(kernels[name][1] for name in ("target_cols", "target_rows", "source_cols", "source_rows")))
    widths = attention_widths(sizes, LPKAOptions(num_heads=num_heads, max_width=max_width))
    for tokens in ("rows", "cols"):
        expected = sum(width for name, width in widths.items() if name.startswith(f"{tokens}_"))
        if kernels[f"target_{tokens}"][2] != expected:
            raise ValueError(
                f"target_{tokens} has {kernels[f'target_{tokens}'][2]} features, {expected} are expected with four "
                f"attentions, num_heads={num_heads} and max_width={max_width}"
            )
    arrays: dict[str, np.ndarray] = {}

    def put(module: str, leaves: Mapping[str, Any], weight: str = "weight") -> None:
        kernel = leaves["kernel"].T if "kernel" in leaves else leaves["scale"]
        arrays[f"{prefix}{module}.{weight}"] = np.ascontiguousarray(kernel)
        arrays[f"{prefix}{module}.bias"] = np.asarray(leaves["bias"])

    for number in range(kernels["target_rows"][0]):
        modules = _split(params, number, widths)
        for theirs, ours in _ATTENTIONS.items():
            for module, name in _PROJECTIONS.items():
                put(f"{number}.{theirs}.{module}", modules[ours][name])
            put(f"{number}.{theirs}.norm", modules[ours]["norm"])
        for module, name in _FEED_FORWARD.items():
            put(f"{number}.output.{module}", modules["feed_forward"][name], "parametrizations.weight.original")
            left, _, right = np.linalg.svd(np.asarray(modules["feed_forward"][name]["kernel"]).T, full_matrices=False)
            state = f"{prefix}{number}.output.{module}.parametrizations.weight.0."
            arrays.update(
                {f"{state}_u": np.ascontiguousarray(left[:, 0]), f"{state}_v": np.ascontiguousarray(right[0])}
            )
        put(f"{number}.output.layernorm", modules["feed_forward"]["norm"])
    return arrays


def _only_prefix(arrays: Mapping[str, Any]) -> str:
    """Returns the only prefix of the weights of layer 0 (a file may contain both `state/` and `grad/`)."""
    probe = re.compile(r"^(.*?)(layer\.)?0\.attention_x_x\.fc_q\.weight$")
    prefixes = [match[1] for name in arrays if (match := probe.match(name))]
    states = [prefix for prefix in prefixes if prefix in ("", "state/")]
    if len(prefixes) != 1 and len(states) != 1:
        raise ValueError(f"cannot tell which arrays are the adapter's; give one of the prefixes {prefixes}")
    return (states or prefixes)[0]


def _place(name: str) -> tuple[str, ...] | None:
    """Returns our path for a torch name, or None if the name does not belong to a layer."""
    match = re.match(r"^(\d+)\.(\w+)\.(\w+)\.(.+)$", name)
    if match is None:
        return None
    layer, part, module, parameter = match.groups()
    kernel, scale = ("kernel", "scale") if "weight" in parameter else ("bias", "bias")
    if part in _ATTENTIONS and module in _PROJECTIONS:
        return f"layer_{layer}", _ATTENTIONS[part], _PROJECTIONS[module], kernel
    if part in _ATTENTIONS and module == "norm":
        return f"layer_{layer}", _ATTENTIONS[part], "norm", scale
    if part == "output" and module in _FEED_FORWARD:
        return f"layer_{layer}", "feed_forward", _FEED_FORWARD[module], kernel
    if part == "output" and module == "layernorm":
        return f"layer_{layer}", "feed_forward", "norm", scale
    raise ValueError(f"the array {name!r} has no place in the published adapter")


def _check_complete(params: Mapping[str, Any], num_heads: int) -> None:
    modules = (*_PROJECTIONS.values(), *_FEED_FORWARD.values())
    leaves = {**dict.fromkeys(modules, ("kernel", "bias")), "norm": ("scale", "bias")}
    parts = dict.fromkeys(_ATTENTIONS.values(), (*_PROJECTIONS.values(), "norm"))
    parts["feed_forward"] = (*_FEED_FORWARD.values(), "norm")
    for layer, layer_params in params.items():
        for part, modules in parts.items():
            for module in modules:
                for leaf in leaves[module]:
                    if leaf not in layer_params.get(part, {}).get(module, {}):
                        raise ValueError(f"the arrays lack {layer}/{part}/{module}/{leaf}")
            if part == "feed_forward":
                continue
            features = layer_params[part]["query"]["kernel"].shape[1]
            if num_heads < 1 or features % num_heads:
                raise ValueError(
                    f"num_heads is {num_heads}, which does not divide the {features} features of {layer}/{part}"
                )
