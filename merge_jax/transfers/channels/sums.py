"""Contractions: the axes of leaves and layer inputs that each ties, consumes and binds."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from merge_jax.transfers.channels.axes import AxisNodes

__all__ = ["OnSum", "Sum", "SummedAxes", "Value"]


class Value(NamedTuple):
    """A value with the node of each axis, and whether it depends only on leaves and constants."""

    value: Any
    nodes: tuple[int, ...]
    from_leaves: bool = False


class Sum(NamedTuple):
    """A contraction of a leaf with its input, or of two values that are not leaves.

    Attributes:
      path: path of the leaf; None if there is none.
      axes: contracted axes of the leaf, in order.
      entering: the input of the leaf, or both values.
      places: contracted axes of each of them.
    """

    path: str | None
    axes: tuple[int, ...]
    entering: tuple[Value, ...]
    places: tuple[tuple[int, ...], ...]


OnSum = Callable[[Sum], None]


class SummedAxes(AxisNodes):
    """The axes of a computation, with the ties from contractions."""

    def _sum_over(
        self, a: Value, left: Sequence[int], b: Value, right: Sequence[int], matched: Sequence[int], on_sum: OnSum
    ) -> None:
        """Ties the axes of two values that are contracted together; `matched` axes remain, paired by index."""
        for axis, other in zip(left, right, strict=True):
            self._meet(a.nodes[axis], b.nodes[other])
        (a, left), (b, right) = self._summed_apart(a, left, b, right)
        nodes = [[one.nodes[axis] for axis in axes] for one, axes in ((a, left), (b, right))]
        places = [[self._leaf_axes.get(node) for node in own] for own in nodes]
        matched = [atom for node in matched for atom in self.atoms(node)]
        self._consumed.update(nodes[0])
        beside = [(*nodes[0][:i], *nodes[0][i + 1 :]) for i in range(len(left))]
        if a.from_leaves and b.from_leaves:  # The product of two leaves is a kernel with a part from each.
            for node in (*nodes[0], *nodes[1]):
                self._make(node)
        elif any(places[0]) or any(places[1]):
            for leaf_places, entering, axes in ((places[1], a, left), (places[0], b, right)):
                for path in dict.fromkeys(place[0] for place in leaf_places if place):
                    at = sorted(
                        (place[1], axis)
                        for place, axis in zip(leaf_places, axes, strict=True)
                        if place and place[0] == path
                    )
                    summed, entered = zip(*at, strict=True)
                    self._summed.setdefault(path, set()).update(summed)
                    on_sum(Sum(path, summed, (entering,), (entered,)))
        elif left:
            beside = [(*others, *matched) for others in beside]
            on_sum(Sum(None, (), (a, b), (tuple(left), tuple(right))))
        self._beside += zip(nodes[0], beside, strict=True)

    def _meet(self, node: int, other: int) -> None:
        """Ties axes of two values that are contracted together, and records whether that binds them."""
        # The oldest node is the root: that of an input, if no leaf was tied to its axis before.
        for pair in [(node, other), *self._matched(node, other)]:
            if any(map(self._is_leaf, pair)):
                atoms = {atom for one in pair for atom in self.atoms(one)}
                self._bound.update(atom for atom in atoms if self._root(atom) in self._inputs)
            for one in pair:
                self._touch(self._parts.get(one, ()))
        self._tie(node, other)

    def _summed_apart(
        self, a: Value, left: Sequence[int], b: Value, right: Sequence[int]
    ) -> tuple[tuple[Value, list[int]], tuple[Value, list[int]]]:
        """Returns two values with their contracted merged axes split, and all contracted axes."""
        found: list[tuple[Value, list[int]]] = []
        for one, axes, of, others in ((a, left, b, right), (b, right, a, left)):
            nodes = list(zip(axes, (one.nodes[i] for i in axes), (of.nodes[i] for i in others), strict=True))
            split = {axis for axis, *pair in nodes if len(self.atoms(pair[0])) == len(self.atoms(pair[1])) > 1
                     and self._leaf_axes.keys().isdisjoint(pair)}  # fmt: skip
            own = [self.atoms(node) if axis in split else (node,) for axis, node in enumerate(one.nodes)]
            starts = list(itertools.accumulate(map(len, own), initial=0))
            flat = tuple(itertools.chain.from_iterable(own))
            shape = [self._sizes[node] for node in flat]
            value = one.value.reshape(shape) if split else one.value
            places = [place for axis in axes for place in range(starts[axis], starts[axis + 1])]
            found.append((one._replace(value=value, nodes=flat), places))
        return found[0], found[1]
