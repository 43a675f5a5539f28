"""The plan of an alignment: for routes of two models, the axes of each leaf and the pairs of channel groups."""

import itertools
import math
import string
from collections.abc import Mapping
from typing import NamedTuple

from merge_jax.layouts import MatrixSpec, matrix_spec
from merge_jax.transfers.channels.axes import ChannelGraph
from merge_jax.transfers.channels.merged_axes import Factors, apart_axes, apart_shape
from merge_jax.transfers.pairing import LayoutOf, ResolvedRoute
from merge_jax.transfers.views import KernelView

__all__ = [
    "AlignedAxis",
    "AlignedLeaf",
    "AlignmentPlan",
    "GroupPair",
    "any_layout",
    "plan_alignment",
    "subscripts",
    "traced_layout",
]


class AlignedAxis(NamedTuple):
    """One channel axis of a routed leaf.

    Attributes:
      target: its index in the target's leaf.
      source: its index in the source's leaf.
      pair: name of its pair of channel groups; None if its entries have a meaning outside the models and are paired by
        index.
      around: index, in the leaf, of the axis of the enclosing channel group; None if there is none.
      contracted: whether it is only contracted with the layer's inputs.
      kept: whether channels that the source lacks do not change; not if they are contracted too.
      sizes: of the target's axis and of the source's.
    """

    target: int
    source: int
    pair: str | None
    around: int | None
    contracted: bool
    kept: bool
    sizes: tuple[int, int]


class AlignedLeaf(NamedTuple):
    """A routed leaf: its paths, views and shapes, its channel axes, and window axes.

    Shapes and axes are those with arranged rows and split merged axes.
    """

    target: str
    source: str
    views: tuple[KernelView, KernelView]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    axes: tuple[AlignedAxis, ...]
    windows: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def reading(self) -> tuple[int, ...]:
        """Indices of the axes that one matrix of the adapter reads together."""
        return tuple(i for i, axis in enumerate(self.axes) if axis.contracted and axis.pair is not None)

    @property
    def making(self) -> tuple[int, ...]:
        """Indices of the axes that use the matrices of their channel groups."""
        return tuple(i for i, axis in enumerate(self.axes) if not axis.contracted and axis.pair is not None)

    @property
    def pairs_made(self) -> tuple[str, ...]:
        """The pairs of the axes that use the matrices of their channel groups."""
        return tuple(str(self.axes[i].pair) for i in self.making)

    @property
    def pairs_read(self) -> tuple[str, ...]:
        """The pairs of the axes that one matrix of the adapter reads together."""
        return tuple(str(self.axes[i].pair) for i in self.reading)

    @property
    def input_name(self) -> str:
        """The name of its input matrix in the adapter."""
        return f"{self.target}:{','.join(str(self.axes[i].target) for i in self.reading)}"

    def nameless(self) -> "AlignedLeaf":
        """Returns the leaf without names, equal for leaves that are computed alike."""
        axes = tuple(axis._replace(pair=None if axis.pair is None else "") for axis in self.axes)
        return self._replace(target="", source="", axes=axes)


class GroupPair(NamedTuple):
    """A channel group of the target and one of the source.

    Attributes:
      sizes: numbers of channels of the target's and the source's group.
      source: the source's channel group.
      around: name of the enclosing pair; None if there is none.
    """

    sizes: tuple[int, int]
    source: str
    around: str | None


class AlignmentPlan(NamedTuple):
    """The routes of two models: the leaves, and the pairs of channel groups by name."""

    leaves: tuple[AlignedLeaf, ...]
    pairs: Mapping[str, GroupPair]

    def made(self) -> set[str]:
        """Returns the pairs whose channels a routed leaf produces; readers of others read the target's channels."""
        return {name for leaf in self.leaves for name in leaf.pairs_made}

    def outermost_first(self) -> list[str]:
        """Returns the names of the pairs, each after its enclosing pair."""
        return sorted(self.pairs, key=lambda name: self.pairs[name].around is not None)


def _by_name_or(other: LayoutOf) -> LayoutOf:
    def layout(role: str, path: str, shape: tuple[int, ...]) -> MatrixSpec:
        try:
            return matrix_spec(path, shape)
        except ValueError:
            return other(role, path, shape)

    return layout


