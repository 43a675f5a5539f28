import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from merge_jax.training.packing import pack
from tests import helpers

OPERATORS = mj.linear_operator_transfer(helpers.ROUTES)
SHARE = mj.share_transfer(helpers.ROUTES)


def run(step, state, steps):
    """Returns the states after each step, with the metrics."""
    outcomes = []
    for i in range(steps):
        state, metrics = step(state, helpers.batches(i))
        outcomes.append((state, jax.device_get(metrics)))
    return outcomes


@pytest.fixture(scope="module")
def by_turns():
    """Four steps of which every second transfers: the adapters after each, and the last metrics."""
    traces = []

    def counted(state, batches):
        traces.append(1)
        return helpers.joint_step(OPERATORS, cycle=2)(state, batches)

    step = jax.jit(counted, donate_argnums=0)
    state = helpers.initial_state(OPERATORS)
    adapters = [jax.device_get(state.adapter)]
    for i in range(4):
        state, metrics = step(state, helpers.batches(i))
        adapters.append(jax.device_get(state.adapter))
    assert len(traces) == 1
    assert int(state.step) == 4
    return adapters, metrics


def test_traced_once_with_donated_state_and_metrics_by_role(by_turns):
    _, metrics = by_turns
    assert set(metrics) == {
        *("source/loss", "source/accuracy", "target/loss", "target/accuracy"),
        *("source/skipped", "target/skipped", "adapter/skipped", "adapter/rejected"),
        *("adapter/transferred", "adapter/change", "adapter/gradient_norm", "adapter/norm", "adapter/norm_before"),
    }
    assert all(value.shape == () for value in metrics.values())


def test_donation_leaves_the_users_arrays_alone():
    params, model_state = helpers.variables(helpers.TARGET, 1)
    state = mj.init_joint_state(
        jax.random.key(0),
        None,
        helpers.task(helpers.TARGET),
        mj.identity_transfer(),
        source_params=params,  # The same arrays for both: a model may be its own source.
        target_params=params,
        target_state=model_state,
    )
    step = mj.make_joint_step(None, helpers.task(helpers.TARGET), mj.identity_transfer())
    jax.jit(step, donate_argnums=0)(state, {"target": helpers.batch(0)})
    assert np.isfinite(params["fc"]["kernel"]).all()


