"""Weights of BERT and DistilBERT between Hugging Face's files and the text models here; one table for both ways."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from merge_jax.matrices import as_matrix, from_matrix, matrix_spec
from merge_jax.paths import flatten, near_misses, replace
from merge_jax.types import Params
from merge_jax.weights import load_safetensors

__all__ = ["Loaded", "from_huggingface", "to_huggingface"]


class Loaded(NamedTuple):
    """The parameters of a model with a file's weights in them, and the paths of the leaves that kept their values."""

    params: Params
    kept: tuple[str, ...]


class _Architecture(NamedTuple):
    """How Hugging Face names an architecture's modules, by the path of ours, and what its configuration calls things.

    In a file of a bare encoder, the names lack the `prefix`.
    """

    name: str
    prefix: str
    modules: Mapping[str, str]
    heads: str
    activation: str


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


def from_huggingface(path: str | os.PathLike[str], params: Params) -> Loaded:
    """Returns the parameters with the weights of a BERT or DistilBERT as Hugging Face saves it, without torch.

    All leaves of the encoder are taken. A head's layer (`pooler`, `pre_classifier`, `classifier`, `qa_outputs`) is
    taken where the file has it in the same shapes and keeps its values otherwise; `kept` names those leaves. Leaves
    keep the dtype of `params`. Names that older files have (`gamma`, `beta`) are known, and the encoder's names with
    and without their prefix. Where a `config.json` is beside the file, heads and activation are compared with it,
    since no tensor would tell.

    Args:
      path: what `load_safetensors` reads: a file, an index of shards, or a model's folder.
      params: of a `TextEncoder`, `TextClassifier` or `SpanExtractor`, for their leaves and shapes.

    Raises:
      FileNotFoundError: as `load_safetensors`.
      ValueError: as `load_safetensors`; params of another model; a file of another architecture, vocabulary, shape,
        number of layers, number of heads or activation; tensors that are missing or are no floats.
    """
    leaves = flatten(params)
    encoder = _encoder(leaves)
    ours = _architecture(leaves, encoder)
    names = {leaf: _bare(_name(ours, leaf.removeprefix(encoder))) for leaf in leaves}
    tensors = {_bare(name.replace("/", ".")): tensor for name, tensor in flatten(load_safetensors(path)).items()}
    queries = [leaf for leaf in leaves if leaf.endswith("/query/kernel")]
    _check_architecture(path, ours, tensors, num_layers=len(queries))
    _check_config(path, ours, num_heads=leaves[queries[0]].shape[1])
    in_encoder = [leaf for leaf in leaves if leaf.startswith(encoder)]
    missing = [names[leaf] for leaf in in_encoder if names[leaf] not in tensors]
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(f"{path} lacks the tensors {', '.join(map(repr, missing[:10]))}{more}")
    for leaf in in_encoder:
        _check_tensor(path, leaf, names[leaf], tensors[names[leaf]], leaves[leaf])
    # By layers, so that no kernel is taken without its bias.
    kept_layers = {
        leaf.rpartition("/")[0]
        for leaf in leaves.keys() - in_encoder
        if names[leaf] not in tensors or tensors[names[leaf]].shape != _torch_shape(leaf, leaves[leaf])
    }
    kept = tuple(leaf for leaf in leaves if leaf.rpartition("/")[0] in kept_layers)
    taken = {
        leaf: jnp.asarray(from_matrix(tensors[names[leaf]], matrix_spec(leaf, old.shape), old.shape), old.dtype)
        for leaf, old in leaves.items()
        if leaf not in kept
    }
    return Loaded(replace(params, taken), kept)


