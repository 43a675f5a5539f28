"""Several sources as one: models side by side that learn their tasks in one step, and share nothing."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from merge_jax.data import Arrays, Splits, num_examples, take
from merge_jax.study.scenario import Learner, Role
from merge_jax.types import Batch, ModelState, Params

__all__ = ["side_by_side"]


def side_by_side(learners: Mapping[str, Learner]) -> Learner:
    """Returns the models as one whose parameters are `{name: parameters}`, as `several_sources` takes them.

    Its loss is the sum of their losses, so that each gets its own gradient; each has its own optimizer, which clips by
    the norm of that gradient alone; its metric is the mean of theirs. An epoch is as long as the longest: examples of
    the others come again.
    """
    roles = {name: learner.role for name, learner in learners.items()}

    def init(key: jax.Array) -> tuple[Params, ModelState]:
        keys = jax.random.split(key, len(roles))
        models = {name: role.init(k) for (name, role), k in zip(roles.items(), keys, strict=True)}
        return {name: params for name, (params, _) in models.items()}, {
            name: state for name, (_, state) in models.items()
        }

    def splits(seed: int) -> Splits:
        found = {name: role.splits(seed) for name, role in roles.items()}
        return Splits(
            _joined({name: one.train for name, one in found.items()}),
            _joined({name: one.validation for name, one in found.items()}),
            _joined({name: one.test for name, one in found.items()}),
        )

    def evaluate(params: Params, model_state: ModelState, arrays: Arrays) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, role in roles.items():
            own = _part(arrays, name)
            new = own.pop("new")  # Those that came again would count twice.
            of_one = role.evaluate(params[name], model_state[name], take(own, np.flatnonzero(new)))
            metrics |= {f"{name}_{metric}": value for metric, value in of_one.items()}
        judged = [metrics[f"{name}_{role.metric}"] for name, role in roles.items()]
        return {**metrics, "mean_score": float(np.mean(judged))}

    def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> Any:
        total: Any = 0.0
        states: dict[str, ModelState] = {}
        metrics: dict[str, Any] = {}
        for (name, learner), k in zip(learners.items(), jax.random.split(key, len(learners)), strict=True):
            loss, (states[name], of_one) = learner.loss_fn(params[name], model_state[name], _part(batch, name), k)
            total += loss
            metrics |= {f"{name}_{metric}": value for metric, value in {"loss": loss, **of_one}.items()}
        return total, (states, metrics)

    name = " and ".join(role.name for role in roles.values())

    def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
        return optax.partition(
            {name: learner.optimizer(learning_rate, steps) for name, learner in learners.items()},
            {name: name for name in learners},
        )

    return Learner(Role(name, init, splits, evaluate, "mean_score"), loss_fn, optimizer)


def _joined(arrays: Mapping[str, Arrays]) -> Arrays:
    """Returns the arrays as one, entries `name/entry`, with as many rows as the longest, and what of them is new."""
    size = max(num_examples(one) for one in arrays.values())
    joined: dict[str, Any] = {}
    for name, one in arrays.items():
        rows = np.resize(np.arange(num_examples(one)), size)
        joined |= {f"{name}/{entry}": array for entry, array in take(one, rows).items()}
        joined[f"{name}/new"] = np.arange(size) < num_examples(one)
    return joined


def _part(arrays: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns what is of one model."""
    return {entry.removeprefix(f"{name}/"): array for entry, array in arrays.items() if entry.startswith(f"{name}/")}
