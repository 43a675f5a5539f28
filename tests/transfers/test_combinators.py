import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from tests import helpers

SOURCE = {"a": jnp.full((2, 3), 5.0), "b": jnp.full((3,), 7.0)}
TARGET = {"a": jnp.zeros((2, 3)), "b": jnp.ones((3,)), "c": jnp.ones((3,))}
SHARE_A, SHARE_B = mj.share_transfer({"a": "a"}), mj.share_transfer({"b": "b"})


def test_a_chain_applies_one_after_the_other():
    twice = mj.Transfer(lambda *_: {}, lambda adapter, source, target, **_: {**target, "a": 2 * target["a"]})
    chained = mj.chain(SHARE_A, twice, SHARE_B)
    adapter = chained.init(jax.random.key(0), SOURCE, TARGET)
    assert adapter == {"0": {}, "1": {}, "2": {}}
    merged = chained.apply(adapter, SOURCE, TARGET)
    np.testing.assert_array_equal(merged["a"], 10.0)
    np.testing.assert_array_equal(merged["b"], 7.0)
    assert merged["c"] is TARGET["c"]


def test_a_schedule_lets_the_transfer_in():
    transfer = mj.scheduled(SHARE_A, optax.linear_schedule(1.0, 0.0, 4))
    for step, expected in ((0, 5.0), (1, 3.75), (4, 0.0), (9, 0.0)):
        merged = transfer.apply({}, SOURCE, TARGET, step=step)
        np.testing.assert_allclose(merged["a"], expected)
        assert merged["b"] is TARGET["b"]


def test_a_weight_that_stays_needs_no_step():
    merged = mj.scheduled(SHARE_A, 0.5).apply({}, SOURCE, TARGET)
    np.testing.assert_allclose(merged["a"], 2.5)


def test_without_a_step_a_schedule_has_no_weight():
    for transfer in (
        mj.scheduled(SHARE_A, optax.constant_schedule(1.0)),
        mj.chain(mj.scheduled(SHARE_A, optax.constant_schedule(1.0))),
        mj.lpka_transfer({"a": "a"}, gate=optax.constant_schedule(1.0), num_layers=1),
    ):
        adapter = transfer.init(jax.random.key(0), SOURCE, TARGET)
        with pytest.raises(ValueError, match=r"pass the step, as in transfer.apply\(..., step=step\)"):
            transfer.apply(adapter, SOURCE, TARGET)


def test_the_step_of_joint_training_reaches_every_schedule():
    """Through several sources and a chain; the weight is 1 at step 0 and 0 from step 1 on."""
    share = mj.scheduled(mj.share_transfer(helpers.ROUTES), optax.linear_schedule(1.0, 0.0, 1))
    transfer = mj.several_sources({"only": mj.chain(share)})
    state = helpers.initial_state(mj.identity_transfer(), frozen=True)
    source = {"only": state.source.params}
    adapter = transfer.init(jax.random.key(0), source, state.target.params)
    state = state.replace(source=state.source.replace(params=source))
    state = state.replace(adapter=mj.training.AdapterState(adapter, mj.adapter_adamw().init(adapter)))
    step = helpers.joint_step(transfer, frozen=True, cycle=1)
    changes = []
    for i in range(2):
        state, metrics = step(state, {"target": helpers.batch(i)})
        changes.append(float(metrics["adapter/change"]))
    assert changes[0] > 0 == changes[1]


@pytest.mark.slow
def test_a_gate_on_a_schedule_is_a_gate_of_its_value():
    source, target = {"w": jnp.arange(12.0).reshape(3, 4)}, {"w": jnp.ones((5, 4))}
    options = {"num_layers": 1, "num_heads": 1, "attentions": ("rows_rows",)}
    followed = mj.lpka_transfer({"w": "w"}, gate=optax.linear_schedule(0.0, 1.0, 4), **options)
    adapter = jax.jit(followed.init)(jax.random.key(0), source, target)
    assert "gate" not in adapter["w"]
    follow = jax.jit(followed.apply)
    share = mj.share_transfer({"w": "w"}).apply({}, source, target)
    chex.assert_trees_all_equal(follow(adapter, source, target, step=0), share)
    fixed = mj.lpka_transfer({"w": "w"}, gate=0.75, **options)
    learned = mj.lpka_transfer({"w": "w"}, **options)
    opened = {"w": {**adapter["w"], "gate": jnp.array(0.75)}}
    for other in (jax.jit(fixed.apply)(adapter, source, target), jax.jit(learned.apply)(opened, source, target)):
        chex.assert_trees_all_close(follow(adapter, source, target, step=3), other, rtol=1e-6)


def test_several_sources_meet_in_the_mean():
    transfer = mj.several_sources({"one": mj.share_transfer({"a": "a", "b": "b"}), "two": SHARE_A})
    sources = {"one": SOURCE, "two": jax.tree.map(lambda x: x + 2, SOURCE)}
    merged = transfer.apply(transfer.init(jax.random.key(0), sources, TARGET), sources, TARGET)
    np.testing.assert_array_equal(merged["a"], 6.0)
    np.testing.assert_array_equal(merged["b"], 7.0)
    assert merged["c"] is TARGET["c"]
    assert [row.source for row in transfer.describe(sources, TARGET)] == ["one: a", "one: b", "two: a"]


