"""What the models of the experiments are trained with."""

import jax.numpy as jnp
import numpy as np
import pytest

from merge_jax.study.images import sgd


@pytest.mark.parametrize(("momentum", "second"), [(0.0, -0.1), (0.5, -0.15), (0.9, -0.19)])
def test_momentum_is_the_part_of_the_step_before_that_is_kept(momentum, second):
    optimizer = sgd(0.1, 1_000_000, momentum=momentum)
    params, gradient = jnp.zeros(3), jnp.ones(3)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    update, _ = optimizer.update(gradient, state, params)
    np.testing.assert_allclose(update, second, rtol=1e-5)
