"""Several sources as one: independent models that train on their tasks in one step."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from merge_jax.data import Arrays, Splits, num_examples, take
from merge_jax.study.models.model import StudyModel
from merge_jax.types import Batch, ModelState, Params

__all__ = ["side_by_side"]


def side_by_side(models: Mapping[str, StudyModel]) -> StudyModel:
    """Returns the models as one with parameters `{name: parameters}`, as in `several_sources`.

    Its loss is the sum of their losses, so each receives only its own gradient. Each has a separate optimizer, which
    clips by that gradient's norm alone. Its metric is the mean of theirs. An epoch is as long as the longest; examples
    of the others repeat.
    """

    def init(key: jax.Array) -> tuple[Params, ModelState]:
        keys = jax.random.split(key, len(models))
        started = {name: model.init(k) for (name, model), k in zip(models.items(), keys, strict=True)}
        params = {name: params for name, (params, _) in started.items()}
        return params, {name: state for name, (_, state) in started.items()}

    def splits(seed: int) -> Splits:
        found = {name: model.splits(seed) for name, model in models.items()}
        return Splits(
            _joined({name: one.train for name, one in found.items()}),
            _joined({name: one.validation for name, one in found.items()}),
            _joined({name: one.test for name, one in found.items()}),
        )

    def evaluate(params: Params, model_state: ModelState, arrays: Arrays) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, model in models.items():
            own = _part(arrays, name)
            new = own.pop("new")  # Repeated examples would count twice.
            own_metrics = model.evaluate(params[name], model_state[name], take(own, np.flatnonzero(new)))
            metrics |= {f"{name}_{metric}": value for metric, value in own_metrics.items()}
        judged = [metrics[f"{name}_{model.metric}"] for name, model in models.items()]
        return {**metrics, "mean_score": float(np.mean(judged))}

    def loss(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> Any:
        total: Any = 0.0
        states: dict[str, ModelState] = {}
        metrics: dict[str, Any] = {}
        for (name, model), k in zip(models.items(), jax.random.split(key, len(models)), strict=True):
            own_loss, (states[name], own) = model.loss(params[name], model_state[name], _part(batch, name), k)
            total += own_loss
            metrics |= {f"{name}_{metric}": value for metric, value in {"loss": own_loss, **own}.items()}
        return total, (states, metrics)

    def optimizer(steps: int) -> optax.GradientTransformation:
        return optax.partition(
            {name: model.optimizer(steps) for name, model in models.items()}, {name: name for name in models}
        )

    return StudyModel(
        name=" and ".join(model.name for model in models.values()),
        init=init,
        loss=loss,
        optimizer=optimizer,
        splits=splits,
        evaluate=evaluate,
        metric="mean_score",
    )


def _joined(arrays: Mapping[str, Arrays]) -> Arrays:
    """Returns the arrays as one, entries `name/entry`, as long as the longest, and which rows are not repeats."""
    size = max(num_examples(one) for one in arrays.values())
    joined: dict[str, Any] = {}
    for name, one in arrays.items():
        rows = np.resize(np.arange(num_examples(one)), size)
        joined |= {f"{name}/{entry}": array for entry, array in take(one, rows).items()}
        joined[f"{name}/new"] = np.arange(size) < num_examples(one)
    return joined


def _part(arrays: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the entries of one model."""
    return {entry.removeprefix(f"{name}/"): array for entry, array in arrays.items() if entry.startswith(f"{name}/")}
