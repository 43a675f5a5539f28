"""Which axes of a model's leaves are the same channels: axes are nodes, and what is tied has one root."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from merge_jax.paths import flatten, near_misses
from merge_jax.types import Params

__all__ = ["AxisNodes", "ChannelGraph"]


@dataclass(frozen=True)
class ChannelGraph:
    """Which axes of a model's leaves are the same channels; other tools call it the dependency graph.

    Attributes:
      channel_groups: `{leaf path: name of the channel group of each of its axes}`. Axes of one group are tied: to
        permute the channels of the group is to permute all of them alike. A group is named after the first of its
        axes, such as `stage1_0/conv1/kernel:3`.
      inputs: `{leaf path: axes that are only summed over with what enters the layer}`; the other axes make channels.
      both: `{leaf path: axes that make channels in one place and are summed over in another}`, as in an embedding
        that is the last layer too.
      consumed: channel groups that are summed over anywhere, by a layer or, as in attention, with other channels.
      hidden: channel groups that layers of the model both make and consume. The others are bound to what is outside of
        it: tokens that are looked up, inputs that a layer reads, labels.
      within: `{channel group: the group around it}` of hidden groups that are only met inside of one channel of
        another, as the channels of an attention are in its heads. Those of one head may change places without those of
        the next.
    """

    channel_groups: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    both: Mapping[str, tuple[int, ...]]
    consumed: frozenset[str]
    hidden: frozenset[str]
    within: Mapping[str, str]

    def leaf_groups(self, path: str) -> tuple[str, ...]:
        """Returns the channel groups of a leaf.

        Raises:
          ValueError: there is no such leaf.
        """
        if path not in self.channel_groups:
            raise ValueError(
                f"the channel graph is of a model without a leaf {path!r}; {near_misses(path, self.channel_groups)}"
            )
        return self.channel_groups[path]

    def summed_axes(self, path: str) -> tuple[int, ...]:
        """Returns the axes of a leaf that are summed over anywhere, in their order."""
        return tuple(sorted((*self.inputs[path], *self.both[path])))


class AxisNodes:
    """The axes of leaves and of values as nodes, what ties them, and what is known of them."""

    def __init__(self, params: Params):  # noqa: D107
        self._parents: list[int] = []
        self._consumed: set[int] = set()
        self._made: set[int] = set()
        self._touched: set[int] = set()  # Of leaves that are used where they cannot be followed.
        self._inputs: set[int] = set()
        self._bound: set[int] = set()  # Of leaves that are looked up, or sum over what comes from outside.
        self._summed: dict[str, set[int]] = {}
        # Of each sum over a node: the nodes that are summed over or matched along with it.
        self._beside: list[tuple[int, tuple[int, ...]]] = []
        self._carried: list[tuple[int, ...]] = []
        self._lost: list[tuple[str, int]] = []
        self._parts: dict[int, tuple[int, ...]] = {}  # Of an axis that is made of lost ones of a leaf: those.
        self._leaves = {path: self._fresh(len(np.shape(leaf))) for path, leaf in flatten(params).items()}
        self._leaf_axes = {
            node: (path, axis) for path, nodes in self._leaves.items() for axis, node in enumerate(nodes)
        }
        self._names: dict[int, str] = {}

    def graph(self) -> ChannelGraph:
        """Returns what is tied, and names its channel groups."""
        channel_groups = {}
        for path, nodes in self._leaves.items():
            roots = [self._root(node) for node in nodes]
            channel_groups[path] = tuple(
                self._names.setdefault(root, f"{path}:{axis}") for axis, root in enumerate(roots)
            )
        inputs, both = {}, {}
        for path, nodes in self._leaves.items():
            summed = sorted(self._summed.get(path, ()))
            inputs[path] = tuple(axis for axis in summed if nodes[axis] not in self._made)
            both[path] = tuple(axis for axis in summed if nodes[axis] in self._made)
        consumed, made, bound = (self._groups(nodes) for nodes in (self._consumed, self._made, self._bound))
        hidden = frozenset((consumed & made) - bound)
        return ChannelGraph(channel_groups, inputs, both, frozenset(consumed), hidden, self._within(hidden))

    def channel_group(self, node: int) -> str:
        """Returns the name of a node's channel group once the graph is known; empty where no leaf has it."""
        return self._names.get(self._root(node), "")

    def same_axis(self, node: int, other: int) -> bool:
        """Returns whether the axes of two nodes are tied."""
        return self._root(node) == self._root(other)

    def check(self) -> None:
        """Raises ValueError where channels that leaves make, or leaves themselves, were lost."""
        places: dict[int, tuple[str, int]] = {}
        for node in sorted(self._made | self._touched):
            places.setdefault(self._root(node), self._leaf_axes[node])
        for operation, node in self._lost:
            if (place := places.get(self._root(node))) is not None:
                raise ValueError(
                    f"the operation {operation!r} cannot be followed: channels of {place[0]!r}, along its axis "
                    f"{place[1]}, go into it, and which leaves read them afterwards is not known. Give a function "
                    "without it: a convolution that is flattened can be averaged over its places. Or give "
                    "channel_graph strict=False, by which the axes before and behind it come apart: aligned_transfer "
                    "then takes them as they are where sizes are equal, and refuses them elsewhere"
                )

    def _root(self, node: int) -> int:
        while self._parents[node] != node:
            self._parents[node] = node = self._parents[self._parents[node]]
        return node

    def _groups(self, nodes: Iterable[int]) -> set[str]:
        return {self.channel_group(node) for node in nodes} - {""}

    def _within(self, hidden: frozenset[str]) -> dict[str, str]:
        """Returns the channel group around each one: every value with a channel of one has one of the other."""
        around: dict[str, set[str]] = {}
        for nodes in self._carried:
            counts = Counter(map(self.channel_group, nodes))
            beside = {group for group, count in counts.items() if count == 1 and group in hidden}
            for group in counts.keys() & hidden:
                around[group] = around.get(group, beside) & (beside - {group})
        for node, others in self._beside:
            group = self.channel_group(node)
            if group in around:
                around[group] &= self._groups(others)
        # Where several are around, as with heads of groups, none is: their channels are taken alike. Of two that are
        # only met together, the first is around the other.
        single = {group: min(others) for group, others in around.items() if len(others) == 1}
        return {group: other for group, other in single.items() if single.get(other) != group or other < group}

    def _fresh(self, count: int) -> tuple[int, ...]:
        first = len(self._parents)
        self._parents += range(first, first + count)
        return tuple(range(first, first + count))

    def _tie(self, node: int, other: int) -> None:
        # The older one stands for both, so that channel groups are named in the order of the leaves.
        older, newer = sorted((self._root(node), self._root(other)))
        self._parents[newer] = older

    def _tied(self, node: int, from_leaves: bool = False) -> int:
        """Returns a new node that is tied to one, an axis of another value; that one itself where all is of leaves."""
        if from_leaves:
            return node
        (fresh,) = self._fresh(1)
        self._tie(node, fresh)
        return fresh

    def _make(self, node: int) -> None:
        """Notes that channels are made along an axis, where it is of a leaf."""
        if node in self._leaf_axes:
            self._made.add(node)
        self._touch(self._parts.get(node, ()))

    def _touch(self, nodes: Iterable[int]) -> None:
        self._touched.update(node for node in nodes if node in self._leaf_axes)

    def _cut(self, nodes: Iterable[int], lost: Iterable[int]) -> None:
        """Notes that axes of something made of leaves are what became of axes that were lost."""
        parts = tuple(part for node in lost for part in (node, *self._parts.get(node, ())))
        if parts:
            self._parts |= dict.fromkeys(nodes, parts)

    def _lose(self, operation: str, nodes: Iterable[int]) -> None:
        self._lost += [(operation, node) for node in nodes]
