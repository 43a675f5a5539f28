"""Networks of adapters: from two matrices to one, as pure functions of sizes and arrays.

Legend of shapes: target matrix `[m, n]`, source matrix `[p, q]`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from merge_jax.types import Adapter

__all__ = [
    "Dropout",
    "Network",
    "Place",
    "Sizes",
    "Start",
    "draw",
    "draw_mask",
    "draw_masks",
    "drawn_network",
    "error_context",
    "linen_network",
    "stack_starts",
]


class Sizes(NamedTuple):
    """Sizes of a target matrix `[m, n]` and a source matrix `[p, q]`."""

    m: Any
    n: Any
    p: Any
    q: Any


class Network(NamedTuple):
    """A family of functions `F(T, S) -> T'`, one for each `Sizes`, with learned parameters.

    Attributes:
      init: `(key, {name: place}) -> {name: params}`, stacked along a first axis if the place has copies. The key is
        consumed. Raises ValueError for sizes that the network can't map.
      apply: `(params, target [m, n], source [p, q], masks, true) -> [m, n]`. The masks are those of `masks`, or
        None for no dropout. `true` is the result of the function `true`, as arrays, if the matrices are padded with
        zeros, otherwise None.
      masks: `(key, [sizes, ...]) -> [masks, ...]`: the dropout masks of one pass; the key is consumed.
      true: `sizes -> tree of numbers`, derived from the true sizes, that `apply` needs for padded matrices. None if the
        network does not support padding.
      flops: `sizes -> floating point operations` of a pass, matrix products only; None if they must be counted.
    """

    init: Callable[[jax.Array, Mapping[str, "Place"]], dict[str, Adapter]]
    apply: Callable[[Adapter, jax.Array, jax.Array, Any, Any], jax.Array]
    masks: Callable[[jax.Array, Sequence[Sizes]], list[Any]]
    true: Callable[[Sizes], Any] | None = None
    flops: Callable[[Sizes], int] | None = None


class Place(NamedTuple):
    """The matrix sizes and copies for which parameters are created.

    Attributes:
      sizes: sizes of the matrices, with padding.
      true: the true sizes of each copy; one entry if there are no copies.
      copied: whether there are copies, stacked along a first axis.
    """

    sizes: Sizes
    true: tuple[Sizes, ...]
    copied: bool


class Start(NamedTuple):
    """The distribution of an array's initial values: uniform in `centre +- bound`.

    Attributes:
      shape: of the array.
      bounds: arrays that broadcast to the shape, of its rank, whose product is the bound; none for a constant.
      centre: the mean.
    """

    shape: tuple[int, ...]
    bounds: tuple[np.ndarray, ...] = ()
    centre: float = 0.0


def stack_starts(starts: Sequence[Any]) -> Any:
    """Returns the `Start`s of several trees, stacked along a new first axis."""

    def stacked(*starts: Start) -> Start:
        bounds = tuple(np.stack(bounds) for bounds in zip(*(start.bounds for start in starts), strict=True))
        return Start((len(starts), *starts[0].shape), bounds, starts[0].centre)

    return jax.tree.map(stacked, *starts, is_leaf=_is(Start))


class Dropout(NamedTuple):
    """A dropout mask of an array, to be drawn.

    Attributes:
      shape: of the array, `[layers, ...]`.
      rate: the probability that an entry is dropped, in [0, 1).
      whole: whether the mask is drawn at once; otherwise it is a key for each layer, from which the caller draws parts.
    """

    shape: tuple[int, ...]
    rate: float
    whole: bool = True


def draw(key: jax.Array, starts: Any) -> Any:
    """Returns the initial arrays of a tree of `Start`s, float32.

    They are parts of one flat draw: a program with one random operation compiles many times faster than one with
    hundreds.
    """
    leaves, structure = jax.tree.flatten(starts, is_leaf=_is(Start))
    counts = [math.prod(leaf.shape) if leaf.bounds else 0 for leaf in leaves]
    flat = jax.random.uniform(key, (sum(counts),), jnp.float32, -1.0, 1.0)
    parts = lax.split(flat, counts)
    arrays = [
        leaf.centre
        + math.prod((jnp.asarray(bound, jnp.float32) for bound in leaf.bounds), start=part.reshape(leaf.shape))
        if leaf.bounds
        else jnp.full(leaf.shape, leaf.centre, jnp.float32)
        for leaf, part in zip(leaves, parts, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def draw_masks(key: jax.Array, masks: Any) -> Any:
    """Returns the masks of a tree of `Dropout`s, True where an entry is kept, from one flat draw.

    An entry is kept with the probability `1 - rate`, to a 65536th.
    """
    leaves, structure = jax.tree.flatten(masks, is_leaf=_is(Dropout))
    counts = [math.prod(leaf.shape) if leaf.whole else 0 for leaf in leaves]
    # Each key is used once: for the masks, or for its children.
    key, rest = (key, key) if all(leaf.whole for leaf in leaves) else jax.random.split(key)
    parts = lax.split(_random_halves(key, sum(counts)), counts)
    drawn = [
        _kept(part.reshape(leaf.shape), leaf.rate)
        if leaf.whole
        else jax.random.split(jax.random.fold_in(rest, i), leaf.shape[0])
        for i, (leaf, part) in enumerate(zip(leaves, parts, strict=True))
    ]
    return jax.tree.unflatten(structure, drawn)


def draw_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Returns one mask as `draw_masks` draws them; the key is consumed."""
    return _kept(_random_halves(key, math.prod(shape)).reshape(shape), rate)


