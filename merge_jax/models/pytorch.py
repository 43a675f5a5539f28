"""Converts image networks from and to weight files of PyTorch models, with one table of names for both directions."""

import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from merge_jax.checkpoints.names import without_prefix
from merge_jax.checkpoints.weights.load import load_weights
from merge_jax.checks import check_at_least_one, check_choice
from merge_jax.layouts import matrix_spec
from merge_jax.models.key_maps import Layout, Place, PretrainedVariables, take, write
from merge_jax.models.vit_files import from_timm, is_vit, write_timm
from merge_jax.paths import flatten, natural_order

__all__ = ["Library", "PretrainedVariables", "from_pytorch", "to_pytorch"]

Library = Literal["efficientnet_lite_pytorch", "timm", "torchvision"]
"""The library whose names the tensors have."""

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


class _Names(NamedTuple):
    """A library's names of the modules of a convolutional network.

    Attributes:
      modules: modules outside blocks.
      block: prefix of a block, from its `number` in all stages, its `stage` and `place` in the stage, counted from 0
        (`next` and `next_stage`: from 1).
      parts: modules of a block.
      unexpanded: modules of a block without an expansion, if they differ.
    """

    modules: Mapping[str, str]
    block: str
    parts: Mapping[str, str]
    unexpanded: Mapping[str, str] = MappingProxyType({})


def _named(names: Sequence[str], theirs: str) -> dict[str, str]:
    return dict(zip(names, theirs.split(), strict=True))


_FILTER = ("depthwise", "depthwise_norm", "project", "project_norm")
_PARTS = ("expand", "expand_norm", *_FILTER)
_MODULES = ("stem", "stem_norm", "head", "head_norm", "fc")

