"""Routes of one kind run as one: their leaves are stacked and mapped over, to be traced and compiled once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.routes import ResolvedRoute
from merge_jax.types import Adapter

__all__ = ["Group", "grouped", "run_group"]


@dataclass(frozen=True)
class Group:
    """Routes of one signature, with the place of each among all routes, which its randomness comes from."""

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


def run_group(
    group: Group,
    move: Callable[..., tuple[jax.Array, ...]],
    sources: Mapping[str, jax.Array],
    targets: Mapping[str, jax.Array],
    *,
    params: Adapter = None,
    shared: bool = False,
    key: jax.Array | None = None,
    group_size: int | None = None,
) -> dict[str, jax.Array]:
    """Returns the new leaves of a group's routes by path: `move(params, target, source, key=key)` of each.

    They have the dtypes of the old ones.

    Args:
      group: the routes.
      move: `(params, target leaves, source leaves, key=) -> target leaves`, of one route.
      sources: leaves of the source by path.
      targets: leaves of the target by path.
      params: parameters of the group's adapter, stacked where it has several routes and they share none.
      shared: whether all routes have the same parameters.
      key: turns dropout on; all routes have the same masks, which costs no more than one route has: each adapter
        sees new masks at every step all the same.
      group_size: at most so many routes run at once; None for all.
    """
    first, count = group.routes[0], len(group.routes)
    if count == 1:
        target, source = (targets[p] for p in first.target), (sources[p] for p in first.source)
        new = move(params, tuple(target), tuple(source), key=key)
        return {path: leaf.astype(targets[path].dtype) for path, leaf in zip(first.target, new, strict=True)}

    def stack(leaves: Mapping[str, jax.Array], paths: Sequence[tuple[str, ...]]) -> tuple[jax.Array, ...]:
        # Joined along their first axis, then reshaped: one operation for all, not one for each.
        columns = ([leaves[path] for path in column] for column in zip(*paths, strict=True))
        return tuple(jnp.concatenate(column).reshape(count, *column[0].shape) for column in columns)

    each: dict[str, Any] = {"target": stack(targets, [route.target for route in group.routes])}
    all_alike: dict[str, Any] = {}
    (all_alike if shared else each)["params"] = params
    if all(route.source == first.source for route in group.routes):
        all_alike["source"] = tuple(sources[path] for path in first.source)
    else:
        each["source"] = stack(sources, [route.source for route in group.routes])

    def move_one(of_route: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        given = {**all_alike, **of_route}
        return move(given["params"], given["target"], given["source"], key=key)

    if group_size is None or group_size >= count:
        stacked = jax.vmap(move_one)(each)
    else:
        stacked = lax.map(move_one, each, batch_size=group_size)
    # Split in one operation, whose derivative is one too; an index for each would have a padded array for each.
    columns = [
        lax.split(leaf.astype(targets[path].dtype).reshape(-1, *leaf.shape[2:]), (leaf.shape[1],) * count)
        for leaf, path in zip(stacked, first.target, strict=True)
    ]
    return {
        path: leaf
        for route, leaves in zip(group.routes, zip(*columns, strict=True), strict=True)
        for path, leaf in zip(route.target, leaves, strict=True)
    }
