"""Aligned transfers of a scenario: by its models' channels, fitted on the target's training inputs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import merge_jax as mj
from merge_jax.study.models.model import StudyModel, inputs_of
from merge_jax.study.scenario import FitFn, StartFn
from merge_jax.transfers.weight_selection import evenly_chosen
from merge_jax.types import Adapter, Batch, ModelState, Params

__all__ = ["Alignment", "align"]

_EXAMPLES = 512  # This many inputs suffice to estimate each layer's second moments.


class Alignment(NamedTuple):
    """An aligned transfer, with functions that fit its adapter on the target's training inputs.

    Attributes:
      transfer: the transfer of channels.
      fit: its closed-form fit.
      pruned: starts the target as the source, pruned by channel magnitude.
      random_channels: starts the target like `fit`, with randomly chosen channels.
    """

    transfer: mj.Transfer
    fit: FitFn
    pruned: StartFn
    random_channels: StartFn


def align(source: StudyModel, target: StudyModel, routes: Sequence[mj.Route]) -> Alignment:
    """Returns the aligned transfer of two models that both read the target's inputs.

    Raises:
      ValueError: the target's examples lack an input of the source, or routes cannot be aligned.
    """
    examples = target.splits(0).train

    def channel_graph(model: StudyModel) -> mj.transfers.ChannelGraph:
        return mj.channel_graph(_evaluated(model), *model.shapes, *_inputs(model, examples))

    graphs = channel_graph(source), channel_graph(target)
    transfer = mj.aligned_transfer(routes, *graphs)
    apply_source, fit_transfer = _evaluated(source), transfer.fit
    assert fit_transfer is not None  # The aligned one has it.

    @jax.jit
    def fit_to(source: mj.TrainState, target_params: Params, inputs: Sequence[jax.Array]) -> Adapter:
        moments = mj.input_moments(apply_source, source.params, source.model_state, *inputs)
        return fit_transfer(moments, source.params, target_params)

    def fit(adapter: Adapter, state: mj.TrainState, target_params: Params, examples: Batch) -> Adapter:
        return fit_to(state, target_params, _inputs(source, examples))

    @partial(jax.jit, static_argnames="choice")
    def write(
        source: mj.TrainState, target_params: Params, inputs: Sequence[jax.Array], key: jax.Array | None, choice: Any
    ) -> Params:
        given = (apply_source, source.params, source.model_state, *inputs)
        moments = mj.transfers.layer_moments(*given) if inputs else None
        return mj.transfers.align(routes, *graphs, source.params, target_params, moments, choice=choice, key=key)

    def pruned(key: jax.Array, state: mj.TrainState, target: mj.TrainState, examples: Batch) -> mj.TrainState:
        del key, examples  # Only the source determines which channels are large.
        return target.replace(params=write(state, target.params, (), None, "magnitude"))

    def random_channels(key: jax.Array, state: mj.TrainState, target: mj.TrainState, examples: Batch) -> mj.TrainState:
        return target.replace(params=write(state, target.params, _inputs(source, examples), key, "random"))

    return Alignment(transfer, fit, pruned, random_channels)


def _inputs(model: StudyModel, examples: Any) -> list[np.ndarray]:
    inputs = inputs_of(examples, model.inputs)
    total = len(inputs[0])
    rows = evenly_chosen(min(_EXAMPLES, total), total)  # The set may be sorted by class.
    return [np.asarray(entry[rows]) for entry in inputs]


def _evaluated(model: StudyModel) -> Callable[..., Any]:
    """Returns the model in evaluation mode, as a function of parameters, state and inputs."""
    apply = model.apply
    assert apply is not None

    def evaluated(params: Params, model_state: ModelState, *inputs: jax.Array) -> Any:
        return apply({"params": params, **model_state}, *inputs, train=False)

    return evaluated
