"""The start without labels: what it draws to what, on which inputs, and by which parameters."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from tests.helpers import jitted_init
from tests.objectives.test_features import Net

SOURCE, TARGET = Net(8), Net(5)
LAYERS = {"first": "first", "features": "features"}
X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)


BOTH = [jitted_init(net, seed, X[:2]) for seed, net in enumerate((SOURCE, TARGET))]


def both():
    return list(BOTH)


def prepare(*inputs, layers=None, key=0, **options):
    options = {"steps": 30, "batch_size": 20, **options}
    inputs = inputs or (X,)
    return mj.prepare(jax.random.key(key), layers or LAYERS, SOURCE.apply, TARGET.apply, *both(), *inputs, **options)


@partial(jax.jit, static_argnums=1)
def disagreement(target, objective=mj.objectives.disagreement):
    source, _ = both()
    observed = [
        mj.objectives.with_features(net.apply, layers)(variables, X)[1]
        for net, layers, variables in ((SOURCE, LAYERS.values(), source), (TARGET, LAYERS, target))
    ]
    return objective(*reversed(observed))


def assert_near(one, other):
    """Kernels alone: the gradient of the bias before the norm is rounding, which Adam makes steps of."""
    np.testing.assert_allclose(one["params"]["first"]["kernel"], other["params"]["first"]["kernel"], atol=1e-3)


@pytest.mark.parametrize(
    "objective",
    [mj.objectives.disagreement, pytest.param(mj.objectives.redundancy_suppression, marks=pytest.mark.slow)],
)
def test_features_come_near_and_statistics_move(objective):
    _, target = both()
    new = prepare(objective=objective, learning_rate=0.05)
    assert disagreement(new, objective) < 0.7 * disagreement(target, objective)
    assert new.keys() == target.keys()
    assert np.abs(new["batch_stats"]["norm"]["mean"] - target["batch_stats"]["norm"]["mean"]).max() > 0.01
    # No layer that agrees is behind the head.
    np.testing.assert_array_equal(new["params"]["last"]["kernel"], target["params"]["last"]["kernel"])


def test_the_key_says_all_and_pairs_may_be_a_list():
    one, same, other = prepare(), prepare(layers=list(LAYERS.items())), prepare(key=1)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert np.abs(one["params"]["first"]["kernel"] - other["params"]["first"]["kernel"]).max() > 1e-4


@pytest.mark.slow
def test_features_that_are_kept_are_those_of_the_batches():
    kept, anew = prepare(), prepare(compare_on=lambda x: x)
    assert_near(kept, anew)


def test_on_mixtures_of_inputs():
    _, target = both()
    new = prepare(X[:10], compare_on=mj.objectives.mixed)
    assert disagreement(new) < disagreement(target)


def test_the_first_step_against_a_gradient_by_hand():
    source, target = both()
    loss = mj.feature_agreement(TARGET.apply, list(LAYERS), weight=1.0)
    teacher = mj.features_teacher(SOURCE.apply, list(LAYERS.values()))
    batch = teacher(source["params"], {"batch_stats": source["batch_stats"]}, {"image": X})
    state = {"batch_stats": target["batch_stats"]}
    gradient = jax.jit(jax.grad(lambda params: loss(params, state, batch, jax.random.key(0))[0]))(target["params"])
    new = prepare(steps=1, batch_size=100, learning_rate=0.01)["params"]
    # Adam's first step is the sign of the gradient.
    moved = (new["first"]["kernel"] - target["params"]["first"]["kernel"]) / 0.01
    np.testing.assert_allclose(moved, -np.sign(gradient["first"]["kernel"]), atol=0.01)


def test_an_adapter_learns_in_the_place_of_parameters_and_is_applied_once():
    _, target = both()
    transfer = mj.linear_operator_transfer({"first/kernel": "first/kernel"})
    new = prepare(transfer=transfer)
    assert disagreement(new) < disagreement(target)
    for path, leaf in mj.flatten(target["params"]).items():
        changed = not np.array_equal(leaf, mj.flatten(new["params"])[path])
        assert changed == (path == "first/kernel")


@pytest.mark.slow
def test_inside_of_jit_at_any_rate():
    source, target = both()
    run = jax.jit(
        lambda rate: mj.prepare(
            jax.random.key(0), LAYERS, SOURCE.apply, TARGET.apply, source, target, X, steps=3, learning_rate=rate
        )
    )
    expected = prepare(steps=3, batch_size=50, learning_rate=0.02)
    assert_near(run(0.02), expected)


class Averaging(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(not train, axis_name="devices", name="norm")(nn.Dense(5, name="first")(x))
        self.sow("intermediates", "features", x)
        return x


def test_models_that_average_over_devices():
    target = jitted_init(Averaging(), 1, X[:2])
    layers, source = {"features": "features"}, both()[0]
    new = mj.prepare(
        jax.random.key(0), layers, SOURCE.apply, Averaging().apply, source, target, X, steps=2, axis_name="devices"
    )
    assert np.isfinite(new["params"]["first"]["kernel"]).all()
    assert not np.array_equal(new["batch_stats"]["norm"]["mean"], target["batch_stats"]["norm"]["mean"])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((X[:1],), {}, "two examples at least"),
        ((X, X[:3]), {}, r"got \[60, 4\], \[3, 4\]"),
        ((), {"layers": {"furst": "first"}}, "the target: the model has no layer 'furst'.*first"),
        ((), {"layers": {"first": "furst"}}, "the source: the model has no layer 'furst'"),
        ((), {"layers": "first"}, "layers must be one or more pairs"),
        ((X[:, :3],), {}, r"the source: the variables do not fit the model and inputs of \[\[60, 3\]\]"),
        ((np.array(["a text"] * 60),), {}, "input 0 must be numbers, got an array of <U6"),
        ((), {"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ((), {"steps": 0}, "steps must be a whole number of at least 1"),
        ((), {"transfer": 1}, "the transfer must be a Transfer"),
    ],
)
def test_what_does_not_fit_is_named(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(*inputs, **options)


def test_variables_of_float32_are_asked_for():
    source, target = both()
    with pytest.raises(ValueError, match="target_variables must be"):
        mj.prepare(jax.random.key(0), LAYERS, SOURCE.apply, TARGET.apply, source, target["params"], X)
    half = {**target, "params": jax.tree.map(lambda leaf: leaf.astype(jnp.float16), target["params"])}
    with pytest.raises(ValueError, match=r"the target's parameters are float16 \(.*\), where Adam's updates are not"):
        mj.prepare(jax.random.key(0), LAYERS, SOURCE.apply, TARGET.apply, source, half, X)


def test_numbers_that_are_not_finite_are_told():
    with pytest.raises(mj.NumericFaultError, match="input 0 has values that are not finite"):
        prepare(np.where(X > 2, np.nan, X))
    with pytest.raises(mj.NumericFaultError, match=r"a learning_rate below .* may help"):
        prepare(learning_rate=3e38)
    assert jnp.isfinite(prepare()["params"]["first"]["kernel"]).all()


def test_a_model_in_bfloat16_keeps_its_types_and_its_statistics_are_those_of_the_inputs():
    source, target = (jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), one) for one in both())
    arguments = jax.random.key(0), LAYERS, SOURCE.apply, TARGET.apply, source
    new = mj.prepare(*arguments, target, X, steps=200, batch_size=60, learning_rate=1e-6)  # The parameters stay.
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, target)
    found, whole = (
        one["batch_stats"]["norm"]["mean"].astype(jnp.float32)
        for one in (new, mj.reset_statistics(TARGET.apply, new, X))
    )
    np.testing.assert_allclose(found, whole * (1 - 0.99**200), rtol=0.01, atol=1e-3)