def test_a_state_shares_no_memory_with_numpy():
    """`device_put` shares memory that starts at a multiple of 64 bytes, `may_alias=False` or not (jax 0.12.0.1)."""
    raw = np.zeros(64 * 64 * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    own = raw[start : start + 64 * 64 * 4].view(np.float32).reshape(64, 64)
    task = mj.Task(lambda params, state, batch, key: (params["w"].sum(), (state, {})), optax.sgd(0.1))
    params = {"w": own}
    state = mj.init_joint_state(
        jax.random.key(0), None, task, mj.identity_transfer(), source_params=params, target_params=params
    )
    jax.block_until_ready(state)
    own[:] = 5
    assert not np.asarray(state.target.params["w"]).any()
    assert not np.asarray(state.source.params["w"]).any()


@pytest.mark.slow
@pytest.mark.parametrize(("cycle", "stop", "expected"), [
    (1, 1.0, [1, 1, 1, 1, 1, 1, 1, 1]),
    (3, 0.5, [1, 0, 0, 1, 0, 0, 0, 0]),
    (2, 0.0, [0, 0, 0, 0, 0, 0, 0, 0]),
])  # fmt: skip
def test_transfers_follow_cycle_and_stop(cycle, stop, expected):
    step = helpers.joint_step(SHARE, cycle=cycle, stop=stop, num_steps=8)
    outcomes = run(step, helpers.initial_state(SHARE), 8)
    assert [metrics["adapter/transferred"] for _, metrics in outcomes] == expected
    for (_, metrics), transferred in zip(outcomes, expected, strict=True):
        assert (metrics["adapter/change"] > 0) == bool(transferred)


@pytest.mark.slow
def test_gates_are_among_the_metrics_as_the_step_used_them():
    gated = mj.lpka_transfer(helpers.ROUTES, num_layers=1, num_heads=1, attentions=("rows_rows",))
    name = f"adapter/gate/{next(iter(helpers.ROUTES))}"
    outcomes = run(helpers.joint_step(gated, cycle=2), helpers.initial_state(gated), 3)
    gates = [float(state.adapter.params["hidden/kernel"]["gate"]) for state, _ in outcomes]
    assert [float(metrics[name]) for _, metrics in outcomes] == [0.0, gates[0], gates[1]]
    assert gates[0] != 0


def test_self_learning_steps_leave_the_adapter_alone(by_turns):
    (initial, first, second, *_), _ = by_turns
    assert not np.array_equal(jax.tree.leaves(first.params)[0], jax.tree.leaves(initial.params)[0])
    chex.assert_trees_all_equal(first, second)


def test_no_transfer_equals_plain_training_of_both_models():
    """Against steps written with Optax alone, with the keys that the joint step gives."""
    state = helpers.initial_state(SHARE)
    plain = {"source": state.source, "target": state.target}
    tasks = {"source": helpers.task(helpers.SOURCE), "target": helpers.task(helpers.TARGET)}
    outcomes = run(helpers.joint_step(SHARE, stop=0.0), state, 3)

    @functools.partial(jax.jit, static_argnums=0)
    def trained(role, model, batch, key):
        task = tasks[role]
        gradient, (model_state, _) = jax.grad(task.loss_fn, has_aux=True)(model.params, model.model_state, batch, key)
        updates, opt_state = task.optimizer.update(gradient, model.opt_state, model.params)
        return mj.TrainState(optax.apply_updates(model.params, updates), model_state, opt_state)

    for i, (joint, _) in enumerate(outcomes):
        keys = jax.random.split(jax.random.fold_in(state.key, i), 3)
        for role, key in zip(("source", "target"), keys, strict=False):
            plain[role] = trained(role, plain[role], helpers.batches(i)[role], key)
            chex.assert_trees_all_close(getattr(joint, role), plain[role], atol=1e-6)


def test_the_transfer_reads_both_models_as_they_stood_and_spares_the_optimizer():
    state = helpers.initial_state(SHARE)
    moving = state.target.replace(opt_state=jax.tree.map(lambda leaf: leaf + 0.1, state.target.opt_state))
    state = state.replace(target=moving)  # Its momentum is not zero.
    (after, metrics), *_ = run(helpers.joint_step(SHARE, cycle=1), state, 1)

    @jax.jit
    def expected(state, batch):
        merged = SHARE.apply({}, state.source.params, state.target.params)
        change = optax.tree.norm(optax.tree.sub(merged, state.target.params)) / optax.tree.norm(state.target.params)
        _, key, _ = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        task = helpers.task(helpers.TARGET)
        gradient, _ = jax.grad(task.loss_fn, has_aux=True)(merged, state.target.model_state, batch, key)
        updates, opt_state = task.optimizer.update(gradient, state.target.opt_state, merged)
        return change, optax.apply_updates(merged, updates), opt_state

    change, params, opt_state = expected(state, helpers.batches(0)["target"])
    np.testing.assert_allclose(metrics["adapter/change"], change, rtol=1e-5)
    chex.assert_trees_all_close(after.target.params, params, atol=1e-6)
    chex.assert_trees_all_close(after.target.opt_state, opt_state, atol=1e-6)


@pytest.mark.parametrize("update", ["exact", pytest.param("surrogate", marks=pytest.mark.slow)])
def test_the_adapter_follows_its_cotangent(update):
    """The adapter's step is the vjp of the transfer at dL/dT', or at T' minus the target after its step."""
    optimizer = optax.sgd(0.5)  # So that the step shows the gradient.
    state = helpers.initial_state(OPERATORS, adapter_optimizer=optimizer)
    step = helpers.joint_step(OPERATORS, cycle=1, update=update, adapter_optimizer=optimizer)
    ((after, metrics),) = run(step, state, 1)

    batch = helpers.batches(0)["target"]
    _, target_key, transfer_key = jax.random.split(jax.random.fold_in(state.key, 0), 3)

    @jax.jit
    def expected(adapter):
        def merge(adapter):
            return OPERATORS.apply(adapter, state.source.params, state.target.params, key=transfer_key)

        def loss(adapter):
            task = helpers.task(helpers.TARGET)
            return task.loss_fn(merge(adapter), state.target.model_state, batch, target_key)[0]

        if update == "exact":
            return jax.grad(loss)(adapter)
        merged, pullback = jax.vjp(merge, adapter)
        return pullback(optax.tree.sub(merged, after.target.params))[0]

    gradient = expected(state.adapter.params)
    stepped = jax.tree.map(lambda p, g: p - 0.5 * g, state.adapter.params, gradient)
    chex.assert_trees_all_close(after.adapter.params, stepped, atol=1e-5)
    np.testing.assert_allclose(metrics["adapter/gradient_norm"], optax.tree.norm(gradient), rtol=1e-3)
    assert metrics["adapter/gradient_norm"] > 0


def test_a_frozen_source_never_changes_and_needs_no_batch():
    state = helpers.initial_state(OPERATORS, frozen=True)
    step = jax.jit(helpers.joint_step(OPERATORS, frozen=True, cycle=1))
    after, metrics = step(state, {"target": helpers.batch(0)})
    chex.assert_trees_all_equal(after.source, state.source)
    assert not any(name.startswith("source/") for name in metrics)


def test_a_step_of_64_bits_has_metrics_of_32():
    state = helpers.initial_state(SHARE, frozen=True)
    with jax.enable_x64(True):
        step = helpers.joint_step(SHARE, frozen=True, cycle=2)
        _, metrics = jax.eval_shape(step, state, {"target": helpers.batch(0)})
    assert {name: metric.dtype for name, metric in metrics.items()} == dict.fromkeys(metrics, jnp.float32)


def test_the_teacher_sees_the_source_after_its_step_and_gets_no_gradient():
    seen = mj.logits_teacher(helpers.SOURCE.apply, inputs="x")
    task = mj.Task(
        mj.classification_loss(
            helpers.TARGET.apply,
            lambda logits, batch: mj.distillation_loss(logits, batch["teacher_logits"], batch["label"], weight=1.0),
            inputs="x",
        ),
        optax.sgd(0.1),
    )
    state = helpers.initial_state(SHARE)
    # The target's optimizer keeps no momentum here.
    state = state.replace(target=state.target.replace(opt_state=task.optimizer.init(state.target.params)))
    step = mj.make_joint_step(helpers.task(helpers.SOURCE), task, SHARE, stop=0, teacher=seen)
    ((after, metrics),) = run(jax.jit(step), state, 1)

    batch = helpers.batches(0)["target"]
    annotated = jax.jit(seen)(after.source.params, after.source.model_state, batch)
    _, key, _ = jax.random.split(jax.random.fold_in(state.key, 0), 3)
    loss, _ = jax.jit(task.loss_fn)(state.target.params, state.target.model_state, annotated, key)
    np.testing.assert_allclose(metrics["target/loss"], loss, rtol=1e-5)
    alone = run(helpers.joint_step(SHARE, stop=0.0), state.replace(
        target=helpers.initial_state(SHARE).target), 1)[0][0]  # fmt: skip
    chex.assert_trees_all_close(after.source, alone.source, atol=1e-6)


def test_steps_differ_by_their_keys():
    state = helpers.initial_state(mj.identity_transfer(), frozen=True)
    step = jax.jit(helpers.joint_step(mj.identity_transfer(), frozen=True, stop=0))
    batches = {"target": helpers.batch(0)}
    _, first = step(state, batches)
    _, again = step(state, batches)
    _, later = step(state.replace(step=jnp.int32(1)), batches)
    assert first["target/loss"] == again["target/loss"] != later["target/loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above 0, got nan"),
        ({"learning_rate": -0.1}, "learning_rate must be a finite number above 0, got -0.1"),
        ({"max_norm": 0}, "max_norm must be a finite number above 0, got 0"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number of at least 0, got inf"),
    ],
)
def test_adapter_adamw_refuses_what_is_no_rate(options, message):
    with pytest.raises(ValueError, match=message):
        mj.adapter_adamw(**options)


