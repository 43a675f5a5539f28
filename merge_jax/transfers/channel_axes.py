"""Which axes of a model's leaves are the same channels: axes are nodes, and what is tied has one root."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from merge_jax.paths import near_misses
from merge_jax.transfers.merged_axes import Factors, TiedAxes, apart_axes

__all__ = ["AxisNodes", "ChannelGraph"]

_LOOP = "Give a function without the loop: a Python loop over layers or steps, each with leaves of its own"
_PARTS = "Give a function whose parts have a common size, such as 32 and 64 channels, or that adds them"
_INSTEAD = {
    **dict.fromkeys(("scan", "while"), _LOOP),
    **dict.fromkeys(("concatenate", "split", "slice"), _PARTS),
    "conv_general_dilated in groups": "Give a function with convolutions of one group, or of one channel in each",
}
"""What to do about an operation that cannot be followed."""


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
      factors: `{leaf path: for each axis the sizes of those that it is merged from}`, of the leaves that have channels
        in a merged axis: `((4, 4, 16), (10,))` of a dense kernel `[256, 10]` that reads flattened maps. Everything
        here is of such a leaf with these axes apart, `[4, 4, 16, 10]`.
    """

    channel_groups: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    both: Mapping[str, tuple[int, ...]]
    consumed: frozenset[str]
    hidden: frozenset[str]
    within: Mapping[str, str]
    factors: Mapping[str, Factors] = field(default_factory=dict)

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

    def moment_axes(self, path: str) -> tuple[int, ...]:
        """Returns the axes of a leaf that `input_moments` has: of flattened maps those of channels, not of places."""
        summed, groups = self.summed_axes(path), self.channel_groups[path]
        channels = tuple(axis for axis in summed if groups[axis] in self.hidden)
        return channels if path in self.factors and channels else summed


class AxisNodes(TiedAxes):
    """The axes of leaves and of values as nodes, what ties them, and what is known of them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], factors: Mapping[str, Factors]):
        """Takes the shapes of the leaves, those with merged axes in the shapes that have these apart."""
        super().__init__()
        self._consumed: set[int] = set()
        self._made: set[int] = set()
        self._touched: set[int] = set()  # Of leaves that are used where they cannot be followed.
        # Of leaves that are looked up or sum over what comes from outside, and of constants.
        self._bound: set[int] = set()
        self._hidden: set[int] = set()
        self._summed: dict[str, set[int]] = {}
        # Of each sum over a node: the nodes that are summed over or matched along with it.
        self._beside: list[tuple[int, tuple[int, ...]]] = []
        self._carried: list[tuple[int, ...]] = []
        self._lost: list[tuple[str, int]] = []
        self._parts: dict[int, tuple[int, ...]] = {}  # Of an axis that is made of lost ones of a leaf: those.
        self._origins: dict[int, int] = {}  # Of what a model has split an axis of a leaf into: that.
        self._leaf_factors = factors
        self._leaves = {path: self._fresh(shape) for path, shape in shapes.items()}
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
        consumed, made, bound = (self._roots(nodes) for nodes in (self._consumed, self._made, self._bound))
        # Of a merged axis that is one group, its factors may be hidden, and then it is to come apart.
        self._hidden = {root for root in (consumed & made) - bound if len(self.atoms(root)) == 1}
        hidden = frozenset(self._names[root] for root in self._hidden if root in self._names)
        groups = frozenset(self._groups(self._consumed))
        return ChannelGraph(channel_groups, inputs, both, groups, hidden, self._within(hidden), self._leaf_factors)

    def merged(self) -> dict[str, Factors]:
        """Returns the factors of the leaves with hidden channels in axes that are merged, once the graph is known."""
        found = {}
        for path, nodes in self._leaves.items():
            atoms = [self.atoms(node) for node in nodes]
            apart = [len(own) > 1 and not self._hidden.isdisjoint(map(self._root, own)) for own in atoms]
            if any(apart):
                found[path] = tuple(
                    tuple(self._sizes[one] for one in (own if split else (node,)))
                    for node, own, split in zip(nodes, atoms, apart, strict=True)
                )
        return found

    def channel_group(self, node: int) -> str:
        """Returns the name of a node's channel group once the graph is known; empty where no leaf has it."""
        return self._names.get(self._root(node), "")

    def check(self) -> None:
        """Raises ValueError where channels that leaves make, or leaves themselves, were lost."""
        places: dict[int, tuple[str, int]] = {}
        for node in sorted(self._made | self._touched):
            for one in (node, *self.atoms(node)):
                places.setdefault(self._root(one), self._leaf_axes[node])
        lost = [(operation, one) for operation, node in self._lost for one in (node, *self.atoms(node))]
        for operation, node in [*lost, *(("reshape", node) for node in self._conflicts)]:
            place = places.get(self._root(node))
            if place is not None and not self._is_place(*place):
                raise ValueError(
                    f"the operation {operation!r} cannot be followed: its input has the channels of {place[0]!r}, "
                    f"along axis {place[1]}, and it is unknown which leaves read them afterwards. "
                    f"{_INSTEAD.get(operation, 'Give a function without it')}. Or pass strict=False to channel_graph, "
                    "which separates the axes before and after it: aligned_transfer then copies them unchanged if "
                    "their sizes are equal, and refuses them otherwise"
                )

    def _is_place(self, path: str, axis: int) -> bool:
        """Returns whether an axis of a leaf has no free channels, by what it is merged with: it is taken as it is."""
        nodes = self._leaves[path]
        parts = self._roots(self.atoms(nodes[axis]))
        if len(parts) > 1 and parts.isdisjoint(self._hidden) and not parts.isdisjoint(self._roots(self._bound)):
            return True
        for axes in apart_axes(self._leaf_factors.get(path, ())):
            if axis in axes:
                others = {self._root(nodes[one]) for one in axes}
                return self._root(nodes[axis]) not in self._hidden and not others.isdisjoint(self._hidden)
        return False

    def _roots(self, nodes: Iterable[int]) -> set[int]:
        return {self._root(one) for node in nodes for one in (node, *self.atoms(node))}

    def _groups(self, nodes: Iterable[int]) -> set[str]:
        return {self._names.get(root, "") for root in self._roots(nodes)} - {""}

    def _within(self, hidden: frozenset[str]) -> dict[str, str]:
        """Returns the channel group around each one: every value with a channel of one has one of the other."""
        around: dict[str, set[str]] = {}
        for nodes in self._carried:
            counts = Counter(self.channel_group(one) for node in nodes for one in self.atoms(node))
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

    def _make(self, node: int) -> None:
        """Notes that channels are made along an axis, where it is of a leaf."""
        for one in (node, *self.atoms(node)):
            self._made.update({one, self._origins.get(one, one)} & self._leaf_axes.keys())
        self._touch(self._parts.get(node, ()))

    def _is_leaf(self, node: int) -> bool:
        """Returns whether an axis is one of a leaf, or merged from such."""
        return node in self._leaf_axes or all(atom in self._leaf_axes for atom in self.atoms(node))

    def _touch(self, nodes: Iterable[int]) -> None:
        self._touched.update(one for node in nodes for one in (node, *self.atoms(node)) if one in self._leaf_axes)

    def _cut(self, nodes: Iterable[int], lost: Iterable[int]) -> None:
        """Notes that axes of something made of leaves are what became of axes that were lost."""
        parts = tuple(part for node in lost for part in (node, *self._parts.get(node, ())))
        if parts:
            self._parts |= dict.fromkeys(nodes, parts)

    def _lose(self, operation: str, nodes: Iterable[int]) -> None:
        self._lost += [(operation, node) for node in nodes]
