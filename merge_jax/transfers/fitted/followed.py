"""A traced model for the refit."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from merge_jax.transfers.channels.axes import ChannelGraph
from merge_jax.transfers.channels.layer_sites import Layer, Unsolvable, find_layer
from merge_jax.transfers.channels.trace import ChannelTrace

__all__ = ["FollowedModel"]


@dataclass(frozen=True, eq=False)
class FollowedModel:
    """A traced model: the trace, and its channel graph."""

    trace: ChannelTrace
    graph: ChannelGraph

    def layer(self, path: str) -> Layer:
        """Returns the layer of a leaf, cached.

        Raises:
          Unsolvable: as `find_layer`.
        """
        if path not in self._layers:
            try:
                self._layers[path] = find_layer(self.trace.program, path)
            except Unsolvable as reason:
                self._layers[path] = str(reason)
        found = self._layers[path]
        if isinstance(found, str):
            raise Unsolvable(found)
        return found

    @functools.cached_property
    def _layers(self) -> dict[str, Layer | str]:
        return {}

    @functools.cached_property
    def channel_axes(self) -> dict[str, dict[int, list[int]]]:
        """`{channel group: {value: its axes of these channels, including merged ones}}`, for values that have any."""
        found: dict[str, dict[int, list[int]]] = {}
        for value, nodes in self.trace.nodes.items():
            for axis, node in enumerate(nodes):
                for group in {self.trace.channel_group(one) for one in (node, *self.trace.atoms(node))} - {""}:
                    found.setdefault(group, {}).setdefault(value, []).append(axis)
        return found

    def examples(self, value: int) -> int | None:
        """Returns the example axis of a value; None if it is ambiguous."""
        examples = [self.trace.nodes[one][0] for one in self.trace.program.inputs]
        found = [
            axis
            for axis, node in enumerate(self.trace.nodes[value])
            if any(self.trace.same_axis(node, one) for one in examples)
        ]
        return found[0] if len(found) == 1 else None

    def places(self, value: int, groups: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shape of a value with merged axes of these channel groups split, and the axis of each group.

        Raises:
          Unsolvable: a group with no axis, or several.
        """
        sizes, names = [], []
        for node, size in zip(self.trace.nodes[value], self.trace.program.shapes[value].shape, strict=True):
            atoms = self.trace.atoms(node)
            own = [self.trace.channel_group(atom) for atom in atoms]
            if len(atoms) > 1 and not set(groups).isdisjoint(own):
                sizes += self.trace.sizes(atoms)
                names += own
            else:
                sizes.append(size)
                names.append(self.trace.channel_group(node))
        if any(names.count(group) != 1 for group in groups):
            raise Unsolvable("its channels cannot be distinguished from other axes where it ends")
        return tuple(sizes), tuple(names.index(group) for group in groups)

    def whole_axes(self, value: int, groups: Sequence[str]) -> set[int]:
        """Returns the axes of a value that belong only to these channel groups."""
        nodes = enumerate(self.trace.nodes[value])
        return {axis for axis, node in nodes
                if {self.trace.channel_group(atom) for atom in self.trace.atoms(node)} <= {*groups}}  # fmt: skip
