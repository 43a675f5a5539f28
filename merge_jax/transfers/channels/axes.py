"""Channel groups of a model's leaves: axes are nodes of a union-find, and tied axes have one root."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from merge_jax.layouts import MatrixSpec
from merge_jax.paths import near_misses
from merge_jax.transfers.channels.merged_axes import Factors, TiedAxes, apart_axes

__all__ = ["AxisNodes", "ChannelGraph"]

_LOOP = "Give a function without the loop: a Python loop over layers or steps, each with leaves of its own"
_PARTS = "Give a function whose parts have a common size, such as 32 and 64 channels, or that adds them"
_INSTEAD = {
    **dict.fromkeys(("scan", "while"), _LOOP),
    **dict.fromkeys(("concatenate", "split", "slice"), _PARTS),
    "conv_general_dilated in groups": "Give a function with convolutions of one group, or of one channel in each",
}
"""How to handle an operation that cannot be followed."""


@dataclass(frozen=True)
class ChannelGraph:
    """The channel groups of a model: axes of leaves that share channels; other tools call it the dependency graph.

    Attributes:
      channel_groups: `{leaf path: name of the channel group of each of its axes}`. Axes of one group are tied: a
        permutation of the group's channels permutes all of them alike. A group is named after the first of its axes,
        such as `stage1_0/conv1/kernel:3`.
      inputs: `{leaf path: axes that are only contracted with the layer's inputs}`; the other axes produce channels.
      both: `{leaf path: axes that produce channels in one place and are contracted in another}`, as in an embedding
        that is also the last layer.
      consumed: channel groups that are contracted anywhere, by a layer or, as in attention, with other channels.
      hidden: channel groups that layers of the model both produce and consume. The others have a meaning outside it:
        tokens that are looked up, inputs that a layer reads, labels.
      within: `{channel group: enclosing group}` for hidden groups that occur only inside one channel of another, such
        as the channels of an attention in its heads. Channels of one head can be permuted independently of the others.
      factors: `{leaf path: for each axis the sizes of those that it is merged from}`, for leaves with channels in a
        merged axis: `((4, 4, 16), (10,))` for a dense kernel `[256, 10]` that reads flattened maps. All other
        attributes describe such a leaf with split axes, `[4, 4, 16, 10]`.
      windows: `{leaf path: axes of the window}`, for kernels of convolutions.
    """

    channel_groups: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    both: Mapping[str, tuple[int, ...]]
    consumed: frozenset[str]
    hidden: frozenset[str]
    within: Mapping[str, str]
    factors: Mapping[str, Factors] = field(default_factory=dict)
    windows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

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

    def layout(self, path: str, shape: tuple[int, ...]) -> MatrixSpec:
        """Returns which axes of a leaf of this shape are channels (as rows), and which the window of a convolution.

        Raises:
          ValueError: there is no such leaf.
        """
        self.leaf_groups(path)
        places = apart_axes(self.factors.get(path, tuple((size,) for size in shape)))
        window = tuple(axis for axis, own in enumerate(places) if {*own} <= {*self.windows.get(path, ())})
        return MatrixSpec(tuple(axis for axis in range(len(shape)) if axis not in window), (), window)

    def summed_axes(self, path: str) -> tuple[int, ...]:
        """Returns the axes of a leaf that are contracted anywhere, in order."""
        return tuple(sorted((*self.inputs[path], *self.both[path])))

    def moment_axes(self, path: str) -> tuple[int, ...]:
        """Returns the axes of a leaf in `input_moments`: for flattened maps, those of channels, not of positions."""
        summed, groups = self.summed_axes(path), self.channel_groups[path]
        channels = tuple(axis for axis in summed if groups[axis] in self.hidden)
        return channels if path in self.factors and channels else summed


class AxisNodes(TiedAxes):
    """The axes of leaves and values as nodes, their ties, and their known properties."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], factors: Mapping[str, Factors]):
        """Takes the shapes of the leaves, with merged axes split."""
        super().__init__()
        self._consumed: set[int] = set()
        self._made: set[int] = set()
        self._touched: set[int] = set()  # Axes of leaves used in operations that cannot be followed.
        # Axes of leaves that are looked up or contracted with model inputs, and of constants.
        self._bound: set[int] = set()
        self._hidden: set[int] = set()
        self._windows: set[int] = set()  # Axes of kernels that convolutions slide.
        self._summed: dict[str, set[int]] = {}
        # For each sum over a node: the nodes contracted or matched along with it.
        self._beside: list[tuple[int, tuple[int, ...]]] = []
        self._carried: list[tuple[int, ...]] = []
        self._lost: list[tuple[str, int]] = []
        self._parts: dict[int, tuple[int, ...]] = {}  # Axis made of lost axes of a leaf -> those axes.
        self._origins: dict[int, int] = {}  # Factor of a split axis of a leaf -> that axis.
        self._leaf_factors = factors
        self._leaves = {path: self._fresh(shape) for path, shape in shapes.items()}
        self._leaf_axes = {
            node: (path, axis) for path, nodes in self._leaves.items() for axis, node in enumerate(nodes)
        }
        self._names: dict[int, str] = {}

    def graph(self) -> ChannelGraph:
        """Returns the graph of tied axes, with named channel groups."""
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
        # If a merged axis is one group, its factors may be hidden; then it must be split.
        self._hidden = {root for root in (consumed & made) - bound if len(self.atoms(root)) == 1}
        hidden = frozenset(self._names[root] for root in self._hidden if root in self._names)
        groups = frozenset(self._groups(self._consumed))
        found = {path: tuple(axis for axis, node in enumerate(nodes) if node in self._windows)
                 for path, nodes in self._leaves.items()}  # fmt: skip
        windows = {path: axes for path, axes in found.items() if axes}
        within = self._within(hidden)
        return ChannelGraph(channel_groups, inputs, both, groups, hidden, within, self._leaf_factors, windows)

    def merged(self) -> dict[str, Factors]:
        """Returns the factors of leaves with hidden channels in merged axes, once the graph is known."""
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
        """Returns the name of a node's channel group once the graph is known; empty if no leaf has it."""
        return self._names.get(self._root(node), "")

    def check(self) -> None:
        """Raises ValueError if channels that leaves produce, or leaves themselves, were lost."""
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
                    f"{_INSTEAD.get(operation, 'Give a function without it')}. For aligned_transfer alone, not for a "
                    "refit, you may pass strict=False to channel_graph: it separates the axes before and after the "
                    "operation, which are copied unchanged if their sizes are equal, and refused otherwise"
                )

    def _is_place(self, path: str, axis: int) -> bool:
        """Returns whether axes merged with an axis of a leaf leave it no free channels, so that it is paired as is."""
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
        """Returns each group's enclosing group: all values with a channel of one have one of the other."""
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
        # If several groups enclose one, as with heads of groups, none counts: their channels are chosen alike. Of two
        # groups that only occur together, the first encloses the other.
        single = {group: min(others) for group, others in around.items() if len(others) == 1}
        return {group: other for group, other in single.items() if single.get(other) != group or other < group}

    def _make(self, node: int) -> None:
        """Records that an axis, if it belongs to a leaf, produces channels."""
        for one in (node, *self.atoms(node)):
            self._made.update({one, self._origins.get(one, one)} & self._leaf_axes.keys())
        self._touch(self._parts.get(node, ()))

    def _is_leaf(self, node: int) -> bool:
        """Returns whether an axis belongs to a leaf, or is merged from such axes."""
        return node in self._leaf_axes or all(atom in self._leaf_axes for atom in self.atoms(node))

    def _touch(self, nodes: Iterable[int]) -> None:
        self._touched.update(one for node in nodes for one in (node, *self.atoms(node)) if one in self._leaf_axes)

    def _cut(self, nodes: Iterable[int], lost: Iterable[int]) -> None:
        """Records that axes of a value made of leaves come from lost axes."""
        parts = tuple(part for node in lost for part in (node, *self._parts.get(node, ())))
        if parts:
            self._parts |= dict.fromkeys(nodes, parts)

    def _lose(self, operation: str, nodes: Iterable[int]) -> None:
        self._lost += [(operation, node) for node in nodes]
