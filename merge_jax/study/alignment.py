"""Aligned transfers of a scenario: by the channels of its models, fitted on the target's training inputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import merge_jax as mj
from merge_jax.checks import check_entries
from merge_jax.study.pools import inputs_of
from merge_jax.study.scenario import FitFn, StudyModel
from merge_jax.transfers.weight_selection import evenly_chosen
from merge_jax.types import Adapter, Batch, ModelState, Params

__all__ = ["Alignment", "align"]

_EXAMPLES = 512  # What enters a layer at each place of so many inputs is enough for its moments.


class Alignment(NamedTuple):
    """An aligned transfer, and what fits its adapter to what the target's training inputs are to the source."""

    transfer: mj.Transfer
    fit: FitFn


def align(source: StudyModel, target: StudyModel, routes: Sequence[mj.Route]) -> Alignment:
    """Returns the aligned transfer of two models that both read the target's inputs.

    Raises:
      ValueError: the target's examples lack an input of the source, or routes that cannot be aligned.
    """
    examples = target.splits(0).train

    def channel_graph(model: StudyModel) -> mj.transfers.ChannelGraph:
        params, model_state = jax.eval_shape(model.init, jax.random.key(0))
        return mj.channel_graph(_evaluated(model), params, model_state, *_inputs(model, examples))

    transfer = mj.aligned_transfer(routes, channel_graph(source), channel_graph(target))
    apply_source, fit_transfer = _evaluated(source), transfer.fit
    assert fit_transfer is not None  # The aligned one has it.

    @jax.jit
    def fit_to(source: mj.TrainState, target_params: Params, inputs: Sequence[jax.Array]) -> Adapter:
        moments = mj.input_moments(apply_source, source.params, source.model_state, *inputs)
        return fit_transfer(moments, source.params, target_params)

    def fit(adapter: Adapter, state: mj.TrainState, target_params: Params, examples: Batch) -> Adapter:
        return fit_to(state, target_params, _inputs(source, examples))

    return Alignment(transfer, fit)


def _inputs(model: StudyModel, examples: Any) -> list[np.ndarray]:
    check_entries(examples, *model.inputs)
    inputs = inputs_of(examples, model.inputs)
    total = len(inputs[0])
    rows = evenly_chosen(min(_EXAMPLES, total), total)  # Of a set that may be sorted by class.
    return [np.asarray(entry[rows]) for entry in inputs]


def _evaluated(model: StudyModel) -> Callable[..., Any]:
    """Returns the model in evaluation mode, as a function of parameters, state and inputs."""
    apply = model.apply
    assert apply is not None

    def evaluated(params: Params, model_state: ModelState, *inputs: jax.Array) -> Any:
        return apply({"params": params, **model_state}, *inputs, train=False)

    return evaluated
