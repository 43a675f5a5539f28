"""What the models of the experiments are trained with."""

import jax.numpy as jnp
import numpy as np
import pytest

from merge_jax import study
from merge_jax.study.models.images import sgd


@pytest.mark.parametrize(("momentum", "second"), [(0.0, -0.1), (0.5, -0.15), (0.9, -0.19)])
def test_momentum_is_the_part_of_the_step_before_that_is_kept(momentum, second):
    optimizer = sgd(0.1, 1_000_000, momentum=momentum)
    params, gradient = jnp.zeros(3), jnp.ones(3)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    update, _ = optimizer.update(gradient, state, params)
    np.testing.assert_allclose(update, second, rtol=1e-5)


def test_a_named_network_learns_by_the_optimizer_of_its_kind():
    data = study.load_images("digits", None, None, 200)
    params, gradient = jnp.zeros(3), jnp.ones(3)

    def second(model, **options):
        optimizer = study.named_classifier(model, data, 0.1, **options).optimizer(10)
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        return optimizer.update(gradient, state, params)[0]

    np.testing.assert_array_equal(second("tiny_vit"), second("tiny_vit", momentum=0.0))  # AdamW has no such momentum.
    assert second("tiny_vit")[0] == pytest.approx(-0.1, rel=1e-3)  # After a tenth of the run to warm up.
    for schedule, momentum in (("cosine", 0.5), ("steps", 0.0)):
        optimizer = sgd(0.1, 10, schedule=schedule, momentum=momentum)
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        expected, _ = optimizer.update(gradient, state, params)
        found = second("small_resnet", stages=1, schedule=schedule, momentum=momentum)
        np.testing.assert_array_equal(found, expected)
