"""The regression of a layer, by itself."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from merge_jax.transfers.fitted import solve


def test_no_more_than_everything_is_explained():
    """Without a bias, the rest is a small difference of squared means, so rounding makes it negative."""
    x = jax.random.normal(jax.random.key(3), (64, 4)) + 1e3
    t = x @ jax.random.normal(jax.random.key(9), (4, 3))
    moments = solve.batch_moments(x, t, t, jnp.ones(64), lambda total: total)
    site: Any = SimpleNamespace(num_unknowns=4, unknowns=[SimpleNamespace(bias=None)], dense=True)
    reach = jnp.ones((4, 3), bool), jnp.zeros(3, bool)
    assert solve.solve(site, moments, jnp.zeros((4, 3)), reach, jnp.ones(3, bool), 1e-7).r2 <= 1
