import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from tests import helpers

SHARE = mj.share_transfer(helpers.ROUTES)
STEPS = 5


def data():
    """Returns arrays and indices that give the batches of `helpers.batches`; the examples lie in another order."""
    arrays, indices = {}, {}
    for seed, role in enumerate(("source", "target")):
        in_turn = [helpers.batches(step)[role] for step in range(STEPS)]
        order = np.random.default_rng(seed).permutation(16 * STEPS)
        arrays[role] = {name: np.concatenate([batch[name] for batch in in_turn])[order] for name in ("x", "label")}
        indices[role] = np.argsort(order).astype(np.int32).reshape(STEPS, 16)
    return arrays, indices


def one_by_one(step, state, steps=STEPS):
    """Returns the states after each number of steps, from 0 on, and the metrics of each step."""
    states, metrics = [state], []
    for i in range(steps):
        state, step_metrics = step(state, helpers.batches(i))
        states.append(state)
        metrics.append(jax.device_get(step_metrics))
    return states, metrics


def assert_close(state, expected):
    plain, expected = (each.replace(key=jax.random.key_data(each.key)) for each in (state, expected))
    chex.assert_trees_all_close(plain, expected, atol=1e-6)


def with_noise(key, batch):
    return {**batch, "x": batch["x"] + jax.random.normal(key, batch["x"].shape)}


def with_key(key, batch):
    return {**batch, "key": jax.random.key_data(key)}


def changed(augment, state, batches):
    """Returns the batches as a step gets them that is augmented."""
    return mj.augmented(lambda state, batches: (state, batches), augment)(state, batches)[1]


def test_one_compilation_gives_for_every_count_what_single_steps_give():
    traces = []
    step = helpers.joint_step(SHARE, cycle=2)

    def counted(*arguments):
        traces.append(1)
        return mj.make_epoch(step)(*arguments)

    epoch = jax.jit(counted, donate_argnums=0)
    state, sums = epoch(helpers.initial_state(SHARE), *data(), np.int32(0))
    assert_close(state, helpers.initial_state(SHARE))  # Of no steps nothing changes.
    assert set(map(float, sums.values())) == {0.0}
    states, metrics = one_by_one(step, helpers.initial_state(SHARE))
    arrays, indices = data()
    for count in (1, 2, STEPS):
        # The rows after `count` name another example, which would show if they were read.
        rows = {role: np.where(np.arange(STEPS)[:, None] < count, rows, 0) for role, rows in indices.items()}
        state, sums = epoch(helpers.initial_state(SHARE), arrays, jax.tree.map(np.int32, rows), np.int32(count))
        assert int(state.step) == count
        assert_close(state, states[count])
        expected = jax.tree.map(lambda *values: np.sum(values), *metrics[:count])
        chex.assert_trees_all_close(sums, expected, atol=1e-5)
    assert sums["adapter/transferred"] == 3
    assert all(total.dtype == jnp.float32 for total in sums.values())

    start, rest = ({role: np.roll(rows, -done, axis=0) for role, rows in indices.items()} for done in (0, 2))
    state, _ = epoch(helpers.initial_state(SHARE), arrays, start, np.int32(2))
    state, _ = epoch(state, arrays, rest, np.int32(3))
    assert_close(state, states[STEPS])
    assert len(traces) == 1


@pytest.mark.slow
def test_a_frozen_source_needs_neither_examples_nor_indices():
    arrays, indices = ({"target": each["target"]} for each in data())
    step, initial = helpers.joint_step(SHARE, frozen=True, cycle=2), helpers.initial_state(SHARE, frozen=True)
    states, _ = one_by_one(step, initial)
    state, _ = jax.jit(mj.make_epoch(step))(initial, arrays, indices, STEPS)
    assert_close(state, states[STEPS])


@pytest.mark.slow
def test_an_augmented_epoch_gives_what_single_augmented_steps_give_and_goes_on_where_it_stopped():
    augment = {"source": with_noise, "target": with_noise}
    step = mj.augmented(helpers.joint_step(SHARE, cycle=2), augment)
    states, metrics = one_by_one(jax.jit(step), helpers.initial_state(SHARE))
    arrays, indices = data()
    epoch = jax.jit(mj.make_epoch(step))
    state, sums = epoch(helpers.initial_state(SHARE), arrays, indices, STEPS)
    assert_close(state, states[STEPS])
    np.testing.assert_allclose(sums["target/loss"], sum(each["target/loss"] for each in metrics), rtol=1e-5)
    rest = {role: np.roll(rows, -3, axis=0) for role, rows in indices.items()}
    resumed, _ = epoch(states[3], arrays, rest, STEPS - 3)
    assert_close(resumed, states[STEPS])


