"""Transfers: pairs of pure functions that map a source and a target parameter tree to a new target tree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from merge_jax.lpka import LPKA, GatedLPKA
from merge_jax.matrices import MatrixSpec, as_matrix, copy_overlap, from_matrix, matrix_spec
from merge_jax.paths import near_misses, replace, select
from merge_jax.types import Adapter, Params, Transfer

__all__ = [
    "OutputForm",
    "Route",
    "Routes",
    "identity_transfer",
    "lpka_transfer",
    "share_transfer",
]


@dataclass(frozen=True)
class Route:
    """One path of knowledge: which target leaf is made from which source leaf.

    Attributes:
      target: path of the leaf in the target's parameters, e.g. `stage6_2/project/kernel`.
      source: path of the leaf in the source's parameters, e.g. `fc/kernel`.
      target_spec: how the target leaf is a matrix; by default what `matrix_spec` says of its path and shape.
      source_spec: the same for the source leaf.
    """

    target: str
    source: str
    target_spec: MatrixSpec | None = None
    source_spec: MatrixSpec | None = None


Routes = Mapping[str, str] | Sequence[Route | tuple[str, str]]
"""Routes as `{target path: source path}`, or as a sequence of pairs in that order or of `Route`s."""

OutputForm = Literal["official", "residual", "warm"]
"""How the adapter's output becomes the new target leaf; see `lpka_transfer`."""


def lpka_transfer(
    routes: Routes,
    *,
    num_layers: int = 2,
    num_heads: int = 8,
    output: OutputForm = "warm",
    attention_dropout: float = 0.1,
    feed_forward_dropout: float = 0.2,
    spectral: bool = True,
) -> Transfer:
    """Returns MergeNet's transfer: each routed target leaf attends to its source leaf through its own LPKA.

    With `T` the target's matrix, `S` the source's, `W` the target with the source's overlapping block copied
    in, and `g = 0` at the start:

    - `official`: `T' = LPKA(T, S)`, as published. The rows get variance 1, so use it before a BatchNorm.
    - `residual`: `T' = T + g s (LPKA(T/s, S/s_S) - T/s)`, starts as the identity.
    - `warm`: `T' = W + g s (LPKA(W/s, S/s_S) - W/s)`, starts as `share_transfer` and learns from there.

    `s` and `s_S` are root mean squares. The adapter is `{target path: LPKA parameters}`. Computation is in
    float32; the new leaf has the dtype of the old. Without a key, `apply` is deterministic; with one, dropout
    is on. Source: arXiv:2404.13322; `residual` and `warm` are our choice (see `GatedLPKA`).

    Args:
      routes: `{target path: source path}`, or a sequence of such pairs or of `Route`s.
      num_layers: layers of each LPKA, 1 or more.
      num_heads: heads of each attention, 1 or more.
      output: one of the three forms above.
      attention_dropout: rate of dropout on attention weights, in [0, 1).
      feed_forward_dropout: rate of dropout on the feed-forward block, in [0, 1).
      spectral: whether feed-forward kernels are divided by their spectral norms.

    Raises:
      ValueError: here, for no routes, a target routed twice, or an option out of range; in `init` and `apply`,
        for a path that is not there (near misses are listed) or a leaf that is not a float array.
    """
    routes = _as_routes(routes)
    _check_at_least_one(num_layers=num_layers, num_heads=num_heads)
    for name, rate in (
        ("attention_dropout", attention_dropout),
        ("feed_forward_dropout", feed_forward_dropout),
    ):
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {rate}")
    if output not in get_args(OutputForm):
        raise ValueError(f"unknown output form {output!r}; {near_misses(output, get_args(OutputForm))}")
    lpka = LPKA(num_layers, num_heads, attention_dropout, feed_forward_dropout, spectral)
    module = lpka if output == "official" else GatedLPKA(lpka)

    def matrices(leaves: "_RoutedLeaves") -> tuple[jax.Array, jax.Array]:
        start = leaves.overlap() if output == "warm" else leaves.target
        target = as_matrix(start.astype(jnp.float32), leaves.target_spec)
        return target, as_matrix(leaves.source.astype(jnp.float32), leaves.source_spec)

    # Compiled, since hundreds of small random arrays made one by one take seconds; lazy, since a forward pass
    # would tell no more than its shapes do.
    @jax.jit
    def init_routes(key: jax.Array, routed: dict[str, _RoutedLeaves]) -> Adapter:
        adapter = {}
        for i, (path, leaves) in enumerate(routed.items()):
            shapes = jax.eval_shape(matrices, leaves)
            try:
                adapter[path] = module.lazy_init(jax.random.fold_in(key, i), *shapes)["params"]
            except ValueError as error:
                raise ValueError(f"the route to {path!r} cannot be had: {error}") from None
        return adapter

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        return init_routes(key, _select_routes(routes, source_params, target_params))

    def apply(
        adapter: Adapter,
        source_params: Params,
        target_params: Params,
        *,
        key: jax.Array | None = None,
    ) -> Params:
        routed = _select_routes(routes, source_params, target_params)
        new_leaves = {}
        for i, (path, leaves) in enumerate(routed.items()):
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, i)}
            variables = {"params": adapter[path]}
            matrix = module.apply(variables, *matrices(leaves), deterministic=key is None, rngs=rngs)
            leaf = from_matrix(jnp.asarray(matrix), leaves.target_spec, leaves.target.shape)
            new_leaves[path] = leaf.astype(leaves.target.dtype)
        return replace(target_params, new_leaves)

    return Transfer(init, apply)


