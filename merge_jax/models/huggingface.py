"""Converts weights of BERT, DistilBERT and ViT from and to Hugging Face files, with one table for both directions."""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.names import without_prefix
from merge_jax.checkpoints.shards import beside, read_json
from merge_jax.checkpoints.weights.load import load_weights, weight_paths, weight_shapes
from merge_jax.checks import check_at_least_one
from merge_jax.models.key_maps import check_kept
from merge_jax.models.transformer import TextEncoder
from merge_jax.models.vit import VisionTransformer
from merge_jax.models.vit_files import CLASS_TOKEN, PATCH, POSITION, check_patches, positions_of, torch_layout
from merge_jax.paths import flatten, near_misses, replace, some_of
from merge_jax.types import Params

__all__ = [
    "Loaded",
    "check_huggingface",
    "from_huggingface",
    "is_vit_of_huggingface",
    "read_huggingface",
    "text_encoder_of",
    "to_huggingface",
    "vit_encoder_of",
]


class Loaded(NamedTuple):
    """A model's parameters with the weights of a file, and the paths of the leaves that kept their values."""

    params: Params
    kept: tuple[str, ...]


class _Architecture(NamedTuple):
    """Hugging Face's names of an architecture's modules, by our paths, and the keys of its configuration.

    In a file of a bare encoder, the names lack the `prefix`; `leaves` are tensors outside modules.
    """

    name: str
    prefix: str
    modules: Mapping[str, str]
    heads: str
    activation: str
    leaves: Mapping[str, str] = MappingProxyType({})


