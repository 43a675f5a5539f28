"""Refit: what it solves for, that it gives back what can be given back, and what it refuses."""

import functools
from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.models.layers import DepthwiseConv
from merge_jax.models.mobilenet import InvertedResidualStage
from merge_jax.transfers.fitted import compiled, solve, walk
from merge_jax.transfers.fitted.refit import FewRowsWarning
from tests.helpers import jitted_init

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(40, 8, 8, 1)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(1, 20, (40, 6)), jnp.int32)
EVERYTHING = {"**": "**"}


def mobile(width):
    stages = (InvertedResidualStage(2, width, 1, 1),)
    return mj.models.MobileNetV2(stages, 10, stem_width=width, head_width=4 * width)


class Depthwise(nn.Module):
    """A depthwise convolution between two layers, with norms that have statistics: what a MobileNet is of, once."""

    width: int

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.BatchNorm(not train, name="norm1")(nn.Conv(self.width, (1, 1), name="expand")(x)))
        x = nn.relu(nn.BatchNorm(not train, name="norm2")(DepthwiseConv(1, name="depthwise")(x)))
        return nn.Dense(10, name="fc")(x.mean((1, 2)))


def text(width, heads=4):
    encoder = mj.models.TextEncoder(20, width, 1, heads, 2 * width, 8, num_segments=0, separator=19)
    return mj.models.TextClassifier(encoder, 3)


PAIRS = {
    "depthwise": (Depthwise(8), Depthwise(4), IMAGES),
    "resnet": (mj.models.small_resnet(10, num_stages=2), mj.models.small_resnet(10, num_stages=2, width=0.5), IMAGES),
    "mobilenet": (mobile(8), mobile(4), IMAGES),
    "text": (text(16), text(8), TOKENS),
}


@functools.cache
def run(model):
    return jax.jit(model.apply)


@functools.cache
def variables_of(name, role):
    """Variables with noise on them, and running statistics that are those of the inputs."""
    source, target, inputs = PAIRS[name]
    model, seed = (source, 0) if role == "source" else (target, 1)
    variables = {k: v for k, v in jitted_init(model, seed, inputs).items() if k != "intermediates"}
    rng = np.random.default_rng(seed)
    noise = lambda leaf: leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    variables["params"] = jax.tree.map(noise, variables["params"])
    return mj.reset_statistics(model.apply, variables, inputs) if "batch_stats" in variables else variables


def refit_pair(name, **options):
    source, target, inputs = PAIRS[name]
    variables = variables_of(name, "source"), variables_of(name, "target")
    return mj.refit(EVERYTHING, source.apply, target.apply, *variables, inputs, **{**EXACT, **options})


refitted = functools.cache(refit_pair)
EXACT = {"ridge": 1e-5, "max_rows": 10**6}
REAL = ["resnet", "mobilenet", "text"]
pytestmark = pytest.mark.filterwarnings("ignore::merge_jax.transfers.fitted.refit.FewRowsWarning")


