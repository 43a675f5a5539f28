"""The trees in checkpoints: which can be saved, how they are copied, and their shapes for reading."""

import sys
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from merge_jax.checkpoints.manifest import shapes_of
from merge_jax.paths import flatten, some_of

__all__ = ["check_saveable", "copy_to_host", "placed_shapes"]

_Tree = TypeVar("_Tree")


def check_saveable(state: Any) -> None:
    """Raises ValueError for leaves that Orbax would not restore unchanged; names the first three."""
    _check_no_nnx_list(state)
    leaves, problems = flatten(state), []
    if not leaves:
        raise ValueError(f"a checkpoint holds one array or more, the state has none: {state!r:.60}")
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            problems.append(f"{path} is {leaf!r:.40}, of the type {type(leaf).__name__}")
        elif not isinstance(leaf, jax.Array) and (taken := _dtype_in_jax(leaf)) != leaf.dtype:
            problems.append(f"{path} is {leaf.dtype}{list(leaf.shape)} of NumPy, in JAX {taken or 'nothing'}")
        elif not _is_written(leaf):
            problems.append(f"{path} is {leaf.dtype}{list(leaf.shape)}, which Orbax does not write")
    if problems:
        raise ValueError(
            f"a checkpoint holds arrays that JAX can hold: {some_of(problems, 3, '; ')}. Give jnp.asarray(...) of a"
            " number, and keep anything that is not numeric out of the state"
        )


def _is_written(array: jax.Array | np.ndarray | np.generic) -> bool:
    """Returns whether Orbax can write an array; Orbax itself would report it only at the next save."""
    if array.size == 0:
        return False
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return True
    try:
        return bool(tensorstore.dtype(array.dtype.name))
    except ValueError:
        return False


def _check_no_nnx_list(state: Any) -> None:
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:  # If flax.nnx is not imported, no tree contains its lists.
        return
    for path, node in jax.tree.leaves_with_path(state, is_leaf=lambda node: isinstance(node, nnx.List)):
        if isinstance(node, nnx.List):
            raise ValueError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} is an nnx.List, which Orbax saves and"
                " cannot read again: save nnx.state(module) instead of the module; nnx.update(module, state)"
                " puts what comes back into it"
            )


def _dtype_in_jax(array: np.ndarray | np.generic) -> np.dtype | None:
    """Returns the JAX dtype of a NumPy array; None if JAX does not support it."""
    try:
        return shapes_of(array).dtype
    except TypeError:
        return None


def copy_to_host(tree: Any) -> Any:
    """Returns the tree with copies of its arrays, as NumPy except for random keys, all fetched at once."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.clone(leaf)
        return np.array(leaf)

    return jax.tree.map(copy, tree)


def placed_shapes(tree: _Tree) -> _Tree:
    """Returns the tree with shapes, dtypes and placements as leaves; unplaced leaves go to one device."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(shape: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or default
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(placed, shapes_of(tree), tree)