@pytest.mark.slow
def test_the_teacher_sees_the_batch_that_the_target_learns_from():
    def loss(logits, batch):
        return mj.distillation_loss(logits, batch["teacher_logits"], batch["label"])

    def further(key, batch):
        del key
        return {**batch, "x": batch["x"] + 1}

    target = mj.Task(mj.classification_loss(helpers.TARGET.apply, loss, inputs="x"), optax.sgd(0.1, momentum=0.9))
    teacher = mj.logits_teacher(helpers.SOURCE.apply, inputs="x")
    step = mj.make_joint_step(helpers.task(helpers.SOURCE), target, SHARE, stop=0, teacher=teacher)
    state, batches = helpers.initial_state(SHARE), helpers.batches(0)
    moved = {**batches, "target": further(None, batches["target"])}
    after, metrics = jax.jit(mj.augmented(step, {"target": further}))(state, batches)
    expected, expected_metrics = jax.jit(step)(state, moved)
    assert_close(after, expected)
    chex.assert_trees_all_close(metrics, expected_metrics, atol=1e-6)

    annotated = teacher(after.source.params, after.source.model_state, moved["target"])
    key = jax.random.split(jax.random.fold_in(state.key, 0), 3)[1]
    expected_loss, _ = target.loss_fn(state.target.params, state.target.model_state, annotated, key)
    np.testing.assert_allclose(metrics["target/loss"], expected_loss, rtol=1e-5)


def test_no_two_changes_and_nothing_in_the_step_itself_draw_from_one_key():
    state = helpers.initial_state(SHARE)
    augment, keys = {"source": with_key, "target": with_key}, [state.key]
    for i in range(20):
        step_key = jax.random.fold_in(state.key, i)
        keys += [step_key, *jax.random.split(step_key, 3)]
    drawn = [jax.random.key_data(key) for key in keys]
    for i in range(20):
        batches = changed(augment, state.replace(step=jnp.int32(i)), helpers.batches(i))
        drawn += [batches[role]["key"] for role in augment]
    assert len({tuple(np.asarray(key)) for key in drawn}) == len(drawn) == 1 + 20 * (4 + 2)


def test_changes_depend_on_the_key_and_the_step_of_the_state_alone():
    state = helpers.initial_state(SHARE).replace(step=jnp.int32(7))
    resumed = helpers.initial_state(mj.identity_transfer()).replace(key=state.key, step=jnp.int32(7))
    resumed = resumed.replace(target=jax.tree.map(jnp.zeros_like, resumed.target))
    augment, batches = {"source": with_noise, "target": with_noise}, helpers.batches(0)
    first, again = (changed(augment, each, batches) for each in (state, resumed))
    chex.assert_trees_all_equal(first, again)
    other = changed(augment, state.replace(key=jax.random.key(9)), batches)
    for role in augment:
        assert not np.array_equal(first[role]["x"], other[role]["x"])
        np.testing.assert_array_equal(first[role]["label"], batches[role]["label"])


@pytest.mark.parametrize("role", ["source", "target"])
def test_a_role_without_a_change_keeps_its_batch_as_it_is(role):
    batches = helpers.batches(0)
    after = changed({role: with_noise}, helpers.initial_state(SHARE), batches)
    other = {"source": "target", "target": "source"}[role]
    assert after[other] is batches[other]
    assert not np.array_equal(after[role]["x"], batches[role]["x"])


def test_a_role_without_batches_is_passed_over():
    state, batches = helpers.initial_state(SHARE), helpers.batches(0)
    augment = {"source": with_noise, "target": with_noise}
    alone = changed(augment, state, {"target": batches["target"]})
    assert set(alone) == {"target"}
    np.testing.assert_array_equal(alone["target"]["x"], changed(augment, state, batches)["target"]["x"])


def test_the_users_batches_stay_as_they_were():
    batches, before = helpers.batches(0), helpers.batches(0)
    changed({"source": with_noise}, helpers.initial_state(SHARE), batches)
    chex.assert_trees_all_equal(batches, before)
