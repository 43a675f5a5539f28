"""Routes that run as one: those of one kind stacked and mapped over, those of unlike small matrices padded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.paths import flatten, near_misses
from merge_jax.transfers.network import Sizes
from merge_jax.transfers.routes import ResolvedRoute
from merge_jax.types import Adapter

__all__ = [
    "Batch",
    "Group",
    "adapter_of",
    "batched",
    "grouped",
    "map_routes",
    "run_group",
    "stack",
    "stack_group",
    "unstack",
]

# Matrices up to this size are padded however much that adds: what they cost is nothing beside a program of their own.
_SMALL = 256


@dataclass(frozen=True)
class Group:
    """Routes of one signature, with the place of each among all routes."""

    routes: tuple[ResolvedRoute, ...]
    numbers: tuple[int, ...]

    @property
    def name(self) -> str:
        """The path of the first route's first target leaf: its name in the adapter."""
        return self.routes[0].target[0]


def grouped(routes: Sequence[ResolvedRoute]) -> tuple[Group, ...]:
    """Returns the groups of routes, in the order of their first routes."""
    groups: dict[Any, list[int]] = {}
    for number, route in enumerate(routes):
        groups.setdefault(route.signature, []).append(number)
    return tuple(Group(tuple(routes[i] for i in numbers), tuple(numbers)) for numbers in groups.values())


@dataclass(frozen=True)
class Batch:
    """Groups whose matrices run as one program, padded with zeros to common sizes.

    Attributes:
      groups: one, whose matrices are whole, or several.
      group_sizes: of each group's matrices.
    """

    groups: tuple[Group, ...]
    group_sizes: tuple[Sizes, ...]

    @property
    def name(self) -> str:
        """The path of the first route's first target leaf: its name in the adapter."""
        return self.groups[0].name

    @property
    def routes(self) -> tuple[ResolvedRoute, ...]:
        """The routes of all groups."""
        return tuple(route for group in self.groups for route in group.routes)

    @property
    def true(self) -> tuple[Sizes, ...]:
        """The sizes of each route's matrices."""
        return tuple(sizes for group, sizes in zip(self.groups, self.group_sizes, strict=True) for _ in group.routes)

    @property
    def sizes(self) -> Sizes:
        """The common sizes."""
        return Sizes(*map(max, zip(*self.group_sizes, strict=True)))

    @property
    def padded(self) -> bool:
        """Whether the matrices of any group are smaller."""
        return len(set(self.group_sizes)) > 1


def batched(
    groups: Sequence[Group], sizes: Sequence[Sizes], work: Callable[[Sizes], int], largest_ratio: float
) -> tuple[Batch, ...]:
    """Returns the groups in as few batches as keep the work near what it is for each group on its own.

    From the most work to the least, a group joins the first batch in which the padded work stays within
    `largest_ratio` of the true work, twice that for each route, or in which all matrices are small. Our choice: unlike
    shapes are one program each to a compiler, which takes seconds, where small matrices take microseconds.

    Args:
      groups: of routes.
      sizes: of the matrices of each.
      work: the operations that one route of some sizes takes.
      largest_ratio: 1 or more; at 1 each stays apart.
    """
    batches: list[list[int]] = []

    def fits(members: Sequence[int]) -> bool:
        common = Sizes(*map(max, zip(*(sizes[i] for i in members), strict=True)))
        if largest_ratio > 1 and max(common) <= _SMALL:
            return True
        each = [work(sizes[i]) for i in members for _ in groups[i].routes]
        return len(each) * work(common) <= largest_ratio * min(sum(each), 2 * len(each) * min(each))

    for i in sorted(range(len(groups)), key=lambda i: -work(sizes[i])):
        for batch in batches:
            if fits([*batch, i]):
                batch.append(i)
                break
        else:
            batches.append([i])
    members = sorted(map(sorted, batches))
    return tuple(Batch(tuple(groups[i] for i in batch), tuple(sizes[i] for i in batch)) for batch in members)