def difference(variables, name):
    source, target, inputs = PAIRS[name]
    wanted = run(source)(variables_of(name, "source"), inputs)
    return float(np.mean(np.square(run(target)(variables, inputs) - wanted)) / np.var(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_target_of_the_source_s_size_computes_what_it_does(name):
    source, _, inputs = PAIRS[name]
    variables = variables_of(name, "source")
    start = jax.tree.map(lambda leaf: 0.5 * leaf + 0.1, variables)
    made, solved, _ = mj.refit(EVERYTHING, source.apply, source.apply, variables, start, inputs, **EXACT)
    np.testing.assert_allclose(run(source)(made, inputs), run(source)(variables, inputs), atol=2e-3)
    assert min(map(float, solved.values())) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_model_comes_nearer_to_the_source_than_alignment(name):
    made = refitted(name)
    # A large ridge leaves the aligned kernels, and sets biases and statistics. In a stream of random embeddings no
    # directions stand out.
    most = 0.9 if name == "text" else 0.7
    assert difference(made.variables, name) < most * difference(refit_pair(name, ridge=1e6).variables, name)
    assert all(0 <= float(one) <= 1.0001 for one in made.solved.values())


@pytest.mark.parametrize("name", ["depthwise", *(pytest.param(name, marks=pytest.mark.slow) for name in REAL[:2])])
def test_running_statistics_are_those_of_the_inputs(name):
    _, target, inputs = PAIRS[name]
    variables = refitted(name).variables
    trained, _ = jax.jit(functools.partial(target.apply, train=True, mutable=["batch_stats"]))(variables, inputs)
    np.testing.assert_allclose(run(target)(variables, inputs), trained, atol=5e-3)


@pytest.mark.slow
def test_what_is_solved_and_what_is_kept():
    made = refitted("text")
    layer = "params/encoder/layer_0"
    for leaf in ("attention/query/kernel", "attention/out/kernel", "up/kernel", "down/kernel", "norm1/scale"):
        assert f"{layer}/{leaf}" in made.solved
    assert "params/encoder/embeddings/norm/scale" in made.solved
    assert set(made.kept) == {f"params/encoder/embeddings/{name}/embedding" for name in ("word", "position")}


def test_of_the_input_of_a_depthwise_convolution_no_shifted_copy_is_kept(monkeypatch):
    walks = []
    monkeypatch.setattr(compiled, "_programs", OrderedDict())
    monkeypatch.setattr(walk.Walk, "check_rows", lambda walk, *_: walks.append(walk))
    monkeypatch.setattr(walk.Walk, "run", lambda *_: {})
    refit_pair("depthwise")
    for kept in (walks[0]._source_kept(), walks[0]._target_kept()):
        # The input alone; not its nine shifts too.
        assert max(map(len, kept)) == 1


@pytest.mark.slow
def test_deeper_models_need_no_more_memory():
    x = jax.ShapeDtypeStruct((4096, 64), jnp.float32)

    def memory(depth):
        model = nn.Sequential([layer for _ in range(depth) for layer in (nn.Dense(64), nn.relu)])
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        refit = lambda source, target, x: mj.refit(EVERYTHING, *(model.apply,) * 2, source, target, x).variables  # noqa: E731
        return jax.jit(refit).lower(shapes, shapes, x).compile().memory_analysis().temp_size_in_bytes

    # What all inputs are at a depth is 1 MB, of both models: 8 MB for each four layers where all depths are kept.
    assert memory(8) < memory(4) + 2e6


@pytest.mark.slow
def test_places_of_a_window_enter_one_by_one(monkeypatch):
    made = refitted("mobilenet")
    monkeypatch.setattr(compiled, "_programs", OrderedDict())
    monkeypatch.setattr(solve, "_starts_by_tap", lambda *_: [])
    slow = refit_pair("mobilenet")
    assert slow.solved.keys() == made.solved.keys()
    for path, share in slow.solved.items():
        np.testing.assert_allclose(made.solved[path], share, atol=1e-4, err_msg=path)


def test_a_depthwise_convolution_of_bfloat16_is_refitted_to_itself():
    conv = nn.Sequential([nn.Conv(3, (3, 3), feature_group_count=3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 4, 4, 3)), jnp.bfloat16)
    variables = jitted_init(conv, 0, x)
    new = mj.refit(EVERYTHING, conv.apply, conv.apply, variables, variables, x)
    kernels = (one["params"]["layers_0"]["kernel"].astype(jnp.float32) for one in (new.variables, variables))
    np.testing.assert_allclose(*kernels, atol=0.01)
    assert new.solved["params/layers_0/kernel"] > 0.99


def test_depthwise_kernels_are_solved_channel_by_channel():
    assert "params/depthwise/kernel" in refitted("depthwise").solved


@pytest.mark.slow
def test_a_residual_sum_is_solved_jointly():
    solved = refitted("resnet").solved
    assert float(solved["params/stage2_0/conv2/kernel"]) == float(solved["params/stage2_0/shortcut/kernel"])
    assert float(solved["params/stage1_0/conv2/kernel"]) != float(solved["params/stage2_0/conv2/kernel"])


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["last"]["kernel"]


def perceptron(seed, hidden):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"first": {"kernel": draw(5, hidden), "bias": draw(hidden)}, "last": {"kernel": draw(hidden, 3)}}


X = jnp.asarray(RNG.normal(size=(200, 5)), jnp.float32)


def refit_mlp(source, target, x=X, **options):
    return mj.refit(EVERYTHING, mlp, mlp, source, target, x, **{**EXACT, **options})


def test_channels_that_stand_twice_are_no_loss():
    half, target = perceptron(0, 4), perceptron(1, 4)
    source = jax.tree.map(lambda leaf: leaf, half)
    source["first"] = {name: jnp.concatenate([leaf, 2 * leaf], -1) for name, leaf in half["first"].items()}
    source["last"]["kernel"] = jnp.concatenate([half["last"]["kernel"], 0.5 * half["last"]["kernel"]])
    made = refit_mlp(source, target)
    np.testing.assert_allclose(mlp(made.variables, X), mlp(source, X), rtol=1e-3, atol=1e-3)


def test_a_wider_target_keeps_its_other_channels_and_loses_nothing():
    source, target = perceptron(0, 4), perceptron(1, 6)
    made = refit_mlp(source, target).variables
    np.testing.assert_allclose(mlp(made, X), mlp(source, X), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(made["first"]["kernel"][:, 4:], target["first"]["kernel"][:, 4:], atol=1e-6)


def test_batches_change_nothing_but_rounding():
    source, target = perceptron(0, 8), perceptron(1, 4)
    whole, parts = (refit_mlp(source, target, **options).variables for options in ({}, {"batch_size": 27}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), whole, parts)


def test_devices_share_the_inputs():
    source, target = perceptron(0, 8), perceptron(1, 4)
    # The choice of channels is from each device's own inputs otherwise: here all have the same.
    parts = jnp.stack([X[:100], 2 * X[:100]])
    run = functools.partial(refit_mlp, source, target, axis_name="devices")
    made = jax.vmap(lambda x: run(x).variables, axis_name="devices")(parts)
    whole = refit_mlp(source, target, parts.reshape(-1, 5)).variables
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-4), made, whole)