_WORDS = "embeddings/word/embedding"
_QUERY = "layer_{}/attention/query"
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_HEADS = {name: name for name in ("pooler", "pre_classifier", "classifier", "qa_outputs")}
_BERT = _Architecture(
    "BERT",
    "bert.",
    {
        "embeddings/word": "bert.embeddings.word_embeddings",
        "embeddings/position": "bert.embeddings.position_embeddings",
        "embeddings/segment": "bert.embeddings.token_type_embeddings",
        "embeddings/norm": "bert.embeddings.LayerNorm",
        _QUERY: "bert.encoder.layer.{}.attention.self.query",
        "layer_{}/attention/key": "bert.encoder.layer.{}.attention.self.key",
        "layer_{}/attention/value": "bert.encoder.layer.{}.attention.self.value",
        "layer_{}/attention/out": "bert.encoder.layer.{}.attention.output.dense",
        "layer_{}/norm1": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "layer_{}/up": "bert.encoder.layer.{}.intermediate.dense",
        "layer_{}/down": "bert.encoder.layer.{}.output.dense",
        "layer_{}/norm2": "bert.encoder.layer.{}.output.LayerNorm",
        **_HEADS,
        "pooler": "bert.pooler.dense",
    },
    heads="num_attention_heads",
    activation="hidden_act",
)
_DISTILBERT = _Architecture(
    "DistilBERT",
    "distilbert.",
    {
        "embeddings/word": "distilbert.embeddings.word_embeddings",
        "embeddings/position": "distilbert.embeddings.position_embeddings",
        "embeddings/norm": "distilbert.embeddings.LayerNorm",
        _QUERY: "distilbert.transformer.layer.{}.attention.q_lin",
        "layer_{}/attention/key": "distilbert.transformer.layer.{}.attention.k_lin",
        "layer_{}/attention/value": "distilbert.transformer.layer.{}.attention.v_lin",
        "layer_{}/attention/out": "distilbert.transformer.layer.{}.attention.out_lin",
        "layer_{}/norm1": "distilbert.transformer.layer.{}.sa_layer_norm",
        "layer_{}/up": "distilbert.transformer.layer.{}.ffn.lin1",
        "layer_{}/down": "distilbert.transformer.layer.{}.ffn.lin2",
        "layer_{}/norm2": "distilbert.transformer.layer.{}.output_layer_norm",
        **_HEADS,
    },
    heads="n_heads",
    activation="activation",
)
_VIT = _Architecture(
    "ViT",
    "vit.",
    {
        "patch": "vit.embeddings.patch_embeddings.projection",
        "layer_{}/norm1": "vit.encoder.layer.{}.layernorm_before",
        _QUERY: "vit.encoder.layer.{}.attention.attention.query",
        "layer_{}/attention/key": "vit.encoder.layer.{}.attention.attention.key",
        "layer_{}/attention/value": "vit.encoder.layer.{}.attention.attention.value",
        "layer_{}/attention/out": "vit.encoder.layer.{}.attention.output.dense",
        "layer_{}/norm2": "vit.encoder.layer.{}.layernorm_after",
        "layer_{}/up": "vit.encoder.layer.{}.intermediate.dense",
        "layer_{}/down": "vit.encoder.layer.{}.output.dense",
        "norm": "vit.layernorm",
        "classifier": "classifier",
    },
    heads="num_attention_heads",
    activation="hidden_act",
    leaves={CLASS_TOKEN: "vit.embeddings.cls_token", POSITION: "vit.embeddings.position_embeddings"},
)
_ARCHITECTURES = (_BERT, _DISTILBERT, _VIT)
# In transformers 5, a ViT's state dict uses these names, but its files the older ones.
_NEWER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def from_huggingface(
    path: str | os.PathLike[str], params: Params, *, epsilon: float = 1e-12, resize_positions: bool = False
) -> Loaded:
    """Returns the parameters with the weights of a BERT, DistilBERT or ViT saved by Hugging Face, without torch.

    All leaves of the encoder are loaded. A head's layer (`pooler`, `pre_classifier`, `classifier`, `qa_outputs`) is
    loaded if the file contains it in the same shapes, and keeps its values otherwise; `kept` names those leaves. Leaves
    keep the dtype of `params`. Supported are the names of older files (`gamma`, `beta`), those of a ViT's state dict in
    transformers 5, and the encoder's names with and without their prefix. If there is a `config.json` beside the file,
    heads, activation and the epsilon of the norms are compared with it, since tensors do not contain them.

    Args:
      path: anything `load_weights` reads, such as a file, an index of shards, or a model's folder.
      params: of a `TextEncoder`, `TextClassifier`, `SpanExtractor`, `VisionTransformer` or `ImageClassifier`, for
        their leaves and shapes; leaves that are kept need values.
      epsilon: that of the model's norms; for a `VisionTransformer` it may differ from 1e-12.
      resize_positions: whether a vision transformer's positions on a grid of another size are resized, bicubic, as in
        transformers. By default they are refused.

    Raises:
      FileNotFoundError: as `load_weights`.
      ValueError: as `load_weights`; params of another model; a file with another architecture, vocabulary, size of
        images or patches, shape, number of layers, number of heads, activation or epsilon; tensors that are missing or
        not floats.
    """
    loaded = read_huggingface(path, params, epsilon=epsilon, resize_positions=resize_positions)
    check_kept(path, loaded.kept, flatten(params))
    return loaded


