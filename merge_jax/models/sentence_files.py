"""What the files of a sentence transformer say about the vector of a text."""

import json
import os
from pathlib import Path

from merge_jax.checkpoints.shards import beside, read_json
from merge_jax.models.transformer import PoolerName

__all__ = ["pooler_of"]

_POOLERS: dict[str, PoolerName] = {"mean": "mean", "cls": "first"}
# Before release 6 of sentence-transformers, each way was a key of its own, of true or false.
_OLD = "pooling_mode_"
_OLD_MODES = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
_READ = ("Transformer", "Pooling", "Normalize")  # A logistic regression can scale a vector back.


def pooler_of(path: str | os.PathLike[str]) -> PoolerName | None:
    """Returns the pooler of `TextClassifier` with which a sentence transformer was trained; None if it is not one.

    A sentence transformer (arXiv:1908.10084) has a `modules.json` beside its weights, which names its layers and the
    folder of its pooling. Scaling to length 1 is left out.

    Args:
      path: the model's folder, or its weight file.

    Raises:
      ValueError: a pooling or another layer that `TextClassifier` does not support, or a file that cannot be read.
    """
    modules = beside(path, "modules.json")
    folder = modules.resolve().parent
    if not modules.is_file() and folder.name.startswith("0_"):  # There, old releases have the weights.
        modules = folder.parent / "modules.json"
    if not modules.is_file():
        return None
    try:
        layers = [(x["type"].rpartition(".")[2], modules.parent / x["path"]) for x in json.loads(modules.read_bytes())]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{modules} does not list the layers of a sentence transformer: {error!r}") from None
    poolings = [own / "config.json" for kind, own in layers if kind == "Pooling"]
    modes = [mode for pooling in poolings for mode in _modes(pooling)]
    others = [kind for kind, _ in layers if kind not in _READ]
    if others or len(modes) != 1 or modes[0] not in _POOLERS:
        found = " + ".join([*modes, *others]) or "no pooling"
        raise ValueError(
            f"{modules}: a text's vector is made by {found}; TextClassifier supports one of {', '.join(_POOLERS)}"
        )
    return _POOLERS[modes[0]]


def _modes(pooling: Path) -> list[str]:
    if not pooling.is_file():
        raise ValueError(f"{pooling} is missing, which says how a text's vector is made")
    config = read_json(pooling)
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return [str(one) for one in mode] if isinstance(mode, list) else [str(mode)]
    old = [name.removeprefix(_OLD) for name, chosen in config.items() if name.startswith(_OLD) and chosen is True]
    return [_OLD_MODES.get(name, name) for name in old] or ["mean"]  # The default, as release 6.2 reads both.