def share_transfer(routes: Routes) -> Transfer:
    """Returns parameter sharing: the source's overlapping block is copied into each routed target leaf.

    `T'[i, j] = S[i, j]` where both have the entry, `T[i, j]` elsewhere; windows of convolutions overlap at
    their centres (see `copy_overlap`). The baseline "parameter sharing" of arXiv:2404.13322; which block is
    copied is our choice, since the paper leaves it open. The adapter is empty.

    Raises:
      ValueError: as `lpka_transfer`.
    """
    routes = _as_routes(routes)

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        del key  # There is nothing to learn.
        _select_routes(routes, source_params, target_params)
        return {}

    def apply(
        adapter: Adapter,
        source_params: Params,
        target_params: Params,
        *,
        key: jax.Array | None = None,
    ) -> Params:
        del adapter, key  # There is nothing learned and nothing random.
        routed = _select_routes(routes, source_params, target_params)
        return replace(target_params, {path: leaves.overlap() for path, leaves in routed.items()})

    return Transfer(init, apply)


def identity_transfer() -> Transfer:
    """Returns the transfer that moves nothing: `T' = T`. The baseline "vanilla"; the adapter is empty."""

    def init(key: jax.Array, source_params: Params, target_params: Params) -> Adapter:
        del key, source_params, target_params  # There is nothing to learn.
        return {}

    def apply(
        adapter: Adapter,
        source_params: Params,
        target_params: Params,
        *,
        key: jax.Array | None = None,
    ) -> Params:
        del adapter, source_params, key  # Nothing moves.
        return target_params

    return Transfer(init, apply)


class _RoutedLeaves(struct.PyTreeNode):
    """Both leaves of a route, with the specs that make matrices of them."""

    target: jax.Array
    source: jax.Array
    target_spec: MatrixSpec = struct.field(pytree_node=False)
    source_spec: MatrixSpec = struct.field(pytree_node=False)

    def overlap(self) -> jax.Array:
        return copy_overlap(self.target, self.source, self.target_spec, self.source_spec)


def _as_routes(routes: Routes) -> tuple[Route, ...]:
    pairs = list(routes.items()) if isinstance(routes, Mapping) else list(routes)
    if not pairs:
        raise ValueError("no routes: give at least one pair of a target and a source path")
    named = tuple(pair if isinstance(pair, Route) else _route_of_pair(pair) for pair in pairs)
    sources: dict[str, str] = {}
    for route in named:
        if route.target in sources:
            raise ValueError(
                f"the target path {route.target!r} is routed twice, "
                f"from {sources[route.target]!r} and from {route.source!r}"
            )
        sources[route.target] = route.source
    return named


def _route_of_pair(pair: Any) -> Route:
    # A bare string is a sequence too; two of its letters would pass as a pair.
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(path, str) for path in pair):
        raise ValueError(f"a route is a pair (target path, source path) of strings, got {pair!r}")
    return Route(*pair)


def _select_routes(routes: tuple[Route, ...], source_params: Params, target_params: Params) -> dict[str, _RoutedLeaves]:
    """Returns the leaves of every route by target path, checked."""
    targets = select(target_params, [route.target for route in routes], role="target")
    sources = select(source_params, [route.source for route in routes], role="source")

    def spec(role: str, path: str, leaf: Any, given: MatrixSpec | None) -> MatrixSpec:
        _check_float(role, path, leaf)
        try:
            inferred = matrix_spec(path, leaf.shape)
            (given or inferred).check(leaf.shape)
        except ValueError as error:
            raise ValueError(f"the {role} leaf {path!r} cannot take part: {error}") from None
        return given or inferred

    return {
        route.target: _RoutedLeaves(
            targets[route.target],
            sources[route.source],
            spec("target", route.target, targets[route.target], route.target_spec),
            spec("source", route.source, sources[route.source], route.source_spec),
        )
        for route in routes
    }


def _check_float(role: str, path: str, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        found = type(leaf).__name__ if dtype is None else f"an array of {dtype}"
        raise ValueError(f"the {role} leaf {path!r} must be a float array, got {found}")


def _check_at_least_one(**options: int) -> None:
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
