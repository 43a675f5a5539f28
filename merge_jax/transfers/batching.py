"""Batches of routes: routes with one signature are stacked and mapped over, small matrices of other shapes padded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.paths import flatten, near_misses
from merge_jax.transfers.host_leaves import any_on_host, on_device
from merge_jax.transfers.network import Sizes
from merge_jax.transfers.pairing import ResolvedRoute
from merge_jax.types import Adapter

__all__ = [
    "PaddedBatch",
    "RouteBatch",
    "adapter_entry",
    "batch_routes",
    "map_routes",
    "pad_batches",
    "run_batch",
    "stack_leaves",
    "unstack_leaves",
]

# Matrices up to this size are always padded: their work costs nothing compared with a separate program.
_SMALL = 256


@dataclass(frozen=True)
class RouteBatch:
    """Routes with one signature, with the index of each among all routes."""

    routes: tuple[ResolvedRoute, ...]
    numbers: tuple[int, ...]

    @property
    def name(self) -> str:
        """The path of the first route's first target leaf: its name in the adapter."""
        return self.routes[0].target[0]


def batch_routes(routes: Sequence[ResolvedRoute]) -> tuple[RouteBatch, ...]:
    """Returns the routes batched by signature, in the order of their first routes."""
    by_signature: dict[Any, list[int]] = {}
    for number, route in enumerate(routes):
        by_signature.setdefault(route.signature, []).append(number)
    return tuple(RouteBatch(tuple(routes[i] for i in numbers), tuple(numbers)) for numbers in by_signature.values())


@dataclass(frozen=True)
class PaddedBatch:
    """Batches whose matrices run as one program, padded with zeros to common sizes.

    Attributes:
      parts: one batch with unpadded matrices, or several.
      part_sizes: sizes of the matrices of each.
    """

    parts: tuple[RouteBatch, ...]
    part_sizes: tuple[Sizes, ...]

    @property
    def name(self) -> str:
        """The path of the first route's first target leaf: its name in the adapter."""
        return self.parts[0].name

    @property
    def routes(self) -> tuple[ResolvedRoute, ...]:
        """The routes of all parts."""
        return tuple(route for part in self.parts for route in part.routes)

    @property
    def true(self) -> tuple[Sizes, ...]:
        """The sizes of each route's matrices."""
        return tuple(sizes for part, sizes in zip(self.parts, self.part_sizes, strict=True) for _ in part.routes)

    @property
    def sizes(self) -> Sizes:
        """The common sizes."""
        return Sizes(*map(max, zip(*self.part_sizes, strict=True)))

    @property
    def padded(self) -> bool:
        """Whether the matrices of any part are smaller."""
        return len(set(self.part_sizes)) > 1


def pad_batches(
    batches: Sequence[RouteBatch], sizes: Sequence[Sizes], work: Callable[[Sizes], int], largest_ratio: float
) -> tuple[PaddedBatch, ...]:
    """Returns the batches merged into as few as possible without much additional work.

    In decreasing order of work, a batch joins the first one before it in which the padded work stays within
    `largest_ratio` of the true work, and within twice that for each route, or in which all matrices are small. Our
    choice: each shape is a separate program, which takes seconds to compile, while small matrices take microseconds.

    Args:
      batches: batches of routes.
      sizes: sizes of the matrices of each.
      work: `sizes -> operations` of one route.
      largest_ratio: 1 or more; at 1, batches are not merged.
    """
    joined: list[list[int]] = []

    def fits(members: Sequence[int]) -> bool:
        common = Sizes(*map(max, zip(*(sizes[i] for i in members), strict=True)))
        if largest_ratio > 1 and max(common) <= _SMALL:
            return True
        each = [work(sizes[i]) for i in members for _ in batches[i].routes]
        return len(each) * work(common) <= largest_ratio * min(sum(each), 2 * len(each) * min(each))

    for i in sorted(range(len(batches)), key=lambda i: -work(sizes[i])):
        for members in joined:
            if fits([*members, i]):
                members.append(i)
                break
        else:
            joined.append([i])
    return tuple(
        PaddedBatch(tuple(batches[i] for i in members), tuple(sizes[i] for i in members))
        for members in sorted(map(sorted, joined))
    )