def to_huggingface(params: Params) -> dict[str, np.ndarray]:
    """Returns the parameters of a text model by Hugging Face's names and in its layout, for `save_safetensors`.

    Those of a `TextEncoder` get the names of a bare model, without prefix. With the right `config.json` beside it,
    `transformers` reads the file; give `save_safetensors` the metadata `{"format": "pt"}` for it.

    Raises:
      ValueError: params of another model.
    """
    leaves = flatten(params)
    encoder = _encoder(leaves)
    architecture = _architecture(leaves, encoder)
    tensors = {}
    for leaf, array in leaves.items():
        name = _name(architecture, leaf.removeprefix(encoder))
        matrix = np.asarray(as_matrix(array, matrix_spec(leaf, array.shape)))
        tensors[name if encoder else name.removeprefix(architecture.prefix)] = matrix.reshape(_torch_shape(leaf, array))
    return tensors


def _encoder(leaves: Mapping[str, Any]) -> str:
    """Returns what the paths of the encoder's leaves begin with."""
    for encoder in ("encoder/", ""):
        if encoder + _WORDS in leaves:
            return encoder
    raise ValueError(
        f"params are of no text model, they have no {_WORDS!r}; {near_misses('encoder/' + _WORDS, leaves)}"
    )


def _architecture(leaves: Mapping[str, Any], encoder: str) -> _Architecture:
    return _BERT if f"{encoder}embeddings/segment/embedding" in leaves else _DISTILBERT


def _name(architecture: _Architecture, leaf: str) -> str:
    """Returns the name of the tensor that is a leaf of ours, by its path in the encoder or the head."""
    module, _, kind = leaf.rpartition("/")
    number = re.search(r"(?<=layer_)\d+", module)
    module = re.sub(r"(?<=layer_)\d+", "{}", module)
    if module not in architecture.modules or kind not in _LEAVES:
        raise ValueError(f"params have the leaf {leaf!r}, for which a {architecture.name} has no name")
    return f"{architecture.modules[module]}.{_LEAVES[kind]}".format(number and number[0])


def _bare(name: str) -> str:
    """Returns a tensor's name without prefix, and with the newer names of a norm's two vectors."""
    name = name.removeprefix(_BERT.prefix).removeprefix(_DISTILBERT.prefix)
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _torch_shape(leaf: str, array: Any) -> tuple[int, ...]:
    """Returns the shape that torch has a leaf in: `[out, in]`, or a vector."""
    spec = matrix_spec(leaf, array.shape)
    return spec.matrix_shape(array.shape) if spec.rows else (array.size,)


def _check_architecture(path: Any, ours: _Architecture, names: Iterable[str], num_layers: int) -> None:
    counts = {}
    for architecture in (_BERT, _DISTILBERT):
        before, after = _bare(f"{architecture.modules[_QUERY]}.weight").split("{}")
        counts[architecture.name] = sum(name.startswith(before) and name.endswith(after) for name in names)
    found = [name for name, count in counts.items() if count]
    if not found:
        raise ValueError(f"{path} is of neither BERT nor DistilBERT: it has tensors such as {sorted(names)[:3]}")
    if ours.name not in found:
        raise ValueError(f"{path} is of {found[0]}, the model is a {ours.name}")
    if counts[ours.name] != num_layers:
        raise ValueError(f"{path} has {counts[ours.name]} layers, the model has {num_layers}")


def _check_config(path: str | os.PathLike[str], ours: _Architecture, num_heads: int) -> None:
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not (folder / "config.json").exists():
        return
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for key, expected in ((ours.heads, num_heads), (ours.activation, "gelu")):
        found = config.get(key, expected)
        if found != expected:
            raise ValueError(f"{folder / 'config.json'} has {key} {found!r}, the model has {expected!r}")


def _check_tensor(path: Any, leaf: str, name: str, tensor: np.ndarray, ours: Any) -> None:
    expected = _torch_shape(leaf, ours)
    if tensor.shape != expected and leaf.endswith(_WORDS) and tensor.shape[1:] == expected[1:]:
        raise ValueError(f"{path} has a vocabulary of {len(tensor)} tokens, the model has one of {expected[0]}")
    if tensor.shape != expected:
        raise ValueError(f"the tensor {name!r} of {path} is {list(tensor.shape)}, the model needs {list(expected)}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"the tensor {name!r} of {path} is {tensor.dtype}, expected floats")
