import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from tests import helpers

TRANSFER = mj.linear_operator_transfer(helpers.ROUTES)
SEEDS, STEPS = 3, 4


def state_of(seed):
    """Returns an initial state of which nothing is that of another seed."""
    source_params, source_state = helpers.variables(helpers.SOURCE, 2 * seed)
    target_params, target_state = helpers.variables(helpers.TARGET, 2 * seed + 1)
    return mj.init_joint_state(
        jax.random.key(seed, impl="threefry2x32"),
        helpers.task(helpers.SOURCE),
        helpers.task(helpers.TARGET),
        TRANSFER,
        source_params=source_params,
        source_state=source_state,
        target_params=target_params,
        target_state=target_state,
        adapter_optimizer=OPTIMIZER,
    )


# Plain, so that rounding stays rounding: Adam makes a whole step of a gradient that is nothing but rounding.
OPTIMIZER = optax.sgd(0.1)


def data_of(seed):
    arrays = {"source": helpers.batch(10 * seed, size=40), "target": helpers.batch(10 * seed + 1, size=50)}
    random = np.random.default_rng(seed)
    return arrays, {
        role: random.integers(0, len(array["label"]), (STEPS, 16)).astype(np.int32) for role, array in arrays.items()
    }


def comparable(state):
    return state.replace(key=jax.random.key_data(state.key))


def run_together():
    epoch = mj.make_epoch(helpers.joint_step(TRANSFER, cycle=2, adapter_optimizer=OPTIMIZER))
    states = [state_of(seed) for seed in range(SEEDS)]
    arrays, indices = jax.tree.map(lambda *seeds: np.stack(seeds), *(data_of(seed) for seed in range(SEEDS)))
    return epoch, mj.training.over_seeds(epoch), mj.training.stack_seeds(states), arrays, indices


@pytest.mark.slow
def test_seeds_side_by_side_come_to_what_each_would_alone():
    epoch, together, state, arrays, indices = run_together()
    # In two parts, as a run with a report in between.
    compiled = jax.jit(together, donate_argnums=0)
    state, first = compiled(state, arrays, indices, 1)
    rest = jax.tree.map(lambda rows: np.roll(rows, -1, axis=1), indices)
    state, second = compiled(state, arrays, rest, STEPS - 1)
    sums = jax.tree.map(jnp.add, first, second)
    assert state.step.shape == ()
    assert int(state.step) == STEPS
    assert all(value.shape == (SEEDS,) for value in sums.values())
    assert sums["adapter/transferred"].tolist() == [2] * SEEDS
    alone = jax.jit(epoch)
    for seed, own in enumerate(mj.training.unstack_seeds(state)):
        expected, expected_sums = alone(state_of(seed), *data_of(seed), STEPS)
        chex.assert_trees_all_close(comparable(own), comparable(expected), atol=1e-5)
        chex.assert_trees_all_close(jax.tree.map(lambda value: value[seed], sums), expected_sums, atol=1e-5)  # noqa: B023
    assert len(set(sums["target/loss"].tolist())) == SEEDS


def test_side_by_side_too_only_steps_that_transfer_pay_for_it():
    # With a step each, the choice between both kinds of step would turn into both of them and a selection.
    _, together, *arguments = run_together()
    assert "= cond[" in str(jax.make_jaxpr(together)(*arguments, 1))


def test_what_is_stacked_comes_back():
    states = [state_of(seed).replace(step=jnp.int32(3)) for seed in range(SEEDS)]
    together = mj.training.stack_seeds(states)
    assert together.step.shape == ()
    assert together.key.shape == (SEEDS,)
    shapes = {leaf.shape[0] for leaf in jax.tree.leaves(together.replace(step=()))}
    assert shapes == {SEEDS}
    back = mj.training.unstack_seeds(together)
    assert len(back) == SEEDS
    for own, expected in zip(back, states, strict=True):
        chex.assert_trees_all_equal(comparable(own), comparable(expected))


def test_each_state_can_be_donated_on_its_own():
    advance = jax.jit(lambda state: state.replace(step=state.step + 1), donate_argnums=0)
    states = [state_of(seed) for seed in range(2)]
    together = advance(mj.training.stack_seeds(states))
    assert [int(state.step) for state in states] == [0, 0]
    alone = [advance(state) for state in mj.training.unstack_seeds(together)]
    assert [int(state.step) for state in alone] == [2, 2]
    assert int(together.step) == 1


def test_states_at_different_steps_are_refused():
    first, second = state_of(0), state_of(1).replace(step=jnp.int32(2))
    with pytest.raises(ValueError, match=r"seeds must stand at the same step, got \[0, 2\]"):
        mj.training.stack_seeds([first, second])
    with pytest.raises(ValueError, match=r"seeds must stand at the same step, got \[\]"):
        mj.training.stack_seeds([])
