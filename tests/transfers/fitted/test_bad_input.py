"""What a refit, and what comes before and after it, refuse or warn of, before any work."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import merge_jax as mj

EVERYTHING = {"**": "**"}
TASK = mj.Task(lambda *given: None, optax.sgd(0.1))
X = jnp.asarray(np.random.default_rng(0).normal(size=(20, 5)), jnp.float32)


def test_inputs_are_arrays_one_after_the_other():
    fit = functools.partial(mj.refit, EVERYTHING, None, None, {}, {})
    with pytest.raises(ValueError, match=r"inputs as arrays, one after the other \(texts as tokens\), got dict$"):
        fit({"image": jnp.zeros((4, 2))})
    with pytest.raises(ValueError, match=r"got list$"):
        fit([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match="input 0 of the refit must be numbers, got an array of <U6"):
        fit(np.array(["a text"]))


class Calm(nn.Module):
    """In training mode unless told otherwise, as many models are."""

    noise: float

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="last")(nn.Dropout(self.noise, deterministic=not train)(x))


@pytest.mark.parametrize("noise", [0.0, 0.5])  # Flax has an error for each.
def test_a_model_that_trains_unless_told_otherwise_is_named(noise):
    model = Calm(noise)
    variables = model.init(jax.random.key(0), X, train=False)
    calm = functools.partial(model.apply, train=False)
    with pytest.raises(ValueError, match=r"^the target: it updates .* evaluation mode, such as functools\.partial"):
        mj.refit(EVERYTHING, calm, model.apply, variables, variables, X)


def test_a_model_that_returns_new_statistics_is_named():
    model = Calm(0.0)
    variables = model.init(jax.random.key(0), X, train=False)
    calm = functools.partial(model.apply, train=False)
    updating = functools.partial(model.apply, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"^the source: it returns new batch_stats beside its outputs, as in training"):
        mj.refit(EVERYTHING, updating, calm, variables, variables, X)
    watching = functools.partial(calm, mutable=["intermediates"])  # Of which the variables have none.
    assert mj.refit(EVERYTHING, watching, calm, variables, variables, X).solved


@pytest.mark.parametrize("role", ["source", "target"])
def test_a_model_that_draws_random_numbers_is_warned_of(role):
    """A function that brings its own key, so that Flax does not ask for one."""

    def calm(params, x):
        return x @ params["first"]["kernel"]

    def noisy(params, x):
        return calm(params, x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape))

    params = {"first": {"kernel": jnp.ones((5, 4))}}
    models = (noisy, calm) if role == "source" else (calm, noisy)
    with pytest.warns(UserWarning, match=f"^the {role} draws random numbers for each example, as dropout does: it"):
        mj.refit(EVERYTHING, *models, params, params, X)


def test_a_plain_tree_may_have_a_layer_of_the_name_of_a_feature():
    def model(params, x):
        hidden = x @ params["hidden"]["kernel"]
        return jnp.maximum(hidden, 0) @ params["last"]["kernel"], {"hidden": hidden}

    params = {"hidden": {"kernel": jnp.ones((5, 4))}, "last": {"kernel": jnp.ones((4, 2))}}
    assert mj.refit(EVERYTHING, model, model, params, params, X).solved


@pytest.mark.filterwarnings("error:the source does not read")
def test_a_model_in_training_mode_is_told():
    def model(variables, x, *, train):
        own = variables["batch_stats"]["norm"]
        mean = x.mean(0) if train else own["mean"]
        _ = own["mean"] * 0.9  # As an updated average, which nothing returns.
        return (x - mean[None]) @ variables["params"]["last"]["kernel"]

    given = {"params": {"last": {"kernel": jnp.ones((5, 3))}}, "batch_stats": {"norm": {"mean": jnp.ones(5)}}}
    training, evaluating = (functools.partial(model, train=train) for train in (True, False))
    with pytest.raises(UserWarning, match="the source does not read its statistics batch_stats/norm/mean: it"):
        mj.refit(EVERYTHING, training, evaluating, given, given, X)


def test_a_module_is_not_its_apply():
    with pytest.raises(ValueError, match=r"source must be a function, such as model\.apply, got NoneType"):
        mj.refit(EVERYTHING, None, nn.Dense(2).apply, {}, {}, X)
    model, variables = nn.Dense(2), {"params": {}}
    for call in (
        lambda: mj.refit(EVERYTHING, model.apply, model, {}, {}, X),
        lambda: mj.prepare(jax.random.key(0), {"a": "a"}, model, model.apply, variables, variables, X),
        lambda: mj.reset_statistics(model, variables, X),
    ):
        with pytest.raises(ValueError, match=r"give model\.apply, not the Dense itself"):
            call()


@pytest.mark.parametrize("model", [nn.Dense(2), nn.Sequential([nn.Dense(2)])])  # Flax has an error for each.
def test_parameters_without_their_collection_are_named(model):
    x = jnp.zeros((4, 3))
    variables = model.init(jax.random.key(0), x)
    names = ", ".join(map(repr, sorted(variables["params"])))
    with pytest.raises(ValueError, match=f"^the source: the model reads .* all that model.init made, .* got {names} "):
        mj.refit(EVERYTHING, model.apply, model.apply, variables["params"], variables, x)


def test_what_does_not_fit_a_model_names_its_role():
    narrow, wide = nn.Dense(2), nn.Dense(3)
    few, many = narrow.init(jax.random.key(0), X), wide.init(jax.random.key(1), X)
    with pytest.raises(
        ValueError, match=r"^the target: the variables do not fit the model and inputs of \[\[20, 5\]\]"
    ):
        mj.refit(EVERYTHING, wide.apply, narrow.apply, many, many, X)
    with pytest.raises(ValueError, match=r"^the source: the variables do not fit .* of \[\[20, 4\]\]"):
        mj.refit(EVERYTHING, wide.apply, narrow.apply, many, few, X[:, :4])


def test_options_of_another_type_are_named():
    model = nn.Dense(2)
    variables = model.init(jax.random.key(0), X)
    fit = functools.partial(mj.refit, EVERYTHING, model.apply, model.apply, variables, variables, X)
    for key in (0, jnp.zeros(2), jax.random.split(jax.random.key(0), 3), np.zeros(5, np.uint32)):
        with pytest.raises(ValueError, match=r"the key must be one of JAX's, such as jax.random.key\(0\), got"):
            fit(key=key)
    for call in (
        lambda key: mj.prepare(key, {"a": "a"}, model.apply, model.apply, variables, variables, X),
        lambda key: mj.init_joint_state(
            key,
            None,
            TASK,
            mj.identity_transfer(),
            source_params=variables["params"],
            target_params=variables["params"],
        ),
    ):
        with pytest.raises(ValueError, match=r"the key must be one of JAX's, such as jax.random.key\(0\), got 0"):
            call(0)
    for ridge in ("1e-2", None):
        with pytest.raises(ValueError, match=f"ridge must be a finite number above 0, got {ridge!r}"):
            fit(ridge=ridge)


def test_a_shard_map_that_checks_its_devices_is_refused():
    model = nn.Dense(2)
    variables = model.init(jax.random.key(0), X)
    fit = functools.partial(mj.refit, EVERYTHING, model.apply, model.apply, variables, variables, axis_name="data")
    options = {"mesh": mj.data_mesh(1), "in_specs": jax.P("data"), "out_specs": jax.P()}
    with pytest.raises(
        ValueError, match=r"over 'data' needs jax.shard_map\(..., check_vma=False\), got check_vma=True"
    ):
        jax.shard_map(lambda x: fit(x).variables, **options)(X)


def test_a_model_of_nnx_in_training_mode_is_refused():
    model = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(1)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    parts = nnx.to_pure_dict(params)

    def apply(params, x):
        return nnx.merge(graph, params, rest)(x)

    with pytest.raises(ValueError, match=r"the source: it updates its state .* or of NNX after model\.eval\(\)"):
        mj.refit(EVERYTHING, apply, apply, parts, parts, X)


def test_draws_of_a_gamma_distribution_are_warned_of():
    params = {"kernel": jnp.ones((5, 4))}

    def apply(params, x):
        return x @ params["kernel"] * jax.random.gamma(jax.random.key(0), 1.0, (len(x), 4))

    with pytest.warns(UserWarning, match="draws random numbers") as caught:
        mj.refit(EVERYTHING, apply, lambda params, x: x @ params["kernel"], params, params, X)
    assert sum("source draws" in str(one.message) for one in caught) == 1