def read_huggingface(
    path: str | os.PathLike[str], params: Params, *, epsilon: float = 1e-12, resize_positions: bool = False
) -> Loaded:
    """Returns the result of `from_huggingface`; given shapes, leaves missing in the file stay shapes."""
    check_huggingface(path, params, epsilon=epsilon)
    leaves = flatten(params)
    encoder = _encoder(leaves)
    ours = _architecture(leaves, encoder)
    names = {leaf: _bare(_name(ours, leaf.removeprefix(encoder))) for leaf in leaves}
    tensors = _by_bare_names(path, flatten(load_weights(path)))
    in_encoder = [leaf for leaf in leaves if leaf.startswith(encoder)]
    num_channels = 1
    if ours is _VIT:
        patch, position = encoder + PATCH, encoder + POSITION
        kernel, rows = tensors[names[patch]], leaves[position].shape[0]
        num_channels = check_patches(path, kernel, leaves[patch].shape[0])
        table, side = tensors[names[position]], kernel.shape[2]
        table = positions_of(path, table, rows, side, resize=resize_positions, antialias=False)
        tensors[names[position]] = table
    layouts = {leaf: torch_layout(leaf.removeprefix(encoder), old.shape, num_channels) for leaf, old in leaves.items()}
    for leaf in in_encoder:
        _check_tensor(path, leaf, names[leaf], tensors[names[leaf]], layouts[leaf].theirs)
    # By layers, so that no kernel is loaded without its bias.
    kept_layers = {
        leaf.rpartition("/")[0]
        for leaf in leaves.keys() - in_encoder
        if names[leaf] not in tensors or tensors[names[leaf]].shape != layouts[leaf].theirs
    }
    kept = tuple(leaf for leaf in leaves if leaf.rpartition("/")[0] in kept_layers)
    taken = {
        leaf: jnp.asarray(layouts[leaf].to_ours(tensors[names[leaf]]).reshape(old.shape), old.dtype)
        for leaf, old in leaves.items()
        if leaf not in kept
    }
    return Loaded(replace(params, taken), kept)


def text_encoder_of(path: str | os.PathLike[str], **options: Any) -> TextEncoder:
    """Returns the encoder that fits a weight file: its vocabulary, width, layers, heads and positions.

    The file contains a BERT or DistilBERT saved by Hugging Face. Only its header is read, and the `config.json` beside
    it for the number of heads.

    Args:
      path: anything `load_weights` reads, such as a file, an index of shards, or a model's folder.
      options: other attributes of `TextEncoder`, such as `separator`.

    Raises:
      FileNotFoundError: as `load_weights`.
      ValueError: as `load_weights`; weights of another architecture, missing tensors, or no `config.json` with the
        number of heads.
    """
    shapes = {name: leaf.shape for name, leaf in _by_bare_names(path, weight_shapes(path)).items()}
    counts = _layers(shapes)
    architecture = next((one for one in (_BERT, _DISTILBERT) if counts[one.name]), None)
    if architecture is None:
        raise ValueError(
            f"{path} is of neither BERT nor DistilBERT: it has tensors such as {some_of(sorted(shapes), 3)}"
        )

    def size(leaf: str, axis: int) -> int:
        name = _bare(_name(architecture, leaf))
        if len(shapes.get(name, ())) != 2:
            raise ValueError(f"{path} lacks the matrix {name!r}; {near_misses(name, shapes)}")
        return shapes[name][axis]

    num_heads = _config(path).get(architecture.heads)
    if not isinstance(num_heads, int):
        raise ValueError(
            f"no tensor of {path} tells its number of heads: put the model's config.json, which has "
            f"{architecture.heads!r}, beside it"
        )
    return TextEncoder(
        vocab_size=size(_WORDS, 0),
        width=size(_WORDS, 1),
        num_layers=counts[architecture.name],
        num_heads=num_heads,
        hidden=size("layer_0/up/kernel", 0),
        max_length=size("embeddings/position/embedding", 0),
        num_segments=size("embeddings/segment/embedding", 0) if architecture is _BERT else 0,
        **options,
    )


def is_vit_of_huggingface(path: str | os.PathLike[str]) -> bool:
    """Returns whether a weight file has Hugging Face's names of a vision transformer."""
    return _bare(_name(_VIT, PATCH)) in _by_bare_names(path, dict.fromkeys(weight_paths(path)))


