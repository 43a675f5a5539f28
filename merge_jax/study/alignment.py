"""Aligned transfers of an experiment: by the channels of both models, fitted on the target's training inputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import merge_jax as mj
from merge_jax.data import num_examples
from merge_jax.study.scenario import FitFn, Learner, Reader, Role
from merge_jax.transfers.weight_selection import evenly_chosen
from merge_jax.types import Adapter, Batch, ModelState, Params

__all__ = ["Alignment"]

_EXAMPLES = 512  # What enters a layer at each place of so many inputs is enough for its moments.


class Alignment(NamedTuple):
    """Two models whose channels can be aligned, since both read the target's inputs.

    Attributes:
      source: the role that gives, and how it reads.
      target: the role that receives.
    """

    source: tuple[Role, Reader]
    target: tuple[Role, Reader]

    @classmethod
    def of(cls, source: Learner, target: Learner) -> "Alignment | None":
        """Returns the alignment of two learners; None where one of them cannot be looked into."""
        if source.reader is None or target.reader is None:
            return None
        return cls((source.role, source.reader), (target.role, target.reader))

    def transfer(self, routes: Sequence[mj.Route]) -> mj.Transfer:
        """Returns the aligned transfer of those routes."""
        return mj.aligned_transfer(routes, self._channel_graph(*self.source), self._channel_graph(*self.target))

    def first(self, transfer: mj.Transfer) -> mj.Transfer:
        """Returns the transfer that writes at the first step alone."""
        return mj.scheduled(transfer, optax.piecewise_constant_schedule(1.0, {1: 0.0}))

    def fit(self, transfer: mj.Transfer, place: Callable[[Adapter, Adapter], Adapter] | None = None) -> FitFn:
        """Returns what makes the adapter: fitted to what the target's training inputs are to the source.

        Args:
          transfer: the aligned one.
          place: `(whole adapter, fitted part) -> whole adapter`, where it is part of another transfer.
        """
        source_model, transfer_fit = _reading(self.source[1]), transfer.fit
        assert transfer_fit is not None  # The aligned one has it.

        @jax.jit
        def fit(source: mj.TrainState, target_params: Params, inputs: Sequence[jax.Array]) -> Adapter:
            moments = mj.input_moments(source_model, source.params, source.model_state, *inputs)
            return transfer_fit(moments, source.params, target_params)

        def fitted(adapter: Adapter, source: mj.TrainState, target_params: Params, examples: Batch) -> Adapter:
            found = fit(source, target_params, self._inputs(self.source[1], examples))
            return found if place is None else place(adapter, found)

        return fitted

    def _channel_graph(self, role: Role, reader: Reader) -> mj.ChannelGraph:
        params, model_state = jax.eval_shape(role.init, jax.random.key(0))
        inputs = self._inputs(reader, self.target[0].splits(0).train)
        return mj.channel_graph(_reading(reader), params, model_state, *inputs)

    def _inputs(self, reader: Reader, examples: Any) -> list[np.ndarray]:
        total = num_examples(examples)
        rows = evenly_chosen(min(_EXAMPLES, total), total)  # Of a set that may be sorted by class.
        return [np.asarray(examples[name][rows]) for name in reader.inputs]


def _reading(reader: Reader) -> Callable[..., Any]:
    def read(params: Params, model_state: ModelState, *inputs: jax.Array) -> Any:
        return reader.apply({"params": params, **model_state}, *inputs, train=False)

    return read
