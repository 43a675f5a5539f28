"""The walk of a refit whose source is on the host."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.transfers.fitted import walk


def test_a_source_deeper_than_the_target_is_read_a_few_layers_at_a_time(monkeypatch):
    sizes, on_device = [], walk.on_device
    monkeypatch.setattr(walk, "on_device", lambda tree: sizes.append(_size(tree)) or on_device(tree))
    deep = nn.Sequential([one for _ in range(4) for one in (nn.Dense(8), nn.tanh)])
    shallow = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(8)])
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(60, 8)), jnp.float32)
    source, target = (model.init(jax.random.key(i), inputs) for i, model in enumerate((deep, shallow)))
    routes = {"layers_0/**": "layers_0/**", "layers_2/**": "layers_6/**"}

    def refit(source):
        return mj.refit(routes, deep.apply, shallow.apply, source, target, inputs, batch_size=40).variables

    made = refit(jax.tree.map(np.asarray, source))
    assert max(sizes) <= 8 * 8 + 8  # The largest leaf, and the rest of an equation.
    assert sum(sizes) >= 4 * 8 * 8
    for own, other in zip(jax.tree.leaves(made), jax.tree.leaves(refit(source)), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-5)


def test_rows_of_all_devices_count():
    model = nn.Dense(2)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8)))

    def solved(inputs):
        return mj.refit({"**": "**"}, model.apply, model.apply, variables, variables, inputs, axis_name="data").solved

    with warnings.catch_warnings():
        warnings.simplefilter("error", mj.transfers.FewRowsWarning)
        jax.eval_shape(jax.vmap(solved, axis_name="data"), jnp.zeros((4, 3, 8)))
    with pytest.warns(mj.transfers.FewRowsWarning, match="8 unknowns and 6 rows"):
        jax.eval_shape(jax.vmap(solved, axis_name="data"), jnp.zeros((2, 3, 8)))


def _size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
