"""Numbers that are not finite spoil nothing: the update that they belong to is as if it had not been."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.checks import all_finite, check_finite
from merge_jax.training.loop import run_loop, stepwise
from merge_jax.training.nonfinite import (
    NumericFaultError,
    RejectedTransfers,
    SkippedUpdates,
    select_update,
)
from tests import helpers

OPERATORS = mj.linear_operator_transfer(helpers.ROUTES)
BAD = (np.nan, np.inf, -np.inf)


def bare(state):
    return state.replace(key=jax.random.key_data(state.key))


def spoilt(batches, *roles, by=np.nan):
    """The batches with one number of the inputs of some roles replaced."""

    def spoil(batch):
        x = batch["x"].copy()
        x[3, 2] = by
        return {**batch, "x": x}

    return {role: spoil(batch) if role in roles else batch for role, batch in batches.items()}


@pytest.fixture(scope="module")
def step():
    return jax.jit(helpers.joint_step(OPERATORS, cycle=2))


@pytest.fixture(scope="module")
def started(step):
    """A state after four steps, the next of which transfers, so that all moments are in use."""
    state = helpers.initial_state(OPERATORS)
    for i in range(4):
        state, metrics = step(state, helpers.batches(i))
    assert metrics["target/skipped"] == metrics["source/skipped"] == metrics["adapter/skipped"] == 0
    return state


@pytest.mark.parametrize("by", BAD)
def test_a_spoilt_batch_of_the_target_leaves_target_and_adapter_and_the_source_learns(step, started, by):
    clean, _ = step(started, helpers.batches(4))
    state, metrics = step(started, spoilt(helpers.batches(4), "target", by=by))
    chex.assert_trees_all_equal(state.target, started.target)
    chex.assert_trees_all_equal(state.adapter, started.adapter)
    chex.assert_trees_all_equal(state.source, clean.source)
    assert int(state.step) == 5
    assert [float(metrics[f"{role}/skipped"]) for role in ("source", "target", "adapter")] == [0, 1, 1]
    assert metrics["adapter/rejected"] == 0


@pytest.mark.parametrize("by", BAD)
def test_a_spoilt_batch_of_the_source_leaves_the_source_and_the_target_learns(step, started, by):
    clean, _ = step(started, helpers.batches(4))
    state, metrics = step(started, spoilt(helpers.batches(4), "source", by=by))
    chex.assert_trees_all_equal(state.source, started.source)
    chex.assert_trees_all_equal((state.target, state.adapter), (clean.target, clean.adapter))
    assert [float(metrics[f"{role}/skipped"]) for role in ("source", "target", "adapter")] == [1, 0, 0]


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_before_it_is_clipped():
    def loss_fn(params, model_state, batch, key):
        return jnp.sqrt(jnp.sum(params["w"] * batch)), (model_state, {})

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    task = mj.Task(loss_fn, optimizer)
    nothing = mj.Transfer(lambda key, source, target: {}, lambda adapter, source, target, **_: target)
    state = mj.init_joint_state(
        jax.random.key(0), None, task, nothing, source_params={}, target_params={"w": jnp.ones(3)}
    )
    step = jax.jit(mj.make_joint_step(None, task, nothing, stop=0))
    after, metrics = step(state, {"target": jnp.zeros(3)})
    assert metrics["target/loss"] == 0
    assert metrics["target/skipped"] == 1
    chex.assert_trees_all_equal(after.target, state.target)
    after, metrics = step(state, {"target": jnp.ones(3)})
    assert metrics["target/skipped"] == 0
    assert not np.array_equal(after.target.params["w"], state.target.params["w"])


def test_twenty_faults_in_sixty_steps_are_as_if_those_updates_had_been_left_out(step):
    bad = set(np.random.default_rng(0).permutation(60)[:20].tolist())
    state = expected = helpers.initial_state(OPERATORS)
    skipped = 0.0
    for i in range(60):
        batches = helpers.batches(i)
        if i in bad:
            state, metrics = step(state, spoilt(batches, "source", "target", by=BAD[i % 3]))
            expected = expected.replace(step=expected.step + 1)
        else:
            state, metrics = step(state, batches)
            expected, _ = step(expected, batches)
        skipped += float(metrics["target/skipped"])
    chex.assert_trees_all_equal(bare(state), bare(expected))
    assert skipped == 20
    assert all_finite(state.source, state.target, state.adapter)


def _factors(key, source_params, target_params):
    return {"gain": jnp.ones(()), "factor": jnp.ones(())}


def _multiply(adapter, source_params, target_params, *, key=None, step=None):
    return jax.tree.map(lambda leaf: leaf * (adapter["factor"] * adapter["gain"]), target_params)


# Its output is the target times a factor, which is one of its two parameters.
WILD = mj.Transfer(_factors, _multiply)


def by_factor(state, factor):
    adapter = state.adapter.params | {"factor": jnp.float32(factor)}
    return state.replace(adapter=state.adapter.replace(params=adapter))


@pytest.mark.parametrize("update", ["exact", pytest.param("surrogate", marks=pytest.mark.slow)])
def test_an_output_that_explodes_is_rejected_and_the_target_learns_from_its_own(update):
    state = helpers.initial_state(WILD)
    step = helpers.joint_step(WILD, cycle=1, update=update)
    alone, _ = helpers.joint_step(WILD, stop=0)(state, helpers.batches(0))
    for factor in (2e3, 1e30, np.nan, np.inf):
        given = by_factor(state, factor)
        after, metrics = step(given, helpers.batches(0))
        chex.assert_trees_all_equal(after.target, alone.target)
        chex.assert_trees_all_equal(after.source, alone.source)
        chex.assert_trees_all_equal(after.adapter, given.adapter)
        named = ("rejected", "transferred", "skipped")
        assert [float(metrics[f"adapter/{name}"]) for name in named] == [1, 0, 1]
        assert metrics["target/skipped"] == 0


def test_an_output_within_bounds_is_written_and_the_bounds_can_be_moved():
    assert not np.allclose(scalar_run(jnp.ones(4), 9.0).target.params["w"], 1)
    with pytest.warns(UserWarning, match="all 2 were rejected"):
        state = scalar_run(jnp.ones(4), 9.0, largest_growth=5.0)
    np.testing.assert_array_equal(state.target.params["w"], 1)
    with pytest.raises(ValueError, match="largest_growth must be above 0, got 0"):
        helpers.joint_step(WILD, largest_growth=0)


def scalar_run(target, factor, num_steps=4, **options):
    """A run of a transfer that gives the target times a factor, or the source where there is no target."""

    def apply(adapter, source_params, target_params, *, key=None, step=None):
        return jax.tree.map(lambda own, other: own * factor + other, target_params, source_params)

    def loss_fn(params, model_state, batch, key):
        return (params["w"] * batch["x"]).sum(), (model_state, {})

    transfer = mj.Transfer(lambda key, source, target: {}, apply)
    task = mj.Task(loss_fn, optax.sgd(0.0))
    state = mj.init_joint_state(
        jax.random.key(0), None, task, transfer, source_params={"w": jnp.ones(4)}, target_params={"w": target}
    )
    step = mj.make_joint_step(None, task, transfer, cycle=2, num_steps=num_steps, **options)
    return run_loop(
        stepwise(jax.jit(step), lambda i: {"target": {"x": jnp.ones(4)}}),
        state,
        num_steps=num_steps,
        report_every=2,
        report=lambda *unused: None,
    )


def test_a_target_of_zeros_takes_its_first_write():
    state = scalar_run(jnp.zeros(4), 1.0, stop=0.25)
    np.testing.assert_array_equal(state.target.params["w"], np.ones(4))


@pytest.mark.parametrize(("factor", "reason"), [
    (1e9, r"is too large: norm 2e\+09, the target's own 2 "),
    (np.nan, r"has numbers that are not finite: norm nan, the target's own 2 "),
])  # fmt: skip
def test_a_run_without_any_transfer_ends_with_a_warning(factor, reason):
    with pytest.warns(UserWarning, match=rf"all 2 were rejected, the first at step 0, .* {reason}") as caught:
        scalar_run(jnp.ones(4), factor)
    assert caught[0].filename == __file__


def test_a_run_with_some_transfer_ends_without():
    rejections = RejectedTransfers()
    for rejected in (1, 0):
        sums = {"adapter/rejected": rejected, "adapter/transferred": 1 - rejected}
        rejections.add({**sums, "adapter/norm": np.inf, "adapter/norm_before": 1.0}, 4, 4)
    rejections.warn()


def test_of_seeds_side_by_side_one_without_any_transfer_is_enough():
    rejections = RejectedTransfers()
    sums = {"adapter/rejected": np.array([0.0, 3.0]), "adapter/transferred": np.array([3.0, 0.0])}
    rejections.add({**sums, "adapter/norm": np.array([9.0, 6e9]), "adapter/norm_before": np.array([3.0, 3.0])}, 5, 10)
    with pytest.warns(UserWarning, match="all 3 were rejected, the first at steps 5 to 9"):
        rejections.warn()


def test_a_transfer_that_the_target_cannot_learn_from_is_undone_and_not_counted():
    def loss_fn(params, model_state, batch, key):
        return jnp.where(params["w"].sum() > 4, jnp.nan, params["w"].sum()), (model_state, {})

    task, share = mj.Task(loss_fn, optax.sgd(0.0)), mj.share_transfer({"w": "w"})
    state = mj.init_joint_state(
        jax.random.key(0), None, task, share, source_params={"w": jnp.full(4, 2.0)}, target_params={"w": jnp.ones(4)}
    )
    after, metrics = mj.make_joint_step(None, task, share)(state, {"target": {}})
    np.testing.assert_array_equal(after.target.params["w"], np.ones(4))
    named = ("transferred", "rejected", "norm", "norm_before")
    assert [float(metrics[f"adapter/{name}"]) for name in named] == [0, 0, 4, 2]
    assert metrics["target/skipped"] == 1


def test_inside_the_forward_pass_a_fault_leaves_target_and_adapter():
    transfer = mj.linear_operator_transfer(helpers.ROUTES)
    step = jax.jit(mj.make_reparameterised_step(helpers.task(helpers.SOURCE), helpers.task(helpers.TARGET), transfer))
    state = helpers.initial_state(transfer)
    state, _ = step(state, helpers.batches(0))
    after, metrics = step(state, spoilt(helpers.batches(1), "target"))
    clean, _ = step(state, helpers.batches(1))
    chex.assert_trees_all_equal((after.target, after.adapter), (state.target, state.adapter))
    chex.assert_trees_all_equal(after.source, clean.source)
    assert metrics["target/skipped"] == metrics["adapter/skipped"] == 1


def test_a_run_of_faults_ends_with_a_name_and_its_checkpoints_are_finite(step, tmp_path):
    def batches_at(i):
        return spoilt(helpers.batches(i), *(("target",) if i >= 6 else ()))

    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(NumericFaultError, match=r"of the target was not finite in the last 5 steps, up to step 11; its"),
    ):
        run_loop(
            stepwise(step, batches_at),
            helpers.initial_state(OPERATORS),
            num_steps=30,
            report_every=3,
            report=lambda *unused: None,
            checkpoints=checkpoints,
            checkpoint_every=3,
            most_skipped=5,
        )
    with Checkpoints(tmp_path) as checkpoints:
        saved, state = checkpoints.restore_latest(helpers.initial_state(OPERATORS))
    assert saved == 9
    assert all_finite(state.source, state.target, state.adapter)


def test_only_faults_in_a_row_of_one_model_count():
    skips = SkippedUpdates(5)
    for step in range(101):
        skips.add({"source/skipped": step % 2, "target/skipped": (step + 1) % 2, "target/loss": np.nan}, 1, step)
    skips.add({"source/skipped": np.array([0.0, 4.0])}, 4, 104)
    with pytest.raises(NumericFaultError, match="source was not finite in the last 5 steps, up to step 105"):
        skips.add({"source/skipped": np.array([0.0, 1.0])}, 1, 105)


@pytest.mark.parametrize("bad", [*BAD, None])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_number_among_many_is_seen(bad, dtype):
    tree = {"a": jnp.ones((7, 9), dtype), "b": [jnp.arange(3), jnp.zeros((), dtype)], "c": {}}
    if bad is not None:
        tree["a"] = tree["a"].at[6, 3].set(bad)
    assert bool(jax.jit(all_finite)(tree)) == bool(all_finite(tree)) == (bad is None)
    assert all_finite()
    old = jax.tree.map(jnp.zeros_like, tree)
    chex.assert_trees_all_equal(select_update(all_finite(tree), tree, old), tree if bad is None else old)


def test_leaves_that_are_not_finite_are_named():
    check_finite("the source", {"a": {"w": jnp.ones(3)}, "b": jnp.arange(2)})
    with pytest.raises(ValueError, match=r"^the source has numbers that are not finite in a/w, b$"):
        check_finite("the source", {"a": {"w": jnp.ones(3).at[1].set(jnp.nan)}, "b": jnp.float32(jnp.inf)})


def test_transfers_that_are_rejected_are_no_faults_of_the_adapter():
    skips = SkippedUpdates(3)
    for step in range(9):
        skips.add({"adapter/skipped": 1.0, "adapter/rejected": 1.0}, 1, step)
    with pytest.raises(NumericFaultError, match="of the adapter was not finite in the last 3 steps"):
        skips.add({"adapter/skipped": 3.0, "adapter/rejected": 0.0}, 3, 12)