def test_rows_are_drawn_where_there_are_many():
    source, target = perceptron(0, 8), perceptron(1, 4)
    some, other = (refit_mlp(source, target, max_rows=50, key=jax.random.key(k)).variables for k in (1, 2))
    assert not np.allclose(some["last"]["kernel"], other["last"]["kernel"], rtol=1e-3)


@pytest.mark.slow
def test_it_can_be_differentiated():
    source, target = perceptron(0, 8), perceptron(1, 4)

    def loss(source):
        return jnp.sum(jnp.square(mlp(refit_mlp(source, target).variables, X)))

    slope = jax.grad(loss)(source)
    step = jax.tree.map(lambda leaf: leaf * 0, source)
    step["last"]["kernel"] = jnp.ones_like(source["last"]["kernel"])
    moved = [loss(jax.tree.map(lambda a, b: a + e * b, source, step)) for e in (-1e-2, 1e-2)]  # noqa: B023
    np.testing.assert_allclose(jnp.sum(slope["last"]["kernel"]), (moved[1] - moved[0]) / 2e-2, rtol=2e-2)


def test_few_rows_are_warned_of():
    with pytest.warns(FewRowsWarning) as warned:
        made = refit_mlp(perceptron(0, 8), perceptron(1, 4), X[:3])
    assert [str(one.message).split(":")[0] for one in warned] == [
        "first/kernel has 5 unknowns and 3 rows to solve them from",
        "last/kernel has 4 unknowns and 3 rows to solve them from",
    ]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(made.variables))


def test_bad_inputs_are_refused():
    source, target = perceptron(0, 8), perceptron(1, 4)
    with pytest.raises(ValueError, match="the refit needs inputs"):
        refit_mlp(source, target, X[:0])
    with pytest.raises(ValueError, match="ridge must be a finite number above 0, got 0"):
        refit_mlp(source, target, ridge=0)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        refit_mlp(source, target, batch_size=0)


def test_an_operation_that_cannot_be_followed_is_named():
    source, target = perceptron(0, 8), perceptron(1, 4)
    cut = lambda params, x: jnp.cumsum(mlp(params, x) @ params["last"]["kernel"].T, -1) @ params["last"]["kernel"]  # noqa: E731
    with pytest.raises(ValueError, match="the target: the operation 'cumsum' cannot be followed"):
        mj.refit(EVERYTHING, mlp, cut, source, target, X)


