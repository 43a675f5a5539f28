"""Parameter trees of every kind, each made by its own library and run by it after a transfer."""

import sys
import types
import warnings
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import merge_jax as mj
from tests.checkpoints.weights.writers import keras
from tests.helpers import jitted_init

__all__ = ["keras"]  # A fixture.

SOURCE = {"w": {"kernel": jnp.arange(35.0).reshape(7, 5)}}  # A matrix [5, 7].
X = jnp.ones((2, 4))


def lpka(target):
    """A small transfer of every kind of output into one leaf."""
    return mj.lpka_transfer({target: "w/kernel"}, num_layers=1, num_heads=1, attentions=("rows_rows",))


def merged_by(transfer, target, source=SOURCE):
    """Returns what both an adapter and sharing make of a tree; at the start they are the same."""
    adapter = jax.jit(transfer.init)(jax.random.key(0), source, target)
    return jax.jit(lambda source, target: transfer.apply(adapter, source, target))(source, target)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="fc")(nn.relu(nn.Dense(6, name="hidden")(x)))


@pytest.mark.parametrize("wrap", [dict, freeze])
def test_linen_dicts_and_frozen_dicts(wrap):
    target = wrap(jitted_init(Linen(), 0, X)["params"])
    merged = merged_by(lpka("hidden/kernel"), target)
    assert type(merged) is type(target)
    assert isinstance(merged, FrozenDict) == (wrap is freeze)
    np.testing.assert_array_equal(merged["hidden"]["kernel"][:, :5], SOURCE["w"]["kernel"][:4])
    assert Linen().apply({"params": merged}, X).shape == (2, 3)


class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.hidden = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.fc = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc(nnx.relu(self.norm(self.hidden(x))))


def test_nnx_is_split_transferred_and_merged():
    source, target = Net(8, nnx.Rngs(0)), Net(6, nnx.Rngs(1))
    source_params = nnx.to_pure_dict(nnx.state(source, nnx.Param))
    graph, params, rest = nnx.split(target, nnx.Param, ...)
    pure = nnx.to_pure_dict(params)
    merged = merged_by(mj.lpka_transfer({"hidden/kernel": "hidden/kernel"}, num_layers=1), pure, source_params)
    nnx.replace_by_pure_dict(params, merged)
    model = nnx.merge(graph, params, rest)
    np.testing.assert_array_equal(model.hidden.kernel[...], source.hidden.kernel[...][:, :6])
    assert model(X).shape == (2, 3)


def test_nnx_states_and_modules_are_trees_too():
    target = Net(6, nnx.Rngs(1))
    share = mj.share_transfer({"hidden/kernel": "hidden/kernel"})
    graph, params, rest = nnx.split(target, nnx.Param, ...)
    assert set(mj.flatten(params)) == set(mj.flatten(nnx.to_pure_dict(params)))
    merged = share.apply({}, nnx.state(Net(8, nnx.Rngs(0)), nnx.Param), params)
    of_state = nnx.merge(graph, merged, rest)
    of_module = share.apply({}, Net(8, nnx.Rngs(0)), target)
    for model in (of_state, of_module):
        np.testing.assert_array_equal(model.hidden.kernel[...], Net(8, nnx.Rngs(0)).hidden.kernel[...][:, :6])
        assert model(X).shape == (2, 3)


