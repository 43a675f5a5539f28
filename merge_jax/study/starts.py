"""Starts of a target from the source and unlabelled inputs: the refit and similar methods."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from merge_jax.objectives.features import can_be_averaged
from merge_jax.study.models.model import StudyModel, inputs_of
from merge_jax.study.options import TransferOptions
from merge_jax.study.scenario import StartFn
from merge_jax.transfers.alignment.fit import ChannelChoice
from merge_jax.transfers.fitted.routes import routes_with_state
from merge_jax.types import Batch, ModelApply

__all__ = ["once_a_seed", "prepare_start", "refit_start"]

_MOST = 2000  # More inputs cost time and memory, without visible effect on digits.
_MIXED_UP_TO = 1000
_LARGEST_WEIGHT = 0.9


def refit_start(
    source: StudyModel, target: StudyModel, routes: Sequence[mj.Route], *, choice: ChannelChoice = "moments"
) -> StartFn:
    """Returns the start that refits a target of the source's family, see `merge_jax.refit`.

    It uses at most 2,000 random inputs. If there are fewer than 1,000 images, weighted means of two (weights 0.5 to
    0.9) are added: with few images, most of the source's information lies between them. Our choice.
    """
    source_apply, target_apply = _applies("refit", source, target)
    shapes = _shapes(source), _shapes(target)
    routes_with_state(routes, *shapes)  # Refuse now, not when the first seed starts.

    @jax.jit
    def run(source_variables: Any, target_variables: Any, inputs: list[jax.Array], key: jax.Array) -> Any:
        made = mj.refit(
            routes, source_apply, target_apply, source_variables, target_variables, *inputs, key=key, choice=choice
        )
        return made.variables

    def start(key: jax.Array, state: mj.TrainState, begun: mj.TrainState, examples: Batch) -> mj.TrainState:
        draw_key, key = jax.random.split(key)
        inputs = _with_means(draw_key, _drawn(draw_key, target, examples))
        return _trained(run(_variables(state), _variables(begun), inputs, key))

    return start


def once_a_seed(start: StartFn) -> StartFn:
    """Returns the start that keeps its last target, for all methods of a seed that begin from it.

    The target is on the host: a training may overwrite the arrays that it begins with.
    """
    last: tuple[mj.TrainState, jax.Array, mj.TrainState] | None = None

    def kept(key: jax.Array, state: mj.TrainState, begun: mj.TrainState, examples: Batch) -> mj.TrainState:
        nonlocal last
        if last is None or last[0] is not state or not jnp.array_equal(last[1], key):
            last = state, key, jax.device_get(start(key, state, begun, examples))
        return last[2]

    return kept


def prepare_start(
    options: TransferOptions,
    source: StudyModel,
    target: StudyModel,
    routes: Sequence[mj.Route],
    *,
    objective: Any = mj.objectives.disagreement,
    axis_name: str | None = None,
) -> StartFn:
    """Returns the start that trains the target's features toward the source's, see `merge_jax.prepare`.

    It uses all of its inputs, and the same `compare_on` as agreement. `axis_name` is the axis that the models average
    over under `pmap`, if any.
    """
    del routes  # Features need no labels.
    source_apply, target_apply = _applies("prepare", source, target)
    if not options.agree:
        raise ValueError("a method with prepare needs layers: --agree target=source, such as stage1_0=stage1_0")
    compare_on = mj.objectives.mixed if options.compare_on == "mixed" else None

    def start(key: jax.Array, state: mj.TrainState, begun: mj.TrainState, examples: Batch) -> mj.TrainState:
        made = mj.prepare(
            key,
            options.agreeing_layers(),
            source_apply,
            target_apply,
            _variables(state),
            _variables(begun),
            *_inputs(target, examples),
            steps=options.prepare_steps,
            learning_rate=options.prepare_rate,
            objective=objective,
            compare_on=compare_on,
            axis_name=axis_name,
        )
        return _trained(made)

    return start


def _applies(name: str, source: StudyModel, target: StudyModel) -> tuple[ModelApply, ModelApply]:
    if source.apply is None or target.apply is None or source.inputs != target.inputs:
        raise ValueError(f"a method with {name} needs a source and a target that read the same inputs, each one model")
    return source.apply, target.apply


def _variables(state: mj.TrainState) -> dict[str, Any]:
    return {"params": state.params, **state.model_state}


def _shapes(model: StudyModel) -> dict[str, Any]:
    params, model_state = model.shapes
    return {"params": params, **model_state}


def _trained(variables: dict[str, Any]) -> mj.TrainState:
    return mj.TrainState(variables["params"], {name: v for name, v in variables.items() if name != "params"}, None)


def _inputs(model: StudyModel, examples: Batch) -> list[np.ndarray]:
    return [np.asarray(entry) for entry in inputs_of(examples, model.inputs)]


def _drawn(key: jax.Array, model: StudyModel, examples: Batch) -> list[jax.Array]:
    inputs = _inputs(model, examples)
    rows = np.asarray(jax.random.permutation(key, len(inputs[0])))[:_MOST]
    return [jnp.asarray(one[rows]) for one in inputs]


def _with_means(key: jax.Array, inputs: list[jax.Array]) -> list[jax.Array]:
    """Returns images with weighted means of two, up to a number; tokens cannot be averaged, and stay unchanged."""
    count = len(inputs[0])
    if count >= _MIXED_UP_TO or not all(map(can_be_averaged, inputs)):
        return inputs
    keys = jax.random.split(key, 3)
    rows, others = (jax.random.randint(one, (_MIXED_UP_TO - count,), 0, count) for one in keys[:2])
    weights = jax.random.uniform(keys[2], rows.shape, minval=0.5, maxval=_LARGEST_WEIGHT)

    def mix(images: jax.Array) -> jax.Array:
        images = images.astype(jnp.float32)
        weight = weights.reshape(-1, *(1,) * (images.ndim - 1))
        return jnp.concatenate([images, weight * images[rows] + (1 - weight) * images[others]])

    return [mix(one) for one in inputs]