_RESNET = _Names(
    _named(("stem", "stem_norm", "fc"), "conv1 bn1 fc"),
    "layer{next_stage}.{place}.",
    _named(
        ("conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "shortcut", "shortcut_norm"),
        "conv1 bn1 conv2 bn2 conv3 bn3 downsample.0 downsample.1",
    ),
)
_RESNETS = {"torchvision": _RESNET, "timm": _RESNET}
_INVERTED_RESIDUALS = {
    "efficientnet_lite_pytorch": _Names(
        _named(_MODULES, "_conv_stem _bn0 _conv_head _bn1 _fc"),
        "_blocks.{number}.",
        _named(_PARTS, "_expand_conv _bn0 _depthwise_conv _bn1 _project_conv _bn2"),
    ),
    "timm": _Names(
        _named(_MODULES, "conv_stem bn1 conv_head bn2 classifier"),
        "blocks.{stage}.{place}.",
        _named(_PARTS, "conv_pw bn1 conv_dw bn2 conv_pwl bn3"),
        _named(_FILTER, "conv_dw bn1 conv_pw bn2"),
    ),
    "torchvision": _Names(
        _named(_MODULES, "features.0.0 features.0.1 features.{last}.0 features.{last}.1 classifier.1"),
        "features.{next}.conv.",
        _named(_PARTS, "0.0 0.1 1.0 1.1 2 3"),
        _named(_FILTER, "0.0 0.1 1 2"),
    ),
}
_LAST = "params/fc/"
_COUNTER = "num_batches_tracked"  # Of each BatchNorm; evaluation does not use it.


def from_pytorch(
    path: str | os.PathLike[str], variables: Any, *, resize_positions: bool = False
) -> PretrainedVariables:
    """Returns the variables of an image network with the weights of a PyTorch library.

    - `EfficientNetLite` of `efficientnet_lite_pytorch` and `timm` (`tf_efficientnet_lite0` to 4);
    - `MobileNetV2` of `torchvision` (`mobilenet_v2`) and `timm` (`mobilenetv2_050` to 140);
    - `ResNet` of `torchvision` and `timm` (`resnet18`, `resnet34`, `resnet50`);
    - `VisionTransformer` and `ImageClassifier` of `timm` (`vit_base_patch16_224` and the like, with a class token).

    The names in the file identify the library. The model must supply what they do not contain: padding and the epsilon
    of BatchNorm as in `efficientnet_lite`, `mobilenet_v2_imagenet` and `resnet50_imagenet`, and that of LayerNorm as in
    `vision_transformer_of`. A variant that differs only in layers without parameters, such as timm's `resnetblur50`,
    cannot be distinguished from the plain one.

    Every tensor is loaded, including the statistics of BatchNorm, or listed as left. The last layer keeps its values if
    the file has none, or one with a different number of classes. Leaves keep the dtype of `variables`. A common prefix
    of all names, such as `module.` of `DistributedDataParallel`, is removed.

    Args:
      path: as `load_weights`: a `.safetensors` file (or folder), a `.pth` file with a PyTorch state dict, or another.
      variables: of the model, or their shapes.
      resize_positions: whether a vision transformer's positions on a grid of another size are resized, bicubic, as in
        timm. By default they are refused.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read or contains another model, i.e. a tensor is missing, belongs to no leaf, has
        another shape or is not float; variables of another model.
    """
    leaves = flatten(variables)
    if is_vit(leaves):
        return from_timm(path, variables, resize_positions)
    maps = [_places(leaves, library) for library in _libraries(leaves)]
    found = flatten(load_weights(path))
    for of in maps:
        found = without_prefix(path, found, {place.name.replace(".", "/") for place in of.values()})
    tensors = {name.replace("/", "."): tensor for name, tensor in found.items()}
    places = max(maps, key=lambda of: len(tensors.keys() & {place.name for place in of.values()}))
    return take(path, tensors, variables, places, last=_LAST, spare=lambda name: name.endswith(_COUNTER))


def to_pytorch(variables: Any, library: Library | None = None, num_channels: int = 3) -> dict[str, np.ndarray]:
    """Returns a model's variables by the names and in the layout that `from_pytorch` reads, for `save_safetensors`.

    The library's model loads them with a strict `load_state_dict`. Counters of BatchNorm are left out and stay at 0
    there.

    Args:
      variables: of a model that `from_pytorch` supports.
      library: library whose names to use; by default `efficientnet_lite_pytorch` for inverted residuals, `torchvision`
        for a `ResNet`, and `timm` for a vision transformer.
      num_channels: channels of a vision transformer's images, which the shape of `patch/kernel` does not determine.

    Raises:
      ValueError: variables of another model, a library without this model, or patches that are not squares with this
        number of channels.
    """
    leaves = flatten(variables)
    vit = is_vit(leaves)
    libraries = ("timm",) if vit else tuple(_libraries(leaves))
    name = libraries[0] if library is None else library
    check_choice("library", name, libraries)
    if vit:
        check_at_least_one(num_channels=num_channels)
        return write_timm(variables, num_channels)
    return write(variables, _places(leaves, name))


def _libraries(leaves: Mapping[str, Any]) -> dict[str, _Names]:
    return _RESNETS if any(leaf.endswith("/conv1/kernel") for leaf in leaves) else _INVERTED_RESIDUALS


def _places(leaves: Mapping[str, Any], library: str) -> dict[str, Place]:
    """Returns the place of each leaf of a convolutional network in a library's files."""
    blocks = sorted({leaf.split("/")[1] for leaf in leaves if leaf.count("/") == 3}, key=natural_order)
    theirs, places = _libraries(leaves)[library], {}
    for leaf, array in leaves.items():
        _, *modules, kind = leaf.split("/")
        *block, module = modules or [""]
        expanded = not block or f"params/{block[0]}/expand/kernel" in leaves
        table = theirs.modules if not block else theirs.parts if expanded else theirs.unexpanded or theirs.parts
        place = re.fullmatch(r"stage(\d+)_(\d+)", block[0]) if block else None
        if module not in table or kind not in _LEAVES or (block and place is None):
            raise ValueError(
                f"variables have the leaf {leaf!r}, which no EfficientNetLite, MobileNetV2, ResNet or vision"
                " transformer of these libraries has: give {'params': ..., 'batch_stats': ...} of one"
            )
        prefix = ""
        if place is not None:
            number, stage = blocks.index(place[0]), int(place[1])
            prefix = theirs.block.format(
                number=number, next=number + 1, stage=stage - 1, next_stage=stage, place=place[2]
            )
        name = f"{prefix}{table[module].format(last=len(blocks) + 1)}.{_LEAVES[kind]}"
        places[leaf] = Place(name, _layout(leaf, array.shape))
    return places


def _layout(leaf: str, shape: tuple[int, ...]) -> Layout:
    """Returns the layout of a leaf, whose tensor is `[out, in, kh, kw]`, `[out, in]` or `[n]`."""
    spec = matrix_spec(leaf, shape)
    if not spec.rows:
        return Layout(shape, spec, shape)
    window = (1, 1) if len(shape) == 2 and not leaf.startswith(_LAST) else ()
    return Layout(shape, spec, (*spec.blocks(shape), *window))