def test_equinox_modules():
    """Its layers are torch's, `[out, in]`; functions and sizes among the leaves stay as they are."""
    model = eqx.nn.MLP(4, 3, 6, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    merged = eqx.combine(merged_by(lpka("layers/0/weight"), params), static)
    np.testing.assert_array_equal(merged.layers[0].weight[:5], SOURCE["w"]["kernel"].T[:, :4])
    assert jax.vmap(merged)(X).shape == (2, 3)
    whole = mj.share_transfer({"layers/0/weight": "w/kernel"}).apply({}, SOURCE, model)
    assert whole.activation is model.activation
    conv = eqx.nn.Conv2d(2, 6, 3, key=jax.random.key(0))
    assert mj.layouts.matrix_spec("weight", conv.weight.shape).matrix_shape(conv.weight.shape) == (6, 18)


class Block(eqx.Module):
    """Holds what equinox does not mark as static: each is a leaf."""

    fc: eqx.nn.Linear
    activation: object = jax.nn.relu
    name: str = "block"
    count: int = 1
    rate: float = 0.5

    def __call__(self, x):
        return self.activation(self.fc(x)) * self.count


def block(width, seed):
    return Block(eqx.nn.Linear(4, width, key=jax.random.key(seed)))


def test_what_is_no_array_in_an_equinox_module_is_kept_or_refused():
    source, target = block(8, 0), block(6, 1)
    share = mj.share_transfer({"fc/weight": "fc/weight"})
    merged = share.apply({}, source, target)
    np.testing.assert_array_equal(merged.fc.weight, source.fc.weight[:6])
    assert (merged.activation, merged.name, merged.rate) == (target.activation, "block", 0.5)
    task, params = mj.Task(lambda *args: args, optax.sgd(0.1)), eqx.filter(target, eqx.is_array)
    advice = r"must be an array, got {}: give arrays alone; of an Equinox module, .* = eqx.partition"
    for role, found, trees in (
        ("target leaf 'activation'", "custom_jvp", {"source_params": source, "target_params": target}),
        ("target leaf 'rate'", "float", {"source_params": {}, "target_params": {"rate": 0.5}}),
        ("source leaf 'activation'", "custom_jvp", {"source_params": source, "target_params": params}),
        (
            "target state leaf 'name'",
            "str",
            {"source_params": {}, "target_params": params, "target_state": {"name": "a"}},
        ),
    ):
        with pytest.raises(ValueError, match=f"^the {role} {advice.format(found)}"):
            mj.init_joint_state(jax.random.key(0), None, task, share, **trees)
    with pytest.raises(ValueError, match=f"^the source's leaf 'activation' {advice.format('custom_jvp')}"):
        mj.refit({"fc/*": "fc/*"}, lambda net, x: jax.vmap(net)(x), lambda net, x: jax.vmap(net)(x), source, target, X)


def test_the_arrays_of_equinox_modules_are_refitted():
    (source, static), (target, rest) = (eqx.partition(block(4, seed), eqx.is_array) for seed in (0, 1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)
    made = mj.refit(
        {"fc/*": "fc/*"},
        lambda params, x: jax.vmap(eqx.combine(params, static))(x),
        lambda params, x: jax.vmap(eqx.combine(params, rest))(x),
        source,
        target,
        x,
    ).variables
    np.testing.assert_allclose(made.fc.weight, source.fc.weight, atol=1e-3)


def test_shared_layers_of_equinox_stay_shared():
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self):
            table = eqx.nn.Embedding(5, 4, key=jax.random.key(0))
            head = eqx.nn.Linear(4, 5, use_bias=False, key=jax.random.key(1))
            self.shared = eqx.nn.Shared((table, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight)

    params, static = eqx.partition(Tied(), eqx.is_array)
    (path,) = mj.flatten(params)
    table, head = eqx.combine(merged_by(lpka(path), params), static).shared()
    np.testing.assert_array_equal(table.weight, SOURCE["w"]["kernel"].T[:5, :4])
    assert head.weight is table.weight


def test_a_matrix_at_two_paths_is_warned_of():
    """In a plain tree it is two parameters, which the first step of training would take apart."""
    matrix, zeros = jnp.ones((7, 5)), jnp.zeros(5)
    target = {"table": {"embedding": matrix, "bias": zeros}, "fc": {"kernel": matrix, "bias": zeros}}
    share = mj.share_transfer({"fc/kernel": "w/kernel", "fc/bias": "w/bias"})
    source = {"w": {"kernel": jnp.zeros((7, 5)), "bias": jnp.ones(5)}}
    with pytest.warns(UserWarning, match="'table/embedding' are one array, but only 'fc/kernel' is written"):
        merged = share.apply({}, source, target)
    assert merged["table"]["embedding"] is matrix
    mj.share_transfer({"fc/kernel": "w/kernel", "table/embedding": "w/kernel"}).apply({}, source, target)
    task = mj.Task(lambda *args: args, optax.sgd(0.1))
    with pytest.warns(UserWarning, match="^the target leaves .* are one array, but will be trained as two"):
        mj.init_joint_state(jax.random.key(0), None, task, share, source_params=source, target_params=target)


class NamedArray:
    """As one of haliax: a node whose array has no name."""

    def __init__(self, array, axes):
        self.array, self.axes = array, axes


jax.tree_util.register_pytree_node(
    NamedArray, lambda node: ((node.array,), node.axes), lambda axes, arrays: NamedArray(*arrays, axes)
)


def check_named_array(weight):
    """Its layers are torch's, `[out, in]`; by the path `weight/0` the array would be read as `[in, out]`."""
    target = {"weight": weight}
    assert list(mj.flatten(target)) == ["weight"]
    merged = merged_by(lpka("weight"), target)["weight"]
    assert merged.axes == weight.axes
    np.testing.assert_array_equal(merged.array[:5], SOURCE["w"]["kernel"].T[:, :4])
    task = mj.Task(lambda *args: args, optax.sgd(0.1))
    state = mj.init_joint_state(
        jax.random.key(0), None, task, lpka("weight"), source_params=SOURCE, target_params=target
    )
    np.testing.assert_array_equal(state.target.params["weight"].array, weight.array)


def test_a_named_array_is_one_leaf(monkeypatch):
    monkeypatch.setitem(sys.modules, "haliax", types.SimpleNamespace(NamedArray=NamedArray))
    check_named_array(NamedArray(jnp.ones((6, 4)), ("out", "in")))


def test_named_arrays_of_haliax():
    """Not among the test dependencies: haliax 1.3 is not imported beside jax 0.10.2 or 0.12."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of its use of Equinox.
        hax = pytest.importorskip("haliax", exc_type=ImportError)
        from haliax.nn import Linear
    check_named_array(Linear.init(hax.Axis("in", 4), hax.Axis("out", 6), key=jax.random.key(0)).weight)


def test_haiku_parameters():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([6, 3])(x)))
    target = jax.jit(net.init)(jax.random.key(0), X)
    (path,) = mj.paths.find_paths(mj.flatten(target), "**/linear_0/w")
    assert path == "mlp/~/linear_0/w"
    merged = merged_by(lpka(path), target)
    np.testing.assert_array_equal(merged["mlp/~/linear_0"]["w"][:, :5], SOURCE["w"]["kernel"][:4])
    assert net.apply(merged, X).shape == (2, 3)


def test_haiku_embeddings_norms_and_transposed_convolutions():
    """Tables lie by rows, offsets are `[1, C]`, a transposed kernel is `[kh, kw, out, in]`."""

    def forward(tokens, image, width):
        hk.BatchNorm(True, True, 0.9)(image, is_training=True)
        return hk.Embed(4, width)(tokens), hk.Conv2DTranspose(width, 3)(image)

    nets = [hk.transform_with_state(lambda *x, width=width: forward(*x, width)) for width in (5, 3)]
    inputs = jnp.zeros((2,), jnp.int32), jnp.ones((1, 4, 4, 2))
    source, target = (jax.jit(net.init)(jax.random.key(i), *inputs)[0] for i, net in enumerate(nets))
    source["batch_norm"]["offset"] = jnp.array([1.0, 2.0]).reshape(1, 1, 1, 2)
    merged = mj.share_transfer({"**": "**"}).apply({}, source, target)
    np.testing.assert_array_equal(merged["embed"]["embeddings"], source["embed"]["embeddings"][:, :3])
    np.testing.assert_array_equal(merged["batch_norm"]["offset"].ravel(), [1, 2])
    old, new = (tree["conv2_d_transpose"]["w"] for tree in (source, merged))
    assert (old.shape, new.shape) == ((3, 3, 5, 2), (3, 3, 3, 2))
    np.testing.assert_array_equal(new, old[:, :, :3])
    bias = {"bn": {"bias": jnp.arange(1.0, 3.0)}}
    moved = mj.share_transfer({"batch_norm/offset": "bn/bias"}).apply({}, bias, target)
    np.testing.assert_array_equal(moved["batch_norm"]["offset"].ravel(), [1, 2])


def test_a_torch_table_and_a_haiku_table_are_one():
    source = {"tok": {"embedding": jnp.arange(12.0).reshape(4, 3)}}
    target = {"embed": {"embeddings": jnp.zeros((4, 3))}}
    merged = mj.share_transfer({"embed/embeddings": "tok/embedding"}).apply({}, source, target)
    np.testing.assert_array_equal(merged["embed"]["embeddings"], source["tok"]["embedding"])


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.encode = nnx.Linear(3, 3, rngs=rngs)
        self.decode = self.encode


def test_tied_layers_of_nnx_stay_tied():
    """A module is not rebuilt with two layers of one: its state is what a transfer takes, which has the layer once."""
    net, source = Tied(nnx.Rngs(0)), {"w": jnp.full((3, 3), 7.0)}
    share = mj.share_transfer({"encode/kernel": "w"})
    with pytest.raises(
        ValueError, match=r"^give the parameters that nnx.split.*'decode/bias' and 'encode/bias' are one"
    ):
        share.apply({}, source, net)
    graph, params = nnx.split(net, nnx.Param)
    path, *others = (path for path in mj.flatten(params) if path.endswith("kernel"))
    assert not others
    model = nnx.merge(graph, mj.share_transfer({path: "w"}).apply({}, source, params))
    assert model.encode is model.decode
    np.testing.assert_array_equal(model.decode.kernel[...], 7)
    assert mj.share_transfer({"v": "decode/kernel"}).apply({}, net, {"v": jnp.zeros((3, 3))})["v"].any()


def keras_net(keras, width):
    layers = keras.layers
    hidden = layers.Dense(width, kernel_initializer=keras.initializers.GlorotUniform(seed=width), name="hidden")
    head = layers.Dense(3, kernel_initializer=keras.initializers.GlorotUniform(seed=0))
    stack = [keras.Input((4,)), hidden, layers.BatchNormalization(), head]
    return keras.Sequential(stack, name="net")


def numbers(variables):
    return {variable.path: variable.value for variable in variables}


@jax.numpy_rank_promotion("allow")
def test_a_keras_model_learns_and_its_own_arrays_live_on(keras):
    source, target = keras_net(keras, 8), keras_net(keras, 6)
    weights, others = target.trainable_variables, target.non_trainable_variables
    before = np.array(weights[0].value)

    def loss_fn(params, model_state, batch, key):
        params, model_state = ([tree[v.path] for v in own] for tree, own in ((params, weights), (model_state, others)))
        logits, model_state = target.stateless_call(params, model_state, batch["x"], training=True)
        model_state = {v.path: value for v, value in zip(others, model_state, strict=True)}
        return mj.cross_entropy(logits, batch["y"]).mean(), (model_state, {})

    task, share = mj.Task(loss_fn, optax.sgd(0.1)), mj.share_transfer({"net/hidden/kernel": "net/hidden/kernel"})
    state = mj.init_joint_state(
        jax.random.key(0), None, task, share, source_params=numbers(source.trainable_variables),
        target_params=numbers(weights), target_state=numbers(others),
    )  # fmt: skip
    step = jax.jit(mj.make_joint_step(None, task, share), donate_argnums=0)
    # Batch statistics of equal inputs leave no gradient.
    inputs = jax.random.normal(jax.random.key(1), (6, 4))
    state, _ = step(state, {"target": {"x": inputs, "y": jnp.arange(6) % 3}})
    np.testing.assert_array_equal(weights[0].value, before)
    assert source(X).shape == target(X).shape == (2, 3)
    copied = np.asarray(source.trainable_variables[0].value)[:, :6]
    moved = np.abs(np.asarray(state.target.params["net/hidden/kernel"]) - copied).max()
    assert 1e-3 < moved < 0.3 < np.abs(before - copied).max()
    (mean,) = (path for path in state.target.model_state if path.endswith("moving_mean"))
    assert np.abs(state.target.model_state[mean]).max() > 0


def test_keras_variables_are_refused_with_what_to_give(keras):
    net, share = keras_net(keras, 6), mj.share_transfer({"0": "w/kernel"})
    task, advice = mj.Task(lambda *args: args, optax.sgd(0.1)), r"give the arrays .*\{v.path: v.value for v in model"
    with pytest.raises(ValueError, match=f"^the target leaf '0' must be a float array, got Variable: {advice}"):
        share.apply({}, SOURCE, net.trainable_variables)
    for name, params in (("leaf '0'", net.trainable_variables), ("tree", net)):
        with pytest.raises(ValueError, match=f"^the target {name} must be an array, got .*: {advice}"):
            mj.init_joint_state(jax.random.key(0), None, task, share, source_params=SOURCE, target_params=params)


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def test_namedtuples_lists_and_optimizer_states():
    target = [Pair(jnp.zeros((4, 6)), jnp.ones(6)), (Pair(jnp.ones((2, 2)), jnp.ones(2)), None)]
    merged = merged_by(lpka("0/kernel"), target)
    assert isinstance(merged[0], Pair)
    assert merged[1][1] is None
    state = optax.adam(1e-3).init({"w": jnp.ones((4, 6))})
    moved = mj.share_transfer({"0/mu/w": "w/kernel"}).apply({}, SOURCE, state)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    np.testing.assert_array_equal(moved[0].mu["w"][:, :5], SOURCE["w"]["kernel"][:4])
    assert moved[0].nu["w"] is state[0].nu["w"]


def test_a_single_array_is_a_tree_of_one_leaf():
    target = jnp.zeros((7, 5))
    (path,) = mj.flatten(target)
    assert path == ""


def test_joint_training_of_two_nnx_models():
    """The recipe of the documentation: the graph outside, parameters and statistics as plain trees."""

    def task_of(model):
        graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

        def loss_fn(params, model_state, batch, key):
            state = [nnx.State(jax.tree.map(lambda x: x, tree)) for tree in (params, model_state)]
            model = nnx.merge(graph, *state)
            logits = model(batch["x"])
            model_state = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return mj.cross_entropy(logits, batch["y"]).mean(), (model_state, {})

        return mj.Task(loss_fn, optax.sgd(0.1)), nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    (source, source_params, source_stats), (target, target_params, target_stats) = (
        task_of(Net(width, nnx.Rngs(width))) for width in (8, 6)
    )
    transfer = mj.share_transfer({"hidden/kernel": "hidden/kernel"})
    state = mj.init_joint_state(
        jax.random.key(0), source, target, transfer, source_params=source_params, source_state=source_stats,
        target_params=target_params, target_state=target_stats,
    )  # fmt: skip
    batch = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32), "y": jnp.arange(8) % 3}
    step = jax.jit(mj.make_joint_step(source, target, transfer, cycle=1))
    losses = []
    for _ in range(5):
        state, metrics = step(state, {"source": batch, "target": batch})
        losses.append(float(metrics["target/loss"]))
    assert losses[-1] < losses[0]
    assert np.abs(state.target.model_state["norm"]["mean"]).max() > 0