def vit_encoder_of(
    path: str | os.PathLike[str], num_heads: int | None, image_size: int | None, options: Mapping[str, Any]
) -> VisionTransformer:
    """Returns the encoder that fits a Hugging Face file of a ViT; see `vision_transformer_of`."""
    shapes = {name: leaf.shape for name, leaf in _by_bare_names(path, weight_shapes(path)).items()}
    ranks = {PATCH: 4, "layer_0/up/kernel": 2, POSITION: 3}
    names = {leaf: _bare(_name(_VIT, leaf)) for leaf in ranks}
    for leaf, name in names.items():
        if len(shapes.get(name, ())) != ranks[leaf]:
            raise ValueError(f"{path} lacks the tensor {name!r} of {ranks[leaf]} axes; {near_misses(name, shapes)}")
    config = _config(path)
    heads = config.get(_VIT.heads, num_heads)
    if not isinstance(heads, int):
        raise ValueError(f"no tensor of {path} tells its number of heads: put its config.json beside it")
    if num_heads not in (None, heads):
        raise ValueError(f"num_heads is {num_heads}, {_config_file(path)} has {heads}")
    (width, _, side, _), (hidden, _), (_, rows, _) = (shapes[name] for name in names.values())
    return VisionTransformer(
        image_size=math.isqrt(rows - 1) * side if image_size is None else image_size,
        patch_size=side,
        width=width,
        num_layers=_layers(shapes)[_VIT.name],
        num_heads=heads,
        hidden=hidden,
        **{"epsilon": config.get("layer_norm_eps", 1e-12), **options},
    )


def check_huggingface(path: str | os.PathLike[str], params: Params, *, epsilon: float = 1e-12) -> None:
    """Raises the errors of `from_huggingface` that follow from tensor names and configuration; reads no values.

    Args:
      path: of the file, or its folder.
      params: of the model, or their shapes.
      epsilon: of the model's norms.

    Raises:
      FileNotFoundError, ValueError: as `from_huggingface`.
    """
    leaves = flatten(params)
    encoder = _encoder(leaves)
    ours = _architecture(leaves, encoder)
    tensors = _by_bare_names(path, dict.fromkeys(weight_paths(path)))
    queries = [leaf for leaf in leaves if leaf.endswith("/query/kernel")]
    _check_architecture(path, ours, tensors, num_layers=len(queries))
    _check_config(path, ours, num_heads=leaves[queries[0]].shape[1], epsilon=epsilon)
    names = [_bare(_name(ours, leaf.removeprefix(encoder))) for leaf in leaves if leaf.startswith(encoder)]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks the tensors {some_of(map(repr, missing), 10)}")


def to_huggingface(params: Params, num_channels: int = 3) -> dict[str, np.ndarray]:
    """Returns a model's parameters by Hugging Face's names and in its layout, for `save_safetensors`; C-contiguous.

    Those of a `TextEncoder` or `VisionTransformer` have the names of a bare model, without prefix. With the right
    `config.json` beside it, `transformers` reads the file; for that, pass `save_safetensors` the metadata
    `{"format": "pt"}`.

    Args:
      params: of a model that `from_huggingface` supports.
      num_channels: channels of a vision transformer's images, which the shape of `patch/kernel` does not determine.

    Raises:
      ValueError: params of another model, or patches that are not squares with this number of channels.
    """
    check_at_least_one(num_channels=num_channels)
    leaves = flatten(params)
    encoder = _encoder(leaves)
    architecture = _architecture(leaves, encoder)
    tensors = {}
    for leaf, array in leaves.items():
        bare = leaf.removeprefix(encoder)
        name = _name(architecture, bare)
        layout = torch_layout(bare, array.shape, num_channels)
        tensors[name if encoder else name.removeprefix(architecture.prefix)] = layout.to_theirs(np.asarray(array))
    return tensors


def _encoder(leaves: Mapping[str, Any]) -> str:
    """Returns the path prefix of the encoder's leaves."""
    for encoder in ("encoder/", ""):
        if encoder + _WORDS in leaves or encoder + PATCH in leaves:
            return encoder
    wanted = PATCH if any(leaf.endswith(PATCH) for leaf in leaves) else _WORDS
    raise ValueError(
        f"params are of no text model or vision transformer, they have no {_WORDS!r} or {PATCH!r};"
        f" {near_misses('encoder/' + wanted, leaves)}"
    )


