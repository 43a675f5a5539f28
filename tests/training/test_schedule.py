"""Which steps transfer: the joint step, the plan and a count all ask one place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from tests import helpers


def steps_of(transfer_steps, num_steps):
    """By number, as an array, and traced: all three have to agree."""
    by_number = [bool(transfer_steps.includes(i)) for i in range(num_steps)]
    np.testing.assert_array_equal(transfer_steps.includes(np.arange(num_steps)), by_number)
    traced = jax.jit(transfer_steps.includes)
    assert [bool(traced(jnp.int32(i))) for i in range(num_steps)] == by_number
    return [i for i, transfers in enumerate(by_number) if transfers]


@pytest.mark.parametrize(("cycle", "stop", "num_steps", "expected"), [
    (3, 1.0, 8, [0, 3, 6]),
    (3, 0.5, 8, [0, 3]),
    (2, 0.0, 8, []),
    (1, 0.1, 8, [0]),
    (1, 0.4, 6, [0, 1]),  # 2.4 rounds to 2.
])  # fmt: skip
def test_steps_follow_cycle_and_stop(cycle, stop, num_steps, expected):
    transfer_steps = mj.TransferSteps(cycle, stop, num_steps)
    assert steps_of(transfer_steps, num_steps) == expected
    assert transfer_steps.count() == len(expected)


def test_a_tenth_of_305_steps_is_thirty_of_them():
    """Rounded as Python rounds a half, once, for everybody: the plan said 31."""
    assert mj.TransferSteps(1, 0.1, 305).count() == 30


def test_a_cycle_that_changes_is_read_at_each_transfer():
    """From 1 to 4 over 10 steps: 1, 1.3, 1.6 -> 2, 2.2 -> 2, 2.8 -> 3 steps on from steps 0, 1, 2, 4, 6."""
    transfer_steps = mj.TransferSteps(optax.linear_schedule(1, 4, 10), 1.0, 10)
    assert steps_of(transfer_steps, 10) == [0, 1, 2, 4, 6, 9]
    assert not transfer_steps.includes(jnp.int32(10))
    assert steps_of(mj.TransferSteps(optax.linear_schedule(1, 4, 10), 0.5, 10), 10) == [0, 1, 2, 4]


def test_a_cycle_of_less_than_a_step_is_every_step():
    assert steps_of(mj.TransferSteps(optax.constant_schedule(0.2), 1.0, 4), 4) == [0, 1, 2, 3]


def test_the_joint_step_transfers_at_those_steps():
    transfer = mj.share_transfer(helpers.ROUTES)
    options = {"cycle": optax.linear_schedule(1, 4, 10), "stop": 0.8, "num_steps": 10}
    step, state = helpers.joint_step(transfer, **options), helpers.initial_state(transfer)
    seen = []
    for i in range(10):
        state, metrics = step(state, helpers.batches(i))
        seen += [i] if metrics["adapter/transferred"] else []
    assert seen == [0, 1, 2, 4, 6]
    assert mj.TransferSteps(**options).count() == len(seen)


@pytest.mark.parametrize(("options", "message"), [
    ({"cycle": optax.constant_schedule(2)}, "a cycle that changes needs the length of the run: give num_steps too"),
    *(({"cycle": cycle}, f"cycle must be a whole number of at least 1, got {cycle}") for cycle in (0, 1.5, True)),
    *(({"stop": stop}, rf"stop must be a fraction in \[0, 1\], got {stop}") for stop in (-0.1, 1.1, float("nan"))),
    ({"stop": 0.5}, "stop is 0.5, a fraction of the run: give num_steps too"),
    ({"stop": 0.1, "num_steps": 4}, "stop is 0.1 of 4 steps, less than one: nothing would be transferred"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mj.TransferSteps(**options)


def test_a_count_needs_the_length_of_the_run():
    with pytest.raises(ValueError, match="depends on the length of the run: give num_steps"):
        mj.TransferSteps(2).count()


def test_a_cycle_that_is_no_number_is_refused_and_one_without_end_is_the_last():
    with pytest.raises(ValueError, match="the cycle must be a number of steps, got nan at step 0"):
        mj.TransferSteps(lambda step: float("nan"), 1.0, 4).count()
    assert steps_of(mj.TransferSteps(lambda step: float("inf"), 1.0, 4), 4) == [0]
