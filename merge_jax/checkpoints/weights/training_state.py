"""Finds the model's leaves in a saved training state."""

from collections.abc import Iterable

__all__ = ["MODEL", "model_part"]

MODEL = ("params", "model", "state", "train_state", "target", "state_dict", "model_state_dict")
"""What training states call the model."""

_OTHERS = {
    *("opt_state", "optimizer", "optimizer_state", "opt", "step", "epoch", "key", "rng", "rngs"),
    *("optimizer_state_dict", "optimizer_states", "optim", "scheduler", "lr_scheduler", "lr_schedulers", "scaler"),
    *("callbacks", "rng_state", "loss"),
}
_BESIDE_TARGET = {"adapter", "source"}  # Of a joint run: the target is the model.
_MODEL_STATE = "model_state/"
_OF_KERAS = {"trainable_variables", "non_trainable_variables"}
_BESIDE_KERAS = {"optimizer_variables", "metrics_variables"}


def model_part(paths: Iterable[str]) -> dict[str, str]:
    """Returns the names of the model's leaves in a training state, each with its path in the file.

    The siblings of `params` stay (`batch_stats`; `model_state` is unwrapped), except for the optimizer's state, step
    and random keys. The names `model`, `state`, `target` and `state_dict` are removed if nothing else stands beside
    them. Without such names, or with unknown siblings, all leaves stay unchanged. Keras stores a layer in
    `trainable_variables` or beside it, depending on whether it was frozen; both belong to the model.
    """
    names = {path: path for path in paths}
    if layers := _keras_part(names):
        return layers
    while True:
        top = dict.fromkeys(name.partition("/")[0] for name in names if "/" in name)
        others = _OTHERS | _BESIDE_TARGET if "target" in top else _OTHERS
        kept = [name for name in top if name not in others]
        lone = {name for name in names if "/" not in name} - others
        if "params" in top:
            inside = {name: path for name, path in names.items() if name.partition("/")[0] not in others}
            bare = {name.removeprefix(_MODEL_STATE): path for name, path in inside.items()}
            moved = {name.split("/")[1] for name in inside if name.startswith(_MODEL_STATE)}
            return bare if moved.isdisjoint(top) else inside
        if len(kept) != 1 or kept[0] not in MODEL or lone:
            return names
        names = {
            name.removeprefix(f"{kept[0]}/"): path for name, path in names.items() if name.startswith(f"{kept[0]}/")
        }


def _keras_part(paths: Iterable[str]) -> dict[str, str]:
    """Returns the layers of a Keras state, under names independent of freezing; none for other states."""
    parted = {path: path.partition("/") for path in paths}
    tops = {top for top, _, _ in parted.values()}
    if not tops & _OF_KERAS or tops - _OF_KERAS - _BESIDE_KERAS:
        return {}
    layers = [path for path, (top, _, _) in parted.items() if top in _OF_KERAS]
    names = {parted[path][2]: path for path in layers}
    return names if len(names) == len(layers) else {}
