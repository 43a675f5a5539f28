"""Names of version 0.1 go on for now, with a warning that says what they are called."""

import importlib

import jax
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.deprecated import NEW_NAMES
from tests import helpers


@pytest.mark.parametrize("name", NEW_NAMES)
def test_an_old_name_is_the_new_one_with_a_warning(name):
    module, _, new = NEW_NAMES[name].rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"merge_jax.{name} is now {NEW_NAMES[name]}") as caught:
        found = getattr(mj, name)
    assert found is getattr(importlib.import_module(module), new)
    assert caught[0].filename == __file__
    assert name not in mj.__all__


def test_what_never_was_is_told():
    with pytest.raises(AttributeError, match="module 'merge_jax' has no attribute 'lpka_transfr'"):
        _ = mj.lpka_transfr


def test_the_published_output_has_one_name():
    with pytest.warns(DeprecationWarning, match="output='official' is now output='published'") as caught:
        old = mj.lpka_transfer(helpers.ROUTES, output="official", num_heads=1)
    assert caught[0].filename == __file__
    (source, _), (target, _) = helpers.variables(helpers.SOURCE, 0), helpers.variables(helpers.TARGET, 1)
    new = mj.lpka_transfer(helpers.ROUTES, output="published", num_heads=1)
    shapes = [jax.eval_shape(one.init, jax.random.key(0), source, target) for one in (old, new)]
    assert shapes[0] == shapes[1]


def test_a_transfer_at_a_step():
    source, target = {"w": np.full(3, 2.0, np.float32)}, {"w": np.zeros(3, np.float32)}
    transfer = mj.scheduled(mj.share_transfer({"w": "w"}), lambda step: step / 4)
    with pytest.warns(DeprecationWarning, match=r"transfer.at\(step\).apply\(...\) is now") as caught:
        now = transfer.at(1)
    assert caught[0].filename == __file__
    np.testing.assert_allclose(now.apply({}, source, target)["w"], 0.5)
    np.testing.assert_allclose(transfer.apply({}, source, target, step=1)["w"], 0.5)