def _architecture(leaves: Mapping[str, Any], encoder: str) -> _Architecture:
    if encoder + PATCH in leaves:
        return _VIT
    return _BERT if f"{encoder}embeddings/segment/embedding" in leaves else _DISTILBERT


def _name(architecture: _Architecture, leaf: str) -> str:
    """Returns the tensor name of one of our leaves, given its path in the encoder or the head."""
    if leaf in architecture.leaves:
        return architecture.leaves[leaf]
    module, _, kind = leaf.rpartition("/")
    number = re.search(r"(?<=layer_)\d+", module)
    module = re.sub(r"(?<=layer_)\d+", "{}", module)
    if module not in architecture.modules or kind not in _LEAVES:
        raise ValueError(f"params have the leaf {leaf!r}, for which a {architecture.name} has no name")
    return f"{architecture.modules[module]}.{_LEAVES[kind]}".format(number and number[0])


def _bare(name: str) -> str:
    """Returns a tensor's name without prefix, with the newer names of norms and the file names of a ViT."""
    for architecture in _ARCHITECTURES:
        name = name.removeprefix(architecture.prefix)
    if newer := re.fullmatch(r"layers\.(\d+)\.(.+)\.(\w+)", name):
        number, module, kind = newer.groups()
        name = f"encoder.layer.{number}.{_NEWER.get(module, module)}.{kind}"
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _by_bare_names(path: Any, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a file by their bare names, without the common prefix of a wrapped model."""

    def bare(leaf: str) -> str:
        return _bare(leaf.replace("/", "."))

    embeddings = [_name(_BERT, _WORDS), _name(_VIT, PATCH)]
    for name in map(_bare, embeddings):
        leaves = without_prefix(path, leaves, {name}, bare)
    return {bare(leaf): tensor for leaf, tensor in leaves.items()}


def _check_architecture(path: Any, ours: _Architecture, names: Collection[str], num_layers: int) -> None:
    counts = _layers(names)
    found = [name for name, count in counts.items() if count]
    if not found:
        raise ValueError(f"{path} is of neither {' nor '.join(counts)}: it has tensors such as {sorted(names)[:3]}")
    if ours.name not in found:
        raise ValueError(f"{path} is of {found[0]}, the model is a {ours.name}")
    if counts[ours.name] != num_layers:
        raise ValueError(f"{path} has {counts[ours.name]} layers, the model has {num_layers}")


def _layers(names: Iterable[str]) -> dict[str, int]:
    """Returns the number of layers of each architecture among the bare tensor names."""
    counts = {}
    for architecture in _ARCHITECTURES:
        before, after = _bare(f"{architecture.modules[_QUERY]}.weight").split("{}")
        counts[architecture.name] = sum(name.startswith(before) and name.endswith(after) for name in names)
    return counts


def _check_config(path: str | os.PathLike[str], ours: _Architecture, num_heads: int, epsilon: float) -> None:
    config = _config(path)
    for key, expected in ((ours.heads, num_heads), (ours.activation, "gelu"), ("layer_norm_eps", epsilon)):
        found = config.get(key, expected)
        if found != expected:
            raise ValueError(f"{_config_file(path)} has {key} {found!r}, the model has {expected!r}")


def _config_file(path: str | os.PathLike[str]) -> Path:
    return beside(path, "config.json")


def _config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the configuration beside a weight file; empty if there is none."""
    file = _config_file(path)
    return read_json(file) if file.exists() else {}


def _check_tensor(path: Any, leaf: str, name: str, tensor: np.ndarray, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected and leaf.endswith(_WORDS) and tensor.shape[1:] == expected[1:]:
        raise ValueError(f"{path} has a vocabulary of {len(tensor)} tokens, the model has one of {expected[0]}")
    if tensor.shape != expected:
        raise ValueError(f"the tensor {name!r} of {path} is {list(tensor.shape)}, the model needs {list(expected)}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"the tensor {name!r} of {path} is {tensor.dtype}, expected floats")