def _random_halves(key: jax.Array, count: int) -> jax.Array:
    # Two entries per random word, since drawing the words takes most of dropout's time.
    words = jax.random.bits(key, (-(-count // 2),), jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:count]


def _kept(halves: jax.Array, rate: float) -> jax.Array:
    return halves >= min(round(rate * 2**16), 2**16 - 1)


def _is(record: type) -> Callable[[Any], bool]:
    return lambda leaf: isinstance(leaf, record)


def drawn_network(
    starts: Callable[[Sizes, Sizes], Any],
    apply: Callable[[Adapter, jax.Array, jax.Array, Any, Any], jax.Array],
    masks: Callable[[Sizes], Any],
    *,
    true: Callable[[Sizes], Any] | None = None,
    flops: Callable[[Sizes], int] | None = None,
) -> Network:
    """Returns the network with parameters and masks from trees of `Start`s and `Dropout`s, each drawn at once.

    Args:
      starts: `(true sizes, padded sizes) -> tree of Start`, in padded shapes, with a bound of 0 outside the true sizes.
      apply: see `Network`.
      masks: `sizes -> tree of Dropout`.
      true: see `Network`.
      flops: see `Network`.
    """

    def init(key: jax.Array, places: Mapping[str, Place]) -> dict[str, Adapter]:
        all_starts = {}
        for name, place in places.items():
            copies = [starts(true, place.sizes) for true in place.true]
            all_starts[name] = stack_starts(copies) if place.copied else copies[0]
        return draw(key, all_starts)

    def draw_all(key: jax.Array, all_sizes: Sequence[Sizes]) -> list[Any]:
        return draw_masks(key, [masks(sizes) for sizes in all_sizes])

    return Network(init, apply, draw_all, true, flops)


@contextlib.contextmanager
def error_context(route: str) -> Iterator[None]:
    """Adds the route to a network's ValueError for matrices that do not fit it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the route to {route!r} cannot be applied: {error}") from None


def linen_network(module: nn.Module) -> Network:
    """Returns the network of a Flax module `(T, S, *, deterministic) -> T'`; dropout draws from the rng `dropout`."""

    def init_one(key: jax.Array, sizes: Sizes) -> Adapter:
        target, source = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (sizes[:2], sizes[2:]))
        # Lazy, since only shapes matter.
        return module.lazy_init(key, target, source).get("params", {})

    def init(key: jax.Array, places: Mapping[str, Place]) -> dict[str, Adapter]:
        adapter = {}
        for i, (name, place) in enumerate(places.items()):
            own_key = jax.random.fold_in(key, i)
            with error_context(name):
                if place.copied:
                    keys = jax.random.split(own_key, len(place.true))
                    adapter[name] = jax.vmap(lambda key, sizes=place.sizes: init_one(key, sizes))(keys)
                else:
                    adapter[name] = init_one(own_key, place.sizes)
        return adapter

    def apply(params: Adapter, target: jax.Array, source: jax.Array, masks: Any, true: Any) -> jax.Array:
        del true  # A module's matrices are never padded.
        rngs = None if masks is None else {"dropout": masks}
        return jnp.asarray(module.apply({"params": params}, target, source, deterministic=masks is None, rngs=rngs))

    def masks(key: jax.Array, all_sizes: Sequence[Sizes]) -> list[Any]:
        return [jax.random.fold_in(key, i) for i in range(len(all_sizes))]

    return Network(init, apply, masks)