def traced_layout(source_graph: ChannelGraph, target_graph: ChannelGraph) -> LayoutOf:
    """Returns the layout of leaves by name, or, where the name does not tell, as the models compute with them."""
    graphs = {"source": source_graph, "target": target_graph}
    by_name = _by_name_or(lambda role, path, shape: graphs[role].layout(path, shape))

    def layout(role: str, path: str, shape: tuple[int, ...]) -> MatrixSpec:
        spec, graph = by_name(role, path, shape), graphs[role]
        places, groups = apart_axes(graph.factors.get(path, tuple((size,) for size in shape))), graph.channel_groups
        window = [one for axis in spec.window for one in places[axis]]
        # Groups of heads `[2, 2, size, out]` look like a window, but are channels.
        hidden = path in groups and any(groups[path][one] in graph.hidden for one in window)
        return graph.layout(path, shape) if hidden else spec

    return layout


any_layout: LayoutOf = _by_name_or(lambda role, path, shape: MatrixSpec(tuple(range(len(shape))), ()))
"""The layout of a leaf by name, or all axes as rows: to check routes before the models are traced."""


def plan_alignment(
    routes: tuple[ResolvedRoute, ...], source_graph: ChannelGraph, target_graph: ChannelGraph
) -> AlignmentPlan:
    """Returns the leaves and pairs of channel groups of these routes.

    Raises:
      ValueError: leaves whose axes cannot be paired, or graphs of other models.
    """
    pairs: dict[str, GroupPair] = {}
    return AlignmentPlan(tuple(_leaf(route, source_graph, target_graph, pairs) for route in routes), pairs)


def _leaf(
    route: ResolvedRoute, source_graph: ChannelGraph, target_graph: ChannelGraph, pairs: dict[str, GroupPair]
) -> AlignedLeaf:
    """Returns the leaf of a route, and adds its pairs of channel groups."""
    if len(route.target) != 1 or len(route.source) != 1:
        raise ValueError(
            f"the route to {' + '.join(route.target)!r} joins several leaves, but channels are aligned leaf by leaf"
        )
    (target,), (source,) = route.target, route.source
    views = route.target_view, route.source_view
    assert isinstance(views[0], KernelView)  # The view attention is refused.
    assert isinstance(views[1], KernelView)
    factors = _factors(views[0], target, target_graph), _factors(views[1], source, source_graph)
    arranged = _arranged_apart(views[1], source, factors[1])
    shapes = (
        apart_shape(views[0].arranged_shapes[0], factors[0]),
        apart_shape(views[1].arranged_shapes[0], factors[1]),
    )
    specs = _spec_apart(views[0].specs[0], factors[0]), _spec_apart(views[1].specs[0], factors[1])
    merged = any(len(own) > 1 for of in factors for own in of)
    channels = [sorted((*spec.rows, *spec.inputs)) for spec in specs]
    if len(channels[0]) != len(channels[1]):
        raise ValueError(
            f"the target's {target!r} of shape {shapes[0]} has {len(channels[0])} axes of channels, the source's "
            f"{source!r} of shape {shapes[1]} has {len(channels[1])}: they cannot be paired"
            + (
                "; where a model merges or splits axes of channels, these shapes have them apart, without axes of size "
                "1, such as groups of one channel"
                if merged
                else ""
            )
        )
    leaf_groups = target_graph.leaf_groups(target), source_graph.leaf_groups(source)
    for named_axes, shape, path in zip(leaf_groups, shapes, (target, source), strict=True):
        if len(named_axes) != len(shape):
            raise ValueError(
                f"the channel graph is of another model: {path!r} has {len(named_axes)} axes there, here {len(shape)}"
            )
    places = list(zip(*channels, strict=True))
    group_pairs = [(leaf_groups[0][t], leaf_groups[1][s]) for t, s in places]
    axes = []
    for (t, s), (target_group, source_group) in zip(places, group_pairs, strict=True):
        contracted = t in target_graph.inputs[target]
        if contracted != (s in source_graph.inputs[source]):
            reads, makes = ("target", "source") if contracted else ("source", "target")
            raise ValueError(
                f"{target!r} and {source!r} are of other layouts: axis {t if contracted else s} is an input of the "
                f"{reads}'s layer, and axis {s if contracted else t} none of the {makes}'s"
            )
        sizes, around, pair = (shapes[0][t], shapes[1][s]), None, None
        if s in arranged:
            pass  # The route says which rows belong together.
        elif target_group in target_graph.hidden and source_group in source_graph.hidden:
            outer = target_graph.within.get(target_group), source_graph.within.get(source_group)
            around = group_pairs.index(outer) if outer in group_pairs else None
            found = GroupPair(sizes, source_group, None if around is None else _name(*group_pairs[around], pairs))
            pair = _name(target_group, source_group, pairs)
            if pairs.setdefault(pair, found) != found:
                raise ValueError(f"{target!r} and {source!r} are of other layouts: their heads are along other axes")
        elif sizes[0] != sizes[1] and _is_merged(t, factors[0]) and _is_merged(s, factors[1]):
            raise ValueError(_unlike_places((target, source), shapes, (t, s)))
        elif sizes[0] != sizes[1]:  # Entries can only be paired by index.
            why = _bound("target", target_group, target_graph) or _bound("source", source_group, source_graph)
            raise ValueError(
                f"{target!r} has {sizes[0]} entries along axis {t}, {source!r} has {sizes[1]} along axis {s}; {why}: "
                "it is ambiguous which to choose. Leave out the route, or give it rows=mj.Rows.by_name(source_names, "
                "target_names)"
            )
        axes.append(AlignedAxis(t, s, pair, around, contracted, t not in target_graph.both[target], sizes))
    return AlignedLeaf(target, source, (views[0], views[1]), shapes, tuple(axes), (specs[0].window, specs[1].window))