def test_a_model_may_be_its_own_source():
    model = {"deep": jnp.full((4, 3), 2.0), "shallow": jnp.ones((3, 3)), "rest": jnp.zeros(2)}
    transfer = mj.self_transfer(mj.share_transfer({"shallow": "deep", "deep": "shallow"}))
    merged = transfer.apply(transfer.init(jax.random.key(0), {}, model), {}, model)
    # Both layers are read as they stood.
    np.testing.assert_array_equal(merged["shallow"], 2.0)
    np.testing.assert_array_equal(merged["deep"][:3], 1.0)
    assert merged["rest"] is model["rest"]
    assert [row.source for row in transfer.describe({}, model)] == ["deep", "shallow"]


def test_no_gradient_runs_through_the_side_that_gives():
    model = {"deep": jnp.full((2, 2), 2.0), "shallow": jnp.ones((2, 2))}
    transfer = mj.self_transfer(mj.share_transfer({"shallow": "deep"}))
    gradient = jax.grad(lambda model: transfer.apply({}, {}, model)["shallow"].sum())(model)
    np.testing.assert_array_equal(gradient["deep"], 0.0)


def test_a_self_transfer_trains_without_a_source():
    params, model_state = helpers.variables(helpers.TARGET, 1)
    task = helpers.task(helpers.TARGET)
    options = {"num_layers": 1, "num_heads": 1, "attentions": ("rows_rows",), "output": "residual"}
    transfer = mj.self_transfer(mj.lpka_transfer({"fc/kernel": "hidden/kernel"}, **options))
    state = mj.init_joint_state(
        jax.random.key(0), None, task, transfer, source_params={}, target_params=params, target_state=model_state
    )
    step = jax.jit(mj.make_joint_step(None, task, transfer, cycle=1))
    for i in range(2):
        state, metrics = step(state, {"target": helpers.batch(i)})
    assert metrics["adapter/gradient_norm"] > 0
    assert metrics["adapter/gate/fc/kernel"] != 0


def test_what_is_followed_has_the_names_of_its_transfers():
    source, target = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}, {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}
    options = {"num_layers": 1, "num_heads": 1, "attentions": ("rows_rows",)}
    two = mj.lpka_transfer({"a": "a", "b": "b"}, **options)

    def monitored(transfer, sources=source):
        adapter = jax.jit(transfer.init)(jax.random.key(0), sources, target)
        found = transfer.monitor(adapter, sources, target, step=1)
        return {name: float(value) for name, value in found.items()}

    assert monitored(two) == {"gate/a": 0.0, "gate/b": 0.0}
    assert monitored(mj.lpka_transfer({"a": "a", "b": "b"}, shared=True, **options)) == {"gate/a": 0.0, "gate/b": 0.0}
    assert monitored(mj.lpka_transfer({"a": "a"}, gate=optax.linear_schedule(0.0, 1.0, 4), **options)) == {"gate": 0.25}
    assert monitored(mj.lpka_transfer({"a": "a"}, output="published", **options)) == {}
    assert monitored(mj.scheduled(two, optax.linear_schedule(1.0, 0.0, 2)))["weight"] == 0.5
    assert monitored(mj.chain(SHARE_A, mj.lpka_transfer({"b": "b"}, **options))) == {"1/gate/b": 0.0}
    several = mj.several_sources({"one": mj.lpka_transfer({"b": "b"}, **options)})
    assert monitored(several, {"one": source}) == {"one/gate/b": 0.0}
    assert monitored(mj.identity_transfer()) == monitored(SHARE_A) == {}


def test_bad_combinations_are_refused():
    with pytest.raises(ValueError, match="what a model gives to itself must be a Transfer"):
        mj.self_transfer(None)
    with pytest.raises(ValueError, match="no transfers to chain"):
        mj.chain()
    with pytest.raises(ValueError, match="a mapping of names to transfers, at least one, got dict"):
        mj.several_sources({})
    with pytest.raises(ValueError, match="the source's parameters lack 'won'; did you mean 'one'"):
        mj.several_sources({"won": SHARE_A}).init(jax.random.key(0), {"one": SOURCE}, TARGET)
    with pytest.raises(ValueError, match=r"number 1 of the chain must be a Transfer, .* got dict"):
        mj.chain(SHARE_A, {"a": "a"})
    with pytest.raises(ValueError, match="at least one, got list"):
        mj.several_sources([SHARE_A])
    with pytest.raises(ValueError, match="the transfer of the source 'one' must be a Transfer"):
        mj.several_sources({"one": None})
    with pytest.raises(ValueError, match=r"what is scheduled must be a Transfer, .* got str"):
        mj.scheduled("a", 0.5)
    with pytest.raises(ValueError, match="schedule must be a finite number or a schedule of the step, got nan"):
        mj.scheduled(SHARE_A, float("nan"))
    with pytest.raises(ValueError, match="'published' has no gate"):
        mj.lpka_transfer({"a": "a"}, output="published", gate=0.5)


def test_without_a_source_nothing_of_it_matters():
    """The transfer reads zeros: any two sources give the same, and it is that of a source of zeros."""
    options = {"num_layers": 1, "num_heads": 1, "attentions": ("rows_rows",), "output": "residual"}
    transfer = mj.lpka_transfer({"w": "w"}, gate=0.5, **options)
    alone = mj.without_source(transfer)
    target = {"w": jnp.array(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)}
    sources = [{"w": jnp.full((4, 3), value)} for value in (1.0, 2.0, 0.0)]
    adapter, apply = jax.jit(alone.init)(jax.random.key(0), sources[0], target), jax.jit(alone.apply)
    first, second = (apply(adapter, source, target)["w"] for source in sources[:2])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, jax.jit(transfer.apply)(adapter, sources[2], target)["w"])
    assert (first != target["w"]).any()
    with pytest.raises(ValueError, match="what is to read no source must be a Transfer"):
        mj.without_source("share")