def test_adapter_adamw_decays_kernels_only_and_clips():
    params = {"r": {"dense": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "gate": jnp.ones(()),
                    "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}}  # fmt: skip
    optimizer = mj.adapter_adamw(0.1, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    decayed = {path: float(jnp.max(jnp.abs(leaf))) for path, leaf in mj.flatten(updates).items()}
    np.testing.assert_allclose(decayed.pop("r/dense/kernel"), 0.05)
    assert set(decayed.values()) == {0.0}

    clipped = optax.clip_by_global_norm(50.0)
    huge = jax.tree.map(lambda p: 1e6 * p, params)
    (state, *_), expected = optimizer.init(params), clipped.update(huge, clipped.init(params))[0]
    del state
    updates, new_state = jax.jit(optimizer.update)(huge, optimizer.init(params), params)
    moments = new_state[1][0].mu
    chex.assert_trees_all_close(moments, pack(jax.tree.map(lambda g: 0.1 * g, expected)), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycle": 0}, "cycle must be a whole number of at least 1, got 0"),
        ({"update": "exakt"}, "unknown update rule 'exakt'; did you mean 'exact'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_traced(options, message):
    with pytest.raises(ValueError, match=message):
        helpers.joint_step(SHARE, **options)


def test_what_is_no_task_or_transfer_is_refused():
    task = helpers.task(helpers.TARGET)
    for target, message in (
        (mj.Task(task.optimizer, task.loss_fn), "the target must be a Task"),
        (helpers.TARGET, "the target must be a Task"),
        (None, "the target must be a Task"),
    ):
        with pytest.raises(ValueError, match=message):
            mj.make_joint_step(None, target, SHARE)
    with pytest.raises(ValueError, match="the source must be a Task"):
        mj.make_joint_step(helpers.SOURCE, task, SHARE)
    with pytest.raises(ValueError, match=r"the transfer must be a Transfer, .* got dict"):
        mj.make_joint_step(None, task, helpers.ROUTES)


def test_batches_without_a_role_are_refused():
    state = helpers.initial_state(SHARE)
    with pytest.raises(ValueError, match=r"batches must hold one for 'target', got \['source'\]"):
        jax.eval_shape(helpers.joint_step(SHARE), state, {"source": helpers.batch(0)})


@pytest.mark.parametrize("frozen_step", [True, False])
def test_a_state_of_another_kind_of_source_is_refused(frozen_step):
    state = helpers.initial_state(SHARE, frozen=not frozen_step)
    frozen = "step" if frozen_step else "state"
    with pytest.raises(ValueError, match=f"the {frozen} was made with a frozen source"):
        jax.eval_shape(helpers.joint_step(SHARE, frozen=frozen_step), state, helpers.batches(0))


@pytest.mark.parametrize("leaf", [jax.random.key(0), jnp.arange(3)])
def test_what_cannot_learn_is_refused_by_its_leaf_before_a_step(leaf):
    loss = lambda params, state, batch, key: (jnp.sum(params["fc"]["w"] ** 2), (state, {}))  # noqa: E731
    task, same = mj.Task(loss, optax.sgd(0.1)), mj.identity_transfer()
    params, plain = {"fc": {"w": jnp.ones(2), "x": leaf}}, {"fc": {"w": jnp.ones(2)}}
    message = (
        r"the {} leaf 'fc/x' must be an array of floats, since it is trained, got .*\]: keep it apart.* nnx\.split\("
    )
    for role, source, source_params, target_params in (("target", None, {}, params), ("source", task, params, plain)):
        with pytest.raises(ValueError, match=message.format(role)):
            mj.init_joint_state(
                jax.random.key(0), source, task, same, source_params=source_params, target_params=target_params
            )
    # A source that is frozen may hold what it likes.
    mj.init_joint_state(jax.random.key(0), None, task, same, source_params=params, target_params=plain)


def test_routes_are_checked_by_the_initial_state():
    with pytest.raises(ValueError, match="unknown target path 'hiden/kernel'; did you mean 'hidden/kernel'"):
        helpers.initial_state(mj.share_transfer({"hiden/kernel": "fc/kernel"}))
