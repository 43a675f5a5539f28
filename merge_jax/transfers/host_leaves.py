"""Leaves that stay on the host until needed, such as memory-mapped ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = ["any_on_host", "on_device"]


def any_on_host(source: Any, *others: Any) -> bool:
    """Returns whether leaves of a source are NumPy arrays and nothing is traced.

    Such a source is transferred leaf by leaf. Inside `jit`, the compiler plans all leaves together.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((source, others))):
        return False
    return any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(source))


def on_device(tree: Any) -> Any:
    """Returns a tree with its NumPy arrays moved to the device."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)
