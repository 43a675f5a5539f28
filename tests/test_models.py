import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.models.layers import DepthwiseConv


def shapes(model, image):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))["params"]


@pytest.mark.parametrize(
    ("model", "parameters"),
    [(mj.models.resnet50(100), 23_705_252), (mj.models.mobilenet_v2(100), 2_369_380)],
)
def test_published_models_have_the_published_number_of_parameters(model, parameters):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(model, (32, 32, 3)))) == parameters


def test_the_published_route_is_there_by_name():
    source = mj.flatten(shapes(mj.models.resnet50(100), (32, 32, 3)))
    target = mj.flatten(shapes(mj.models.mobilenet_v2(100), (32, 32, 3)))
    assert target["stage6_2/project/kernel"].shape == (960, 160)
    assert source["fc/kernel"].shape == (2048, 100)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8])
def test_depthwise_convolution_equals_the_grouped_one(stride, size):
    x = jax.random.normal(jax.random.key(0), (2, size, size, 5))
    variables = DepthwiseConv(stride).init(jax.random.key(1), x)
    kernel = variables["params"]["kernel"]
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=5,
    )
    np.testing.assert_allclose(DepthwiseConv(stride).apply(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize("model", [mj.models.small_resnet(10), mj.models.small_mobilenet_v2(10)])
def test_small_models_map_images_to_logits_and_keep_statistics(model):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    logits, updates = apply(variables, x)
    assert logits.shape == (4, 10)
    assert np.isfinite(logits).all()
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
