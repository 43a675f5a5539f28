"""A model whose computation was followed, as the refit walks it."""

from collections.abc import Sequence
from typing import NamedTuple

from merge_jax.transfers.channel_axes import ChannelGraph
from merge_jax.transfers.channel_trace import ChannelTrace
from merge_jax.transfers.layer_sites import Unsolvable

__all__ = ["FollowedModel"]


class FollowedModel(NamedTuple):
    """A model whose computation was followed: the trace, and its channel graph."""

    trace: ChannelTrace
    graph: ChannelGraph

    def examples(self, value: int) -> int | None:
        """Returns the axis of a value along which the examples lie; None where it cannot be told."""
        examples = [self.trace.nodes[one][0] for one in self.trace.program.inputs]
        found = [
            axis
            for axis, node in enumerate(self.trace.nodes[value])
            if any(self.trace.same_axis(node, one) for one in examples)
        ]
        return found[0] if len(found) == 1 else None

    def places(self, value: int, groups: Sequence[str]) -> tuple[int, ...]:
        """Returns the axes of a value that are of these channel groups, one each.

        Raises:
          Unsolvable: a group that no axis has, or several.
        """
        found = [self.trace.channel_group(node) for node in self.trace.nodes[value]]
        if any(found.count(group) != 1 for group in groups):
            raise Unsolvable("its channels cannot be told from other axes where it ends")
        return tuple(found.index(group) for group in groups)
