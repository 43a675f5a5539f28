"""What an optimizer of a model may do to a transfer, and what the joint step hands it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import merge_jax as mj
from merge_jax.training.optimizers import holds_parameters

SHARE = mj.share_transfer({"w": "w"})
PARAMS = {"w": jnp.ones(3), "b": jnp.zeros(())}


def loss_fn(params, model_state, batch, key):
    return jnp.sum((params["w"].astype(jnp.float32) - 0.5) ** 2), (model_state, {})


def begun(optimizer, transfer=SHARE, target=None):
    task = mj.Task(loss_fn, optimizer)
    target = {"w": jnp.ones(3)} if target is None else target
    source = {"w": jnp.full(3, 10.0)}
    state = mj.init_joint_state(jax.random.key(0), None, task, transfer, source_params=source, target_params=target)
    return state, jax.jit(mj.make_joint_step(None, task, transfer))


HOLDING = {
    "cocob": contrib.cocob(),
    "schedule_free": contrib.schedule_free_sgd(1e-2),
    "dog": contrib.dog(),
    "prodigy": contrib.prodigy(),
    "one of two": optax.partition({"a": optax.sgd(0.1), "b": contrib.cocob()}, {"w": "a", "b": "b"}),
}
PLAIN = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-3),
    "hyperparams": optax.inject_hyperparams(optax.adam)(1e-2),
    "every two": optax.MultiSteps(optax.adam(1e-3), 2),
    "lbfgs": optax.lbfgs(),
    "lamb": optax.lamb(1e-3),
}


@pytest.mark.parametrize("name", [*HOLDING, *PLAIN])
def test_optimizers_that_keep_parameters_are_told_from_those_that_do_not(name):
    assert holds_parameters({**HOLDING, **PLAIN}[name], PARAMS) == (name in HOLDING)


@pytest.mark.parametrize("name", ["cocob", "schedule_free"])
def test_of_an_optimizer_that_takes_the_transfer_back_a_run_is_warned(name):
    with pytest.warns(UserWarning, match="stores its own copy of the parameters") as caught:
        state, step = begun(HOLDING[name])
    assert caught[0].filename == __file__
    after, _ = step(state, {"target": {}})
    assert float(after.target.params["w"][0]) < 1, "it keeps what was written: the warning is no longer true"
    begun(HOLDING[name], mj.identity_transfer())  # Nothing is written that could be taken back.


def test_a_plain_optimizer_keeps_what_was_written():
    state, step = begun(optax.sgd(1e-2))
    after, _ = step(state, {"target": {}})
    np.testing.assert_allclose(after.target.params["w"], 10 - 1e-2 * 2 * 9.5, rtol=1e-6)


def test_second_moments_that_never_fall_are_warned_of():
    half = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.warns(UserWarning, match=r"bfloat16 too \(1/0/nu/w\): they do not fall again") as caught:
        state, _ = begun(optax.adamw(1e-3), mj.identity_transfer(), half)
    assert caught[0].filename == __file__
    begun(optax.sgd(1e-3, momentum=0.9), mj.identity_transfer(), {"nu": half["w"], **half})
    begun(optax.adamw(1e-3), mj.identity_transfer())
    zeros, moments = jax.tree.map(jnp.zeros_like, half), state.target.opt_state[0]._replace(nu=half)
    after = optax.scale_by_adam().update(zeros, moments)[1]
    assert float(after.nu["w"][0]) == 1, "it has fallen: the warning is no longer true"


def test_second_moments_whose_squares_are_0_are_warned_of():
    half = {"w": jnp.ones(3, jnp.float16)}
    with pytest.warns(UserWarning, match=r"float16 too \(1/0/nu/w\): squares of small gradients are 0"):
        begun(optax.adamw(1e-3), mj.identity_transfer(), half)
    small = {"w": jnp.full(3, 1e-4, jnp.float16)}
    updates, _ = optax.scale_by_adam().update(small, optax.scale_by_adam().init(half))
    assert not np.isfinite(updates["w"]).any(), "it is finite: the warning is no longer true"


def test_vectors_that_muon_takes_for_a_matrix_are_warned_of():
    """Biases by heads or by layers have two axes; a kernel by heads has three, and goes to Adam."""
    attention = {"query": {"kernel": jnp.ones((4, 2, 2)), "bias": jnp.ones((2, 2))}}
    target = {"w": jnp.ones(3), "attention": attention, "norm": {"scale": jnp.ones((2, 4))}}
    with pytest.warns(UserWarning, match=r"heads or layers \(attention/query/bias, norm/scale\)") as caught:
        begun(contrib.muon(1e-2), mj.identity_transfer(), target)
    assert caught[0].filename == __file__
    named = {"w": None, "attention": {"query": {"kernel": contrib.MuonDimensionNumbers(0, (1, 2)), "bias": None}}}
    told = contrib.muon(1e-2, muon_weight_dimension_numbers={**named, "norm": {"scale": None}})
    begun(told, mj.identity_transfer(), target)
    begun(contrib.muon(1e-2), mj.identity_transfer(), {"w": jnp.ones(3), "fc": {"kernel": jnp.ones((4, 3))}})
    scale = {"scale": target["norm"]["scale"]}
    gradient = {"scale": jnp.array([[1, 1, 1, 1], [1e-3, 2e-3, 1e-3, 1e-3]])}
    updates, _ = contrib.muon(0.1).update(gradient, contrib.muon(0.1).init(scale), scale)
    assert (updates["scale"] > 0).any(), "every step is downhill: the warning is no longer true"


@pytest.mark.filterwarnings("ignore:the optimizer's second moments")
def test_an_update_that_is_not_finite_is_skipped_and_counted():
    """A rate in bfloat16 makes NaN of a finite gradient (Optax, bias correction)."""
    optimizer = optax.inject_hyperparams(optax.adam)(1e-2)
    state, step = begun(optimizer, mj.identity_transfer(), {"w": jnp.ones(3, jnp.bfloat16)})
    for _ in range(2):
        state, metrics = step(state, {"target": {}})
        assert np.isfinite(np.asarray(state.target.params["w"], np.float32)).all()
        moved = not np.array_equal(state.target.params["w"], np.ones(3))
        assert metrics["target/skipped"] == (not moved)


def test_an_optimizer_that_makes_nan_of_a_finite_gradient_changes_nothing():
    bad = optax.stateless(lambda updates, params: jax.tree.map(lambda leaf: leaf * jnp.nan, updates))
    state, step = begun(bad, mj.identity_transfer())
    after, metrics = step(state, {"target": {}})
    np.testing.assert_array_equal(after.target.params["w"], np.ones(3))
    assert metrics["target/skipped"] == 1


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.apply_if_finite(optax.sgd(0.1), 5)], ids=["plain", "finite"])
def test_gradients_that_are_accumulated_lose_what_is_not_finite_only(inner):
    def loss_fn(params, model_state, batch, key):
        return batch * jnp.sum(params["w"]), (model_state, {})

    task, same = mj.Task(loss_fn, optax.MultiSteps(inner, 2)), mj.identity_transfer()
    state = mj.init_joint_state(
        jax.random.key(0), None, task, same, source_params={}, target_params={"w": jnp.zeros(1)}
    )
    step = jax.jit(mj.make_joint_step(None, task, same))
    for value in (1.0, 1.0, 1.0, jnp.nan, 1.0, 1.0, 1.0):
        state, _ = step(state, {"target": jnp.float32(value)})
    np.testing.assert_allclose(state.target.params["w"], -0.3, rtol=1e-6)  # Six gradients, by two.


ASKING = {"polyak_sgd": optax.polyak_sgd(), "lbfgs": optax.lbfgs(), "momo": contrib.momo()}
ASKING["sam"] = contrib.sam(optax.sgd(0.1), optax.sgd(0.1))  # It takes no loss.


@pytest.mark.parametrize("name", ["polyak_sgd", pytest.param("lbfgs", marks=pytest.mark.slow), "momo", "sam"])
def test_optimizers_get_what_they_ask_for_and_no_more(name):
    """All come near the minimum of a square in a few steps."""
    state, step = begun(ASKING[name], mj.identity_transfer())
    losses = []
    for _ in range(12):
        state, metrics = step(state, {"target": {}})
        losses.append(float(metrics["target/loss"]))
    assert losses[-1] < 0.2 * losses[0]


def test_the_value_for_a_line_search_is_that_of_all_devices():
    def update(updates, state, params, value_fn, **_):
        return updates, value_fn(params)

    asking = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)

    def loss_fn(params, model_state, batch, key):
        return jnp.mean(batch) * jnp.sum(params["w"]), (model_state, {})

    task, same = mj.Task(loss_fn, asking), mj.identity_transfer()
    state = mj.init_joint_state(jax.random.key(0), None, task, same, source_params={}, target_params={"w": jnp.ones(3)})
    step = mj.make_joint_step(None, task, same, axis_name="devices")
    batch = jnp.array([[1.0], [3.0]])
    after, _ = jax.vmap(step, (None, 0), axis_name="devices")(state, {"target": batch})
    np.testing.assert_allclose(after.target.opt_state, [6.0, 6.0])


def test_an_optimizer_of_other_parameters_is_refused():
    lookahead = optax.lookahead(optax.sgd(0.1), 5, 0.5)
    state, step = begun(lookahead, mj.identity_transfer())
    with pytest.raises(ValueError, match=r"the optimizer cannot update these parameters .* \(AttributeError: .*fast"):
        step(state, {"target": {}})


def test_a_frozen_source_may_have_leaves_that_are_no_floats():
    task = mj.Task(loss_fn, optax.sgd(0.1))
    source = {"w": jnp.full(3, 2.0), "ids": jnp.arange(4), "key": jax.random.key(0)}
    state = mj.init_joint_state(
        jax.random.key(0), None, task, SHARE, source_params=source, target_params={"w": jnp.ones(3)}
    )
    _, metrics = mj.make_joint_step(None, task, SHARE)(state, {"target": {}})
    assert metrics["adapter/transferred"] == 1


def test_what_an_init_computes_inside_is_looked_into_and_what_it_cannot_trace_is_let_be():
    adam = optax.adam(0.1)
    assert not holds_parameters(optax.GradientTransformation(jax.jit(adam.init), adam.update), PARAMS)
    cocob = contrib.cocob()
    assert holds_parameters(optax.GradientTransformation(jax.jit(cocob.init), cocob.update), PARAMS)
    reads = optax.GradientTransformation(lambda params: float(jnp.sum(params["w"])), adam.update)
    assert not holds_parameters(reads, PARAMS)


@pytest.mark.parametrize("name", ["lbfgs", "cocob"])
@pytest.mark.filterwarnings("ignore:the target's optimizer stores its own copy")
def test_a_state_of_any_optimizer_can_be_donated(name):
    optimizer = {**PLAIN, **HOLDING}[name]
    task, same = mj.Task(loss_fn, optimizer), mj.identity_transfer()
    params = {"w": jnp.ones(3)}
    state = mj.init_joint_state(jax.random.key(0), None, task, same, source_params={}, target_params=params)
    step = jax.jit(mj.make_joint_step(None, task, same), donate_argnums=0)
    state, _ = step(state, {"target": {}})
    assert np.isfinite(np.asarray(state.target.params["w"])).all()
