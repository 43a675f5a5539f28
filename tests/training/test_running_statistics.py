"""Statistics of BatchNorm that are reset to those of given inputs, against NumPy and against training mode."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from tests.helpers import jitted_init


class Net(nn.Module):
    """Two layers, each with a BatchNorm of a momentum of its own; dropout before the first."""

    momentum: tuple[float, float] = (0.9, 0.5)
    frozen: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(x)
        norm = nn.BatchNorm(not train or self.frozen, momentum=self.momentum[0], axis_name=self.axis_name, name="first")
        x = nn.relu(norm(x))
        x = nn.Dense(4, name="hidden")(x)
        return nn.BatchNorm(not train, momentum=self.momentum[1], axis_name=self.axis_name, name="second")(x)


def inputs(size=50, seed=0):
    random = np.random.default_rng(seed)
    return (random.normal(size=(size, 3)) * [1, 2, 3] + [0, 10, -100]).astype(np.float32)


def started(net=None):
    variables = jitted_init(net or Net(), 0, jnp.zeros((2, 3)))
    # Far from anything, as a copy from another model may be.
    far = jax.tree.map(lambda leaf: leaf + 1e5, variables["batch_stats"])
    return {**variables, "batch_stats": far}


@pytest.mark.parametrize("batch_size", [512, 50, 16, 7])
def test_the_first_layer_has_mean_and_variance_of_all_inputs(batch_size):
    x, variables = inputs(), started()
    new = mj.reset_statistics(Net().apply, variables, x, batch_size=batch_size)
    first = new["batch_stats"]["first"]
    np.testing.assert_allclose(first["mean"], x.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first["var"], x.var(0), rtol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_in_half_precision_are_those_of_the_inputs(dtype):
    x, variables = inputs(), started()
    variables["batch_stats"] = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), variables["batch_stats"])
    net = Net(momentum=(0.999, 0.99))  # Near 1, bfloat16 has only 0.996 and 1.
    first = mj.reset_statistics(net.apply, variables, x * 0.01, batch_size=16)["batch_stats"]["first"]
    assert {leaf.dtype for leaf in first.values()} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(first["mean"].astype(jnp.float32), 0.01 * x.mean(0), rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(first["var"].astype(jnp.float32), 1e-4 * x.var(0), rtol=1e-2)


def test_evaluation_then_computes_what_training_does_on_the_whole():
    x, variables = inputs(), started()
    new = mj.reset_statistics(Net().apply, variables, x)
    hidden = Net().apply(new, x, mutable="intermediates", capture_intermediates=True)[1]["intermediates"]["hidden"]
    found = new["batch_stats"]["second"]
    np.testing.assert_allclose(found["mean"], hidden["__call__"][0].mean(0), atol=1e-4)
    np.testing.assert_allclose(found["var"], hidden["__call__"][0].var(0), rtol=1e-3)


def test_deeper_layers_depend_little_on_the_batch_size():
    x, variables = inputs(400), started()
    whole, parts = (mj.reset_statistics(Net().apply, variables, x, batch_size=size) for size in (400, 100))
    both = (one["batch_stats"]["second"]["var"] for one in (whole, parts))
    np.testing.assert_allclose(*both, rtol=0.1)


def test_layers_that_training_leaves_alone_stay_and_are_used():
    net, x = Net(frozen=True), inputs()
    variables = started(net)
    new = mj.reset_statistics(net.apply, variables, x)
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"]["first"], variables["batch_stats"]["first"])
    hidden = net.apply(new, x, mutable="intermediates", capture_intermediates=True)[1]["intermediates"]["hidden"]
    np.testing.assert_allclose(new["batch_stats"]["second"]["mean"], hidden["__call__"][0].mean(0), atol=1e-4)


@pytest.mark.slow
class Attended(nn.Module):
    """Beside a BatchNorm, what training mode does else: spectral norms are updated, attention drops weights."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.SpectralNorm(nn.Dense(4, name="hidden"), name="spectral")(x, update_stats=train)
        x = nn.MultiHeadDotProductAttention(2, dropout_rate=self.rate, deterministic=not train, name="attention")(x)
        return nn.BatchNorm(not train, name="norm")(x)


def test_statistics_that_are_no_averages_are_updated_and_attention_drops_nothing():
    x = inputs(60).reshape(12, 5, 3) * 0.01
    variables = jitted_init(Attended(), 0, x)
    new = mj.reset_statistics(Attended().apply, variables, x)["batch_stats"]
    _, updates = Attended(rate=0.0).apply(variables, x, train=True, mutable=["batch_stats"])
    old, updated = variables["batch_stats"], updates["batch_stats"]
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, rtol=1e-5), new["spectral"], updated["spectral"])
    batch_mean = (updated["norm"]["mean"] - 0.99 * old["norm"]["mean"]) / 0.01
    np.testing.assert_allclose(new["norm"]["mean"], batch_mean, atol=1e-4)


def test_a_model_of_the_library_inside_of_jit():
    model = mj.models.small_mobilenet_v2(10, num_stages=1)
    images = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    variables = mj.models.initialize(model, jax.random.key(0), images)

    @jax.jit
    def evaluated_and_trained(variables, images):
        new = mj.reset_statistics(model.apply, variables, images)
        return model.apply(new, images), model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    np.testing.assert_allclose(*evaluated_and_trained(variables, images), atol=1e-4)


def test_a_model_that_averages_over_devices():
    net, x = Net(axis_name="devices"), inputs()
    variables = started()
    new = mj.reset_statistics(net.apply, variables, x, axis_name="devices")
    expected = mj.reset_statistics(Net().apply, variables, x)
    jax.tree.map(lambda *both: np.testing.assert_allclose(*both, rtol=1e-5), new, expected)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(2)(x)


def test_a_model_without_statistics_comes_back_as_it_is():
    variables = jitted_init(Plain(), 0, jnp.zeros((1, 3)))
    assert mj.reset_statistics(Plain().apply, variables, inputs()) == variables


@pytest.mark.parametrize(
    ("change", "arrays", "message"),
    [
        ({}, (), r"of as many examples, got none"),
        ({}, (inputs(0),), r"got \[0, 3\]"),
        ({}, (inputs(4), inputs(5)), r"got \[4, 3\], \[5, 3\]"),
        ({"batch_stats": {}}, (inputs(4),), "reads a collection that it was not given: .*, got 'params' "),
        ({"params": None}, (inputs(4),), r"variables must be \{\"params\": \.\.\."),
    ],
)
def test_what_does_not_fit_is_named(change, arrays, message):
    variables = {name: part for name, part in {**started(), **change}.items() if part}
    with pytest.raises(ValueError, match=message):
        mj.reset_statistics(Net().apply, variables, *arrays)


def test_a_function_without_training_mode_is_refused():
    with pytest.raises(
        ValueError, match=r"called with train, mutable, rngs, and the given function takes \(variables, x"
    ):
        mj.reset_statistics(lambda variables, x: Net().apply(variables, x), started(), inputs())