@pytest.mark.parametrize(
    ("use", "why"),
    [
        pytest.param(
            lambda h, gain: (h * gain + 1) * gain, "it is multiplied with its own output", marks=pytest.mark.slow
        ),
        (lambda h, gain: (h * gain) * (jnp.sin(h) * gain), "it is multiplied with its own output"),
        pytest.param(
            lambda h, gain: h * (gain * jnp.tanh(gain)),
            "it is transformed nonlinearly before it is applied to the data",
            marks=pytest.mark.slow,
        ),
        (
            lambda h, gain: h * gain + h**2 * jnp.tanh(gain),
            "it is transformed nonlinearly before it is applied to the data",
        ),
    ],
)
def test_what_a_model_is_not_linear_in_is_kept(use, why):
    def model(params, x):
        hidden = use(jax.nn.relu(x @ params["first"]["kernel"]), params["gain"][None])
        return jnp.tanh(hidden) @ params["last"]["kernel"]

    source = {**perceptron(0, 4), "gain": jnp.asarray([1.0, 2.0, -1.0, 0.5])}
    source["first"] = {"kernel": source["first"]["kernel"]}
    made = mj.refit(EVERYTHING, model, model, source, jax.tree.map(lambda leaf: 0.5 * leaf, source), X, **EXACT)
    assert why in made.kept["gain"]
    np.testing.assert_allclose(model(made.variables, X), model(source, X), rtol=1e-3, atol=1e-2)


def making(make):
    """A perceptron that makes its hidden channels of a product and a bias."""

    def model(params, x):
        return jnp.tanh(make(x @ params["first"]["kernel"], params["first"]["bias"])) @ params["last"]["kernel"]

    return model