def stack(leaves: Mapping[str, jax.Array], paths: Sequence[tuple[str, ...]]) -> tuple[jax.Array, ...]:
    """Returns the leaves that each route names, stacked along a new first axis."""
    # Joined along their first axis, then reshaped: one operation for all, not one for each.
    columns = ([leaves[path] for path in column] for column in zip(*paths, strict=True))
    return tuple(
        jnp.concatenate(column).reshape(len(column), *column[0].shape) if len(column) > 1 else column[0][None]
        for column in columns
    )


def unstack(group: Group, stacked: Sequence[jax.Array], targets: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the new leaves of a group's routes by path, in the dtypes of the old ones; the inverse of `stack`."""
    count = len(group.routes)
    new = {}
    for column, leaf in zip(zip(*(route.target for route in group.routes), strict=True), stacked, strict=True):
        # Split in one operation, whose derivative is one too; an index for each would have a padded array for each.
        flat = leaf.astype(targets[column[0]].dtype).reshape(-1, *leaf.shape[2:])
        new |= zip(column, lax.split(flat, (leaf.shape[1],) * count) if count > 1 else [flat], strict=True)
    return new


def map_routes(move: Callable[[Any], Any], each: Any, group_size: int | None = None) -> Any:
    """Returns `move` of each entry of a tree along its first axis, at most `group_size` at once; None for all."""
    count = jax.tree.leaves(each)[0].shape[0]
    if count == 1:
        return jax.tree.map(lambda leaf: leaf[None], move(jax.tree.map(lambda leaf: leaf[0], each)))
    if group_size is None or group_size >= count:
        return jax.vmap(move)(each)
    return lax.map(move, each, batch_size=group_size)


def run_group(
    group: Group,
    move: Callable[..., tuple[jax.Array, ...]],
    sources: Mapping[str, jax.Array],
    targets: Mapping[str, jax.Array],
    *,
    params: Adapter = None,
    shared: bool = False,
) -> dict[str, jax.Array]:
    """Returns the new leaves of a group's routes by path: `move(params, target leaves, source leaves)` of each.

    Args:
      group: the routes.
      move: of one route.
      sources: leaves of the source by path.
      targets: leaves of the target by path.
      params: parameters of the group's adapter, stacked where it has several routes and they share none.
      shared: whether all routes have the same parameters.
    """
    each, alike = stack_group(group, sources, targets)
    if shared or len(group.routes) == 1:
        alike["params"] = params
    else:
        each["params"] = params

    def move_one(of_route: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        given = {**alike, **of_route}
        return move(given["params"], given["target"], given["source"])

    return unstack(group, map_routes(move_one, each), targets)


def stack_group(
    group: Group, sources: Mapping[str, jax.Array], targets: Mapping[str, jax.Array]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what each route has of its own, stacked, and what all have alike: `target` and `source` leaves."""
    each = {"target": stack(targets, [route.target for route in group.routes])}
    first = group.routes[0].source
    if all(route.source == first for route in group.routes):
        return each, {"source": tuple(sources[path] for path in first)}
    return {**each, "source": stack(sources, [route.source for route in group.routes])}, {}


def adapter_of(name: str, adapter: Adapter, expected: Any) -> Adapter:
    """Returns the parameters of the routes that are named after one of them.

    Raises:
      ValueError: the adapter has none, or of other shapes than expected.
    """
    if name not in adapter:
        raise ValueError(
            f"the adapter has nothing for the route to {name!r}; was it made for other routes or models? "
            f"{near_misses(name, adapter)}"
        )
    wanted, found = (
        {path: tuple(leaf.shape) for path, leaf in flatten(params).items()} for params in (expected, adapter[name])
    )
    if found != wanted:
        differing = [path for path in {**wanted, **found} if wanted.get(path) != found.get(path)]
        path = differing[0]
        raise ValueError(
            f"the adapter of the route to {name!r} does not fit; was it made with other options, or for other "
            f"models? Expected {path or 'an array'} of {wanted.get(path, 'nothing')}, got {found.get(path, 'nothing')}"
        )
    return adapter[name]
