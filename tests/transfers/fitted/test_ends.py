"""Refit: what is said to be explained at a layer's end is what the target then computes there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(150, 6)), jnp.float32)
IMAGES = jnp.asarray(RNG.normal(size=(30, 4, 5, 2)), jnp.float32)


def drawn(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def explained(outputs, wanted):
    outputs, wanted = np.asarray(outputs), np.asarray(wanted)
    return 1 - np.square(outputs - wanted).sum() / np.square(wanted - wanted.mean(0)).sum()


class NormOfSum(nn.Module):
    """A norm of a sum, of data and a layer, or of two layers; the layer may have a norm of its own."""

    width: int
    layers: int
    inner: bool

    @nn.compact
    def __call__(self, x, *, train=False):
        hidden = nn.relu(nn.Dense(self.width, name="hidden")(x))
        left = nn.Dense(4, name="left")(x)
        right = nn.Dense(4, name="right")(hidden)
        if self.inner:
            right = nn.BatchNorm(not train, name="inner")(right)
        total = (nn.relu(left) if self.layers == 1 else left) + right
        return nn.BatchNorm(not train, name="norm")(total)


@pytest.mark.parametrize(("layers", "inner"), [pytest.param(1, False, marks=pytest.mark.slow), (2, False), (1, True)])
def test_a_norm_of_a_sum_has_not_the_statistics_of_one_layer(layers, inner):
    source, target = (NormOfSum(width, layers, inner) for width in (16, 6))
    source_variables, target_variables = (
        model.init(jax.random.key(seed), X) for seed, model in enumerate((source, target))
    )
    source_variables = mj.reset_statistics(source.apply, source_variables, X)
    made = mj.refit({"**": "**"}, source.apply, target.apply, source_variables, target_variables, X)
    real = explained(target.apply(made.variables, X), source.apply(source_variables, X))
    np.testing.assert_allclose(made.solved["params/right/kernel"], real, atol=1e-3)
    for name, stays in source_variables["batch_stats"]["norm"].items():
        np.testing.assert_allclose(made.variables["batch_stats"]["norm"][name], stays, rtol=1e-5)
    if inner:
        own = mj.reset_statistics(target.apply, made.variables, X)["batch_stats"]["inner"]
        for name, value in own.items():
            np.testing.assert_allclose(made.variables["batch_stats"]["inner"][name], value, rtol=1e-3, atol=1e-4)


def branched(params, x):
    branch = jax.nn.relu(x @ params["up"]) @ params["down"] + params["bias"][None]
    return x @ params["straight"] + params["factor"].reshape(1, -1) * branch


@pytest.mark.parametrize("size", [(1,), (4,)])
def test_a_branch_times_zero_explains_nothing(size):
    shapes = {"up": (6, 16), "down": (16, 4), "bias": (4,), "straight": (6, 4)}
    source, target = ({**drawn(seed, **shapes), "factor": jnp.full(size, 1.0 - seed)} for seed in (0, 1))
    made = mj.refit({"[!f]*": "[!f]*"}, branched, branched, source, target, X)
    real = explained(branched(made.variables, X), branched(source, X))
    np.testing.assert_allclose(made.solved["straight"], real, atol=1e-3)
    x, outputs = np.asarray(X), np.asarray(branched(source, X))
    wanted, _, _, _ = np.linalg.lstsq(x - x.mean(0), outputs - outputs.mean(0))
    np.testing.assert_allclose(made.variables["straight"], wanted, atol=0.1)


@pytest.mark.parametrize("numbers", [("HWNC", "HWIO", "HWNC"), ("NHWC", "HWIO", "NWHC")])
def test_a_convolution_may_have_its_axes_in_any_order(numbers):
    def model(params, images):
        given = jnp.einsum(f"nhwc->{numbers[0].lower()}", images)
        made = jax.lax.conv_general_dilated(given, params["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.einsum(f"{numbers[2].lower()}->nhwc", jnp.tanh(made))

    source, target = (drawn(seed, kernel=(3, 3, 2, 3)) for seed in (0, 1))
    target["kernel"] = 0.5 * source["kernel"]
    made = mj.refit({"**": "**"}, model, model, source, target, IMAGES, batch_size=7)
    np.testing.assert_allclose(made.solved["kernel"], 1, atol=1e-3)
    np.testing.assert_allclose(made.variables["kernel"], source["kernel"], atol=0.01)
