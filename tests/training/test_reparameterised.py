import functools

import chex
import jax
import numpy as np
import optax
import pytest

import merge_jax as mj
from tests import helpers

OPERATORS = mj.linear_operator_transfer(helpers.ROUTES)
OPTIMIZER = optax.sgd(0.5)  # So that a step shows the gradient.


def step_of(transfer, *, frozen=False):
    source = None if frozen else helpers.task(helpers.SOURCE)
    return mj.make_reparameterised_step(source, helpers.task(helpers.TARGET), transfer, adapter_optimizer=OPTIMIZER)


@functools.cache
def both():
    """The step of both models."""
    return jax.jit(step_of(OPERATORS))


def test_one_backward_pass_moves_target_and_adapter():
    """Against the gradient of the loss of what `bake` gives, with the step's own keys."""
    state, batches, step = helpers.initial_state(OPERATORS, adapter_optimizer=OPTIMIZER), helpers.batches(1), both()
    state, _ = step(state, helpers.batches(0))  # The gate is open now.
    after, metrics = step(state, batches)
    _, target_key, transfer_key = jax.random.split(jax.random.fold_in(state.key, 1), 3)
    task = helpers.task(helpers.TARGET)

    @jax.jit
    @jax.value_and_grad
    def loss(both):
        merged = OPERATORS.apply(both[0], state.source.params, both[1], key=transfer_key)
        return task.loss_fn(merged, state.target.model_state, batches["target"], target_key)[0]

    value, (adapter_grads, target_grads) = loss((state.adapter.params, state.target.params))
    stepped = jax.tree.map(lambda p, g: p - 0.5 * g, state.adapter.params, adapter_grads)
    chex.assert_trees_all_close(after.adapter.params, stepped, atol=1e-5)
    updates, _ = task.optimizer.update(target_grads, state.target.opt_state, state.target.params)
    chex.assert_trees_all_close(after.target.params, optax.apply_updates(state.target.params, updates), atol=1e-5)
    np.testing.assert_allclose(metrics["target/loss"], value, rtol=1e-5)
    assert np.abs(target_grads["hidden"]["kernel"]).max() > 0


def test_the_source_learns_as_in_the_joint_step_and_metrics_have_the_same_names():
    state = helpers.initial_state(OPERATORS, adapter_optimizer=OPTIMIZER)
    after, metrics = both()(state, helpers.batches(0))
    joint, joint_metrics = helpers.joint_step(OPERATORS, adapter_optimizer=OPTIMIZER)(state, helpers.batches(0))
    chex.assert_trees_all_close(after.source, joint.source, atol=1e-6)
    assert metrics.keys() == joint_metrics.keys()
    assert int(after.step) == 1


def test_baking_gives_plain_parameters_and_changes_no_output():
    state = helpers.initial_state(OPERATORS, frozen=True, adapter_optimizer=OPTIMIZER)
    step = jax.jit(step_of(OPERATORS, frozen=True))
    for i in range(3):
        state, _ = step(state, {"target": helpers.batch(i)})
    baked = mj.bake(OPERATORS, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(baked, state.target.params)
    expected = OPERATORS.apply(state.adapter.params, state.source.params, state.target.params)
    chex.assert_trees_all_equal(baked, expected)
    # What the transfer makes was never written into the target.
    assert np.abs(baked["hidden"]["kernel"] - state.target.params["hidden"]["kernel"]).max() > 1e-3


@pytest.mark.slow
def test_a_gradient_step_lowers_the_loss_of_the_baked_target():
    state = helpers.initial_state(OPERATORS, frozen=True)
    step = jax.jit(mj.make_reparameterised_step(None, helpers.task(helpers.TARGET), OPERATORS))
    losses = []
    for _ in range(20):
        state, metrics = step(state, {"target": helpers.batch(0)})
        losses.append(float(metrics["target/loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_a_step_and_a_state_of_different_sources_are_refused():
    state = helpers.initial_state(OPERATORS, adapter_optimizer=OPTIMIZER)
    with pytest.raises(ValueError, match="the step was made with a frozen source"):
        jax.eval_shape(step_of(OPERATORS, frozen=True), state, helpers.batches(0))
    with pytest.raises(ValueError, match="batches must hold one for 'source'"):
        jax.eval_shape(step_of(OPERATORS), state, {"target": helpers.batch(0)})