def _stack(leaves: Mapping[str, jax.Array], paths: Sequence[tuple[str, ...]]) -> tuple[jax.Array, ...]:
    """Returns the leaves of each route, stacked along a new first axis."""
    # Concatenated along the first axis, then reshaped: one operation instead of one per leaf.
    columns = ([leaves[path] for path in column] for column in zip(*paths, strict=True))
    return tuple(
        jnp.concatenate(column).reshape(len(column), *column[0].shape) if len(column) > 1 else column[0][None]
        for column in columns
    )


def stack_leaves(
    batch: RouteBatch, sources: Mapping[str, jax.Array], targets: Mapping[str, jax.Array]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the leaves `target` and `source` in two dictionaries: stacked by route, and shared by all routes."""
    own = {"target": _stack(targets, [route.target for route in batch.routes])}
    first = batch.routes[0].source
    if all(route.source == first for route in batch.routes):
        return own, {"source": tuple(sources[path] for path in first)}
    return {**own, "source": _stack(sources, [route.source for route in batch.routes])}, {}


def unstack_leaves(
    batch: RouteBatch, stacked: Sequence[jax.Array], targets: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns the new target leaves of a batch by path, in the dtypes of the old ones."""
    count = len(batch.routes)
    new = {}
    for column, leaf in zip(zip(*(route.target for route in batch.routes), strict=True), stacked, strict=True):
        # Split in one operation with one derivative; indexing would need a padded array for each leaf.
        flat = leaf.astype(targets[column[0]].dtype).reshape(-1, *leaf.shape[2:])
        new |= zip(column, lax.split(flat, (leaf.shape[1],) * count) if count > 1 else [flat], strict=True)
    return new


def map_routes(move: Callable[[Any], Any], stacked: Any) -> Any:
    """Returns `move` mapped over the first axis of a tree."""
    if jax.tree.leaves(stacked)[0].shape[0] == 1:
        return jax.tree.map(lambda leaf: leaf[None], move(jax.tree.map(lambda leaf: leaf[0], stacked)))
    return jax.vmap(move)(stacked)


def run_batch(
    batch: RouteBatch,
    move: Callable[..., tuple[jax.Array, ...]],
    sources: Mapping[str, jax.Array],
    targets: Mapping[str, jax.Array],
    *,
    params: Adapter = None,
    shared: bool = False,
) -> dict[str, jax.Array]:
    """Returns the new leaves of a batch's routes by path: `move(params, target leaves, source leaves)` of each.

    Routes from leaves on the host run one after the other, so that the device holds only the leaves of one.

    Args:
      batch: the routes.
      move: the function of one route.
      sources: leaves of the source by path.
      targets: leaves of the target by path.
      params: parameters of the batch's adapter, stacked if there are several routes that do not share them.
      shared: whether all routes share the same parameters.
    """
    own_params = not shared and len(batch.routes) > 1
    given = [sources[path] for route in batch.routes for path in route.source]
    if any_on_host(given, params, [targets[path] for route in batch.routes for path in route.target]):
        return _run_apart(batch, move, sources, targets, params, own_params)
    own, alike = stack_leaves(batch, sources, targets)
    (own if own_params else alike)["params"] = params

    def move_one(route: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        given = {**alike, **route}
        return move(given["params"], given["target"], given["source"])

    return unstack_leaves(batch, map_routes(move_one, own), targets)


def _run_apart(
    batch: RouteBatch,
    move: Callable[..., tuple[jax.Array, ...]],
    sources: Mapping[str, jax.Array],
    targets: Mapping[str, jax.Array],
    params: Adapter,
    own_params: bool,
) -> dict[str, jax.Array]:
    """Returns the result of `run_batch`, with the leaves of only one route on the device at a time."""
    move_one, new = jax.jit(move), {}
    for number, route in enumerate(batch.routes):
        used = jax.tree.map(lambda leaf, number=number: leaf[number], params) if own_params else params
        target, source = (
            on_device(tuple(leaves[path] for path in paths))
            for leaves, paths in ((targets, route.target), (sources, route.source))
        )
        moved = [leaf.astype(old.dtype) for leaf, old in zip(move_one(used, target, source), target, strict=True)]
        # Otherwise the next routes' leaves would be on the device before this one has finished.
        new |= zip(route.target, jax.block_until_ready(moved), strict=True)
    return new


def adapter_entry(name: str, adapter: Adapter, expected: Any) -> Adapter:
    """Returns the parameters in the adapter's entry of this name.

    Raises:
      ValueError: the adapter has no such entry, or its shapes are not as expected.
    """
    if name not in adapter:
        raise ValueError(
            f"the adapter has no entry for the route to {name!r}; was it made for other routes or models? "
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
