import importlib
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import merge_jax as mj
from merge_jax.study.choices import ImageModelName, VisionModelName
from merge_jax.study.cli import parse
from merge_jax.study.models.code import model_code
from merge_jax.study.models.images import make_model, make_vision_encoder
from tests.helpers import jitted_init


def shapes(tree):
    return {path: (leaf.shape, leaf.dtype) for path, leaf in mj.flatten(tree).items()}


def made(code):
    """The variables, as shapes, and the apply function that the lines make."""
    names = {"jax": jax, "jnp": jnp, "mj": mj}
    exec(code, names)
    return names["like"], names["apply"]


@pytest.mark.parametrize(
    "experiment",
    ["cross_structure", "cross_task", pytest.param("cross_modal", marks=pytest.mark.slow), "self_transfer"],
)
def test_the_code_of_a_role_makes_its_variables(experiment):
    module = importlib.import_module(f"experiments.{experiment}")
    scenario = module.build(parse(module.PRESETS, "", "", ["smoke"]))
    for role in filter(None, (scenario.source, scenario.target)):
        like, _ = made(role.code)
        params, model_state = jax.eval_shape(role.init, jax.random.key(0))
        assert shapes(like) == shapes({"params": params, **model_state})


@pytest.mark.slow
@pytest.mark.parametrize("name", [*typing.get_args(ImageModelName)])
def test_every_image_model_has_code(name):
    model = make_model(name, 7, stages=2, dtype=jnp.bfloat16, axis_name="batch")
    like, apply = made(model_code(model, {"jnp.zeros((1, 32, 32, 3))": "images"}))
    assert shapes(like) == shapes(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    outputs = jax.eval_shape(apply, like, jnp.zeros((5, 32, 32, 3)))
    assert outputs.shape == (5, 7)


@pytest.mark.parametrize("name", [*typing.get_args(VisionModelName)])
def test_every_vision_transformer_has_code(name):
    size = 224 if name == "vit_base" else 16
    model = mj.models.ImageClassifier(make_vision_encoder(name, size), 7)
    like, _ = made(model_code(model, {f"jnp.zeros((1, {size}, {size}, 3))": "images"}))
    assert shapes(like) == shapes(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3))))


def test_the_code_computes_what_the_model_does():
    model, pixels = mj.models.small_mobilenet_v2(3, num_stages=1), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    variables = jitted_init(model, 1, jnp.zeros((1, 8, 8, 3)))
    _, apply = made(model_code(model, {"jnp.zeros((1, 8, 8, 3))": "images"}, pixels))
    expected = mj.on_pixels(model.apply, *pixels)(variables, images)
    np.testing.assert_allclose(apply(variables, images), expected, rtol=1e-5, atol=1e-6)


class Own(nn.Module):
    activation: Callable = nn.relu
    norm: nn.Module | None = None

    @nn.compact
    def __call__(self, x):
        return self.activation(nn.Dense(3)(self.norm(x)))


def test_a_model_of_ones_own_is_imported_from_where_it_is():
    model = Own(nn.gelu, nn.LayerNorm(use_bias=False))
    code = model_code(model, {"jnp.zeros((1, 4))": "numbers"})
    like, apply = made(code)
    variables = jitted_init(model, 0, jnp.zeros((1, 4)))
    assert shapes(like) == shapes(variables)
    x = jnp.arange(8.0).reshape(2, 4) ** 2  # Of ones, the norm would leave nothing.
    np.testing.assert_array_equal(apply(variables, x), model.apply(variables, x))
    assert "from tests.study.test_model_code import Own\n" in code
    assert "mj.models" not in code


def test_a_class_that_no_import_reaches_is_told():
    class Hidden(Own):
        pass

    code = model_code(Hidden(norm=nn.LayerNorm()), {"jnp.zeros((1, 4))": "numbers"})
    assert ".Hidden is of tests.study.test_model_code; no import reaches it." in code