def _factors(view: KernelView, path: str, graph: ChannelGraph) -> Factors:
    """Returns the factors of a leaf's merged axes."""
    shape, found = view.arranged_shapes[0], graph.factors.get(path)
    if found is None:
        return tuple((size,) for size in shape)
    if len(found) != len(shape) or any(
        len(own) > 1 and math.prod(own) != size for own, size in zip(found, shape, strict=True)
    ):
        raise ValueError(f"the channel graph is of another model: {path!r} is {found} there, here {shape}")
    return found


def _is_merged(axis: int, factors: Factors) -> bool:
    """Returns whether an axis of a leaf with split merged axes is one of these."""
    return [len(own) > 1 for own in factors for _ in own][axis]


def _unlike_places(paths: tuple[str, str], shapes: tuple[tuple[int, ...], ...], axes: tuple[int, int]) -> str:
    return (
        f"{paths[0]!r} of the target is {shapes[0]} with merged axes apart, {paths[1]!r} of the source {shapes[1]}: "
        f"{shapes[0][axes[0]]} places along axis {axes[0]} cannot be paired with {shapes[1][axes[1]]} along axis "
        f"{axes[1]}. Places meet one by one. Give the target inputs, strides or pooling that make its maps the "
        "source's size, average over the places in both models, or leave out the route"
    )


def _arranged_apart(view: KernelView, path: str, factors: Factors) -> tuple[int, ...]:
    """Returns the axes along which a route arranges the rows of the source, with merged axes split."""
    axes = () if view.arrangement is None else view.arrangement.axes
    places = apart_axes(factors)
    if any(len(places[axis]) > 1 for axis in axes):
        raise ValueError(f"the rows of {path!r} are channels at places, which a route cannot arrange: leave out rows=")
    return tuple(places[axis][0] for axis in axes)


def _spec_apart(spec: MatrixSpec, factors: Factors) -> MatrixSpec:
    """Returns the matrix spec of a leaf with split merged axes."""
    found = apart_axes(factors)

    def places(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(found[axis] for axis in axes))

    return MatrixSpec(places(spec.rows), places(spec.inputs), places(spec.window))


def _name(target_group: str, source_group: str, pairs: Mapping[str, GroupPair]) -> str:
    """Returns the name of a pair: the target's channel group, unless it is also paired with another source group."""
    if target_group not in pairs or pairs[target_group].source == source_group:
        return target_group
    return f"{target_group} from {source_group}"


def _bound(role: str, group: str, graph: ChannelGraph) -> str:
    """Returns why a channel group has a meaning outside the model; empty for hidden channels."""
    if group in graph.hidden:
        return ""
    if group in graph.consumed:
        return (
            f"those of the {role} come from outside of it, as tokens and pixels do, or meet constants of an order, "
            "such as running statistics that the function does not take as an input, or dropout in training mode"
        )
    return (
        f"nothing in the {role} that can be followed reads those, as it is with the labels of a last layer (leave it "
        "out of the routes, and fit it with mj.fit_head), with tokens, with the angles of rotary positions, and where "
        "channels are split, merged or looped over"
    )


def subscripts(leaf: AlignedLeaf, numbers: tuple[int, ...]) -> tuple[list[str], str, str]:
    """Returns einsum subscripts of the matrices of some axes, and of the axes of target and source."""
    small, large = string.ascii_lowercase, string.ascii_uppercase
    matrices = []
    for i in numbers:
        around = leaf.axes[i].around
        matrices.append(f"{'' if around is None else small[around]}{small[i]}{large[i]}")
    return matrices, "".join(small[i] for i in numbers), "".join(large[i] for i in numbers)
