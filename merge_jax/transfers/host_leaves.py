"""Leaves that stay on the host until they are needed, such as those that are mapped from a file."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = ["any_on_host", "on_device"]


def any_on_host(source: Any, *others: Any) -> bool:
    """Returns whether leaves of a source are arrays of NumPy and nothing is traced.

    What is moved of such a source is moved leaf by leaf. Inside of `jit` a compiler plans all leaves together.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((source, others))):
        return False
    return any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(source))


def on_device(tree: Any) -> Any:
    """Returns a tree with the NumPy arrays among its leaves put on the device."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)