@pytest.mark.parametrize("scale", [-0.25, pytest.param(3.0, marks=pytest.mark.slow)])
def test_the_intercept_goes_through_what_scales_the_bias(scale):
    model = making(lambda product, bias: scale * (product + bias[None]))
    source, target = perceptron(0, 8), perceptron(1, 4)
    made = mj.refit(EVERYTHING, model, model, source, target, X, **EXACT).variables
    plain = making(lambda product, bias: scale * product + bias[None])
    scaled = [{**one, "first": {**one["first"], "bias": scale * one["first"]["bias"]}} for one in (source, target)]
    other = mj.refit(EVERYTHING, plain, plain, *scaled, X, **EXACT).variables
    np.testing.assert_allclose(model(made, X), plain(other, X), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_bias_of_each_place_is_no_intercept():
    def model(params, x):
        hidden = x @ params["first"]["kernel"] + params["first"]["bias"][None, None] + params["place"][None]
        return jnp.tanh(hidden) @ params["last"]["kernel"]

    source, target = ({**perceptron(s, h), "place": jnp.ones((8, h)) * s} for s, h in ((0, 8), (1, 4)))
    made = mj.refit(EVERYTHING, model, model, source, target, X.reshape(25, 8, 5), **EXACT)
    assert set(made.solved) == {"first/kernel", "last/kernel"}
    np.testing.assert_allclose(made.variables["place"], 0, atol=1e-6)


@pytest.mark.parametrize("use_bias", [pytest.param(True, marks=pytest.mark.slow), False])
def test_statistics_of_a_norm_without_bias_stay(use_bias):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            for name in ("a", "b"):
                x = nn.Dense(6, use_bias=use_bias, name=f"dense_{name}")(x)
                x = nn.relu(nn.BatchNorm(not train, use_bias=False, name=f"norm_{name}")(x))
            return nn.Dense(3, name="head")(x)

    model = Normed()
    source = mj.reset_statistics(model.apply, jitted_init(model, 0, X), 2 * X + 1)
    start = jax.tree.map(lambda leaf: 0.5 * leaf, source)
    made = mj.refit(EVERYTHING, model.apply, model.apply, source, start, X, **EXACT).variables
    np.testing.assert_allclose(model.apply(made, X), model.apply(source, X), atol=1e-3)


def test_heads_within_what_they_share_are_solved():
    class Shared(nn.Module):  # All heads have one bias, so that its entries are around them, and not they around it.
        width: int

        @nn.compact
        def __call__(self, x):
            y = nn.DenseGeneral((4, self.width // 4), use_bias=False, name="query")(x)
            y += self.param("bias", nn.initializers.normal(), (self.width // 4,))[None, None]
            return nn.DenseGeneral(3, axis=(-2, -1), name="out")(nn.tanh(y))

    x, models = jnp.asarray(RNG.normal(size=(60, 5)), jnp.float32), [Shared(16), Shared(8)]
    variables = [jitted_init(model, seed, x) for seed, model in enumerate(models)]
    made = mj.refit(EVERYTHING, *(model.apply for model in models), *variables, x)
    assert {"params/query/kernel", "params/out/kernel"} <= made.solved.keys()
    assert float(made.solved["params/out/kernel"]) > 0.5


def test_what_is_scaled_by_place_is_kept():
    def model(params, x):
        places = jnp.arange(1.0, 9.0)[None, :, None]
        hidden = x @ params["first"]["kernel"] * places + params["first"]["bias"][None, None]
        return jnp.tanh(hidden) @ params["last"]["kernel"]

    source = perceptron(0, 4)
    start = jax.tree.map(lambda leaf: 0.5 * leaf, source)
    made = mj.refit(EVERYTHING, model, model, source, start, X.reshape(25, 8, 5), **EXACT)
    assert made.kept["first/kernel"] == "its output is scaled differently at different positions"
    np.testing.assert_allclose(made.variables["first"]["kernel"], source["first"]["kernel"], rtol=1e-5)


@pytest.mark.slow
def test_inputs_that_fill_the_last_batch_count_for_nothing_where_time_comes_first():
    def model(params, x):
        hidden = jax.nn.relu(x.swapaxes(0, 1) @ params["first"]["kernel"] + params["first"]["bias"][None, None])
        return hidden @ params["last"]["kernel"]

    x, pair = X.reshape(25, 8, 5), (perceptron(0, 8), perceptron(1, 4))
    whole, parts = (
        mj.refit(EVERYTHING, model, model, *pair, x, batch_size=size, **EXACT).variables for size in (25, 17)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), whole, parts)


def test_one_output_is_solved_with_its_bias():
    def model(params, x):
        hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
        return hidden @ params["last"]["kernel"] + params["last"]["bias"][None]

    def draw(seed, hidden):
        params = perceptron(seed, hidden)
        return {**params, "last": {"kernel": params["last"]["kernel"][:, :1], "bias": jnp.full(1, 0.3)}}

    source = draw(0, 8)
    made = mj.refit(EVERYTHING, model, model, source, draw(1, 4), X, **EXACT)
    assert not made.kept
    left = model(source, X) - model(made.variables, X)
    np.testing.assert_allclose(jnp.mean(left), 0, atol=1e-4)
    np.testing.assert_allclose(1 - jnp.var(left) / jnp.var(model(source, X)), made.solved["last/kernel"], atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_input_explains_no_variance():
    assert all(bool(jnp.isnan(one)) for one in refit_mlp(perceptron(0, 8), perceptron(1, 4), X[:1]).solved.values())


def test_biases_that_are_kept_say_so():
    def model(params, x):
        product = x @ params["first"]["kernel"] + params["early"][None] + params["late"][None]
        return jnp.tanh(jax.nn.relu(product) + params["first"]["bias"][None]) @ params["last"]["kernel"]

    source, target = ({**perceptron(s, h), "early": jnp.ones(h), "late": jnp.ones(h)} for s, h in ((0, 8), (1, 4)))
    made = mj.refit(EVERYTHING, model, model, source, target, X, **EXACT)
    assert made.kept == {
        "first/bias": "it is added, but not on the path from a solved layer to its output",
        "early": "the intercept of its layer goes to late",
    }


def test_numbers_that_are_not_finite_are_named():
    source, target = perceptron(0, 8), perceptron(1, 4)
    with pytest.raises(ValueError, match=r"not finite: there are non-finite values in input 0$"):
        refit_mlp(source, target, X.at[3].set(jnp.nan))
    broken = mj.replace(source, {"first/bias": jnp.full(8, jnp.inf)})
    with pytest.raises(ValueError, match=r"not finite: there are non-finite values in the source's first/bias$"):
        refit_mlp(broken, target)
    # Where nothing can be asked, nothing is.
    assert jax.eval_shape(refit_mlp, broken, target).variables["first"]["bias"].shape == (4,)
