"""Axes that a model merges or splits by reshaping: nodes of a union-find, each with its factors."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

__all__ = ["Factors", "TiedAxes", "apart", "apart_axes", "apart_shape", "common_factors", "merged_from"]

Factors = tuple[tuple[int, ...], ...]
"""For each axis of a leaf, the sizes of its factors, the slowest first; for an unmerged axis, its size."""


def apart_shape(shape: Sequence[int], factors: Factors | None) -> tuple[int, ...]:
    """Returns a shape with merged axes split; an axis with one factor keeps its size in the shape."""
    own = ((size,) for size in shape) if factors is None else (
        found if len(found) > 1 else (size,) for size, found in zip(shape, factors, strict=True)
    )  # fmt: skip
    return tuple(itertools.chain.from_iterable(own))


def apart_axes(factors: Factors) -> list[tuple[int, ...]]:
    """Returns for each axis of a leaf its axes after merged axes are split.

    >>> apart_axes(((4, 4, 16), (10,)))
    [(0, 1, 2), (3,)]
    """
    ends = list(itertools.accumulate(map(len, factors), initial=0))
    return [tuple(range(start, end)) for start, end in itertools.pairwise(ends)]


def apart(leaves: Mapping[str, Any], factors: Mapping[str, Factors]) -> dict[str, Any]:
    """Returns leaves (or their shapes) by path, with merged axes split."""

    def one(path: str, leaf: Any) -> Any:
        if path not in factors:
            return leaf
        shape = apart_shape(leaf.shape, factors[path])
        return (
            jax.ShapeDtypeStruct(shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.reshape(shape)
        )

    return {path: one(path, leaf) for path, leaf in leaves.items()}


def common_factors(*shapes: Sequence[int]) -> tuple[int, ...] | None:
    """Returns sizes from which all these shapes follow by merging neighbours; None if there are none.

    >>> common_factors((8, 4), (2, 16)), common_factors((6, 4), (4, 6))
    ((2, 4, 4), None)
    """
    ends = sorted({1}.union(*(np.cumprod(shape, dtype=np.int64).tolist() for shape in shapes)))
    pairs = list(itertools.pairwise(ends))
    return None if any(b % a for a, b in pairs) else tuple(b // a for a, b in pairs)


def merged_from(shape: Sequence[int], new_shape: Sequence[int]) -> list[tuple[int, ...]] | None:
    """Returns for each new axis the old ones that it is merged from; None if a reshape does more than merge."""
    found, axis = [], 0
    for size in new_shape:
        own = []
        while axis < len(shape) and math.prod(shape[a] for a in own) < size:
            own.append(axis)
            axis += 1
        if not own or math.prod(shape[a] for a in own) != size:
            return None
        found.append(tuple(own))
    return found if axis == len(shape) else None


class TiedAxes:
    """Axes as nodes: tied axes have one root, and merged or split axes store their factors."""

    def __init__(self) -> None:  # noqa: D107
        self._parents: list[int] = []
        self._sizes: list[int] = []
        self._factors: dict[int, tuple[int, ...]] = {}
        self._inputs: set[int] = set()
        """Nodes of the model's leaves and inputs, and their factors."""
        self._conflicts: list[int] = []
        """Nodes that are merged from different factors in different places."""

    def atoms(self, node: int) -> tuple[int, ...]:
        """Returns the nodes that an axis is made of, the slowest first; the axis itself if it is not merged."""
        factors = self._factors.get(node) or self._factors.get(self._root(node))
        return (node,) if factors is None else tuple(atom for one in factors for atom in self.atoms(one))

    def same_axis(self, node: int, other: int) -> bool:
        """Returns whether the axes of two nodes are tied."""
        return self._root(node) == self._root(other)

    def sizes(self, nodes: Iterable[int]) -> list[int]:
        """Returns the sizes of axes."""
        return [self._sizes[node] for node in nodes]

    def _root(self, node: int) -> int:
        while self._parents[node] != node:
            self._parents[node] = node = self._parents[self._parents[node]]
        return node

    def _fresh(self, sizes: Iterable[int]) -> tuple[int, ...]:
        first = len(self._parents)
        self._sizes += sizes
        self._parents += range(first, len(self._sizes))
        return tuple(range(first, len(self._sizes)))

    def _tie(self, node: int, other: int) -> None:
        # The older one becomes the root, so that channel groups are named in the order of the leaves.
        older, newer = sorted((self._root(node), self._root(other)))
        if older == newer:
            return
        pairs = self._matched(older, newer)
        factors = self._factors.get(older) or self._factors.get(newer)
        self._parents[newer] = older
        if factors is not None:
            self._factors[older] = factors
        if len(pairs) > 1:
            for one, two in pairs:
                self._tie(one, two)

    def _matched(self, node: int, other: int) -> list[tuple[int, int]]:
        """Returns the paired atoms of two axes that are, or will be, tied; both are first split alike."""
        atoms = self.atoms(node), self.atoms(other)
        if 1 in map(len, atoms):
            return [(node, other)] if len(atoms[0]) == len(atoms[1]) else []
        sizes = common_factors(*map(self.sizes, atoms))
        if sizes is None:
            self._conflicts += (*atoms[0], *atoms[1])
            return []
        one, two = (self._finer(own, sizes) for own in atoms)
        return list(zip(one, two, strict=True))

    def _tied(self, node: int, from_leaves: bool = False) -> int:
        """Returns a new node tied to this one, an axis of another value; this node itself for values of leaves."""
        if from_leaves:
            return node
        (fresh,) = self._fresh((self._sizes[node],))
        self._tie(node, fresh)
        return fresh

    def _split(self, node: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """Returns new nodes of these sizes, which become the factors of an atom."""
        root = self._root(node)
        fresh = self._fresh(sizes)
        self._factors[root] = fresh
        if root in self._inputs or node in self._inputs:
            self._inputs.update(fresh)
        return fresh

    def _finer(self, atoms: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
        """Returns the atoms that result from splitting these into the given sizes."""
        found, rest = [], list(sizes)
        for atom in atoms:
            own = []
            while math.prod(own) < self._sizes[atom]:
                own.append(rest.pop(0))
            found += [atom] if len(own) == 1 else self._split(atom, own) if own else []
        return tuple(found)

    def _merged(self, atoms: Sequence[int]) -> int:
        """Returns the node of an axis made of these atoms."""
        if len(atoms) == 1:
            return atoms[0]
        (node,) = self._fresh((math.prod(self.sizes(atoms)),))
        self._factors[node] = tuple(atoms)
        return node

    def _regrouped(self, nodes: Sequence[int], shape: Sequence[int], new_shape: Sequence[int]) -> tuple[
        tuple[int, ...], list[int]
    ]:  # fmt: skip
        """Returns the nodes of a reshaped value's axes, and the old nodes that have no counterpart among them.

        Axes of size 1 may be added or removed.
        """
        new_nodes, lost, start = list(self._fresh(new_shape)), list[int](), 1
        old, new = (
            [(end, axis) for axis, (end, size) in enumerate(_ends(one)) if size > 1] for one in (shape, new_shape)
        )
        for end in sorted({one for one, _ in old} & {one for one, _ in new}):
            before, after = ([axis for one, axis in own if start < one <= end] for own in (old, new))
            start = end
            if len(before) == len(after) == 1:
                new_nodes[after[0]] = nodes[before[0]]
                continue
            atoms = [atom for axis in before for atom in self.atoms(nodes[axis]) if self._sizes[atom] > 1]
            sizes = common_factors(self.sizes(atoms), [new_shape[axis] for axis in after])
            if sizes is None:
                lost += [nodes[axis] for axis in before]
                continue
            fine, taken = self._finer(atoms, sizes), 0
            for axis in after:
                count = next(
                    n for n in range(1, len(fine) + 1) if math.prod(sizes[taken : taken + n]) == new_shape[axis]
                )
                new_nodes[axis] = self._merged(fine[taken : taken + count])
                taken += count
        return tuple(new_nodes), lost


def _ends(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Returns for each axis the number of entries up to its end, and its size."""
    return list(zip(np.cumprod(np.asarray(shape, np.int64)).tolist(), shape, strict=True))
