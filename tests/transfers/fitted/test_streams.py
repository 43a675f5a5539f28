"""Streams that only linear layers make and read: which they are, and that the refit takes directions of them."""

import functools
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.models.mobilenet import InvertedResidualStage
from merge_jax.transfers.alignment.fit import _directions
from merge_jax.transfers.fitted import compiled, walk
from tests.helpers import jitted_init
from tests.transfers.fitted.test_refit import TOKENS, text

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(100, 2, 6)) @ RNG.normal(size=(6, 6)), jnp.float32)
ROUTES = ("down/kernel", "up/kernel", "last/kernel")
SAME = dict(zip(ROUTES, ROUTES, strict=True))


def params_of(stream, hidden, seed):
    rng = np.random.default_rng(seed)
    shapes = {"down": (6, stream), "around": (6, stream), "up": (stream, hidden), "last": (hidden, 3)}
    found = {name: {"kernel": rng.normal(size=shape).astype(np.float32) / 2} for name, shape in shapes.items()}
    found["table"] = {"embedding": rng.normal(size=(2, stream)).astype(np.float32)}
    for name in ("scale", "bias"):
        found["norm"] = found.get("norm", {}) | {name: rng.normal(size=stream).astype(np.float32) + 1}
    return found


def with_stream(use, fn=lambda params, stream: stream):
    """A network whose stream is made by `use`, gone through by `fn`, and read by an activation's layer."""

    def apply(params, x):
        kernels = {name: one["kernel"] for name, one in params.items() if "kernel" in one}
        stream = fn(params, use(kernels, params["norm"], x))
        return jax.nn.relu(stream @ kernels["up"]) @ kernels["last"]

    return apply


def down(kernels, norm, x):
    return x @ kernels["down"]


def normed(kernels, norm, x):
    return x @ kernels["down"] * norm["scale"][None, None] + norm["bias"][None, None]


def summed(kernels, norm, x):
    return x @ kernels["down"] + x @ kernels["around"]


def layer_norm(params, x):
    centred = x - x.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-6)
    return y * params["norm"]["scale"][None, None] + params["norm"]["bias"][None, None]


def root_mean_square(params, x):
    return x * (jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * params["norm"]["scale"][None, None])


def with_table(params, x):
    return x + (x + params["table"]["embedding"][None])


def channels(x):
    return jnp.arange(x.shape[-1])[None, None]


# By name: the function, whether it has a stream, and what has a route beside; None where its channels have an order.
STREAMS = {
    "one layer": (with_stream(down), True),
    "a norm on the way": (with_stream(normed), True, "norm/scale", "norm/bias"),
    "a residual sum": (with_stream(summed), True, "around/kernel"),
    "a residual sum of which one has no route": (with_stream(summed), False),
    "a number for all": (with_stream(down, lambda params, x: x / 2), True),
    "rows in another form": (with_stream(down, lambda params, x: x.reshape(-1, x.shape[-1])), True),
    "a mean over places": (with_stream(down, lambda params, x: x.mean(1)), True),
    "a table after its end": (with_stream(down, with_table), True, "table/embedding"),
    "a table that has no route": (with_stream(down, with_table), False),
    "numbers of channels times what is the same for all": (
        with_stream(down, lambda params, x: x + jnp.broadcast_to(x.mean(-1, keepdims=True), x.shape) * channels(x)),
        None,
    ),
    "a LayerNorm": (with_stream(down, layer_norm), True, "norm/scale", "norm/bias"),
    "a LayerNorm whose gain has no route": (with_stream(down, layer_norm), False, "norm/bias"),
    "a root mean square": (with_stream(down, root_mean_square), True, "norm/scale"),
    "sizes of channels": (with_stream(down, lambda params, x: x / jnp.abs(x).sum(-1, keepdims=True)), False),
    "a softmax": (with_stream(down, lambda params, x: jax.nn.softmax(x)), False),
    "an activation": (with_stream(down, lambda params, x: jax.nn.relu(x)), False),
    "its mean taken off": (with_stream(down, lambda params, x: x - x.mean(-1, keepdims=True)), True),
    "a scale that is no layer's": (with_stream(down, lambda params, x: jnp.tanh(x @ jnp.eye(x.shape[-1])) + x), None),
    "a product of two": (with_stream(down, lambda params, x: x * x), False),
    "numbers of channels before its end": (with_stream(down, lambda params, x: x * channels(x) + channels(x)), None),
    "numbers of channels after its end": (with_stream(down, lambda params, x: x + x * channels(x)), None),
    "channels in a product": (
        with_stream(down, lambda params, x: x + jnp.einsum("npc,c->npc", x, channels(x)[0, 0].astype(x.dtype))),
        None,
    ),
    "numbers that are added after its end": (with_stream(down, lambda params, x: x + (x + channels(x))), None),
}
SOME = ("a LayerNorm", "an activation", "channels in a product", "numbers of channels after its end")


@pytest.fixture
def plans(monkeypatch):
    """Collects the plans of refits, of which nothing is solved."""
    made, plan_refit = [], compiled.plan_refit

    def plan(*of):
        made.append(plan_refit(*of))
        return made[-1]

    monkeypatch.setattr(compiled, "plan_refit", plan)
    monkeypatch.setattr(compiled, "_programs", OrderedDict())
    monkeypatch.setattr(walk.Walk, "run", lambda *_: {})
    return made


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in STREAMS]
)
def test_a_stream_is_linear_where_no_operation_tells_its_channels_apart(name, plans):
    fn, expected, *more = STREAMS[name]
    routes = {path: path for path in (*ROUTES, *more)}
    given = routes, fn, fn, params_of(5, 8, 0), params_of(3, 6, 1), X
    if expected is None:
        with pytest.raises(ValueError, match=r"'down/kernel' has 5 along axis 1; .* meet constants of an order"):
            mj.refit(*given)
        return
    mj.refit(*given)
    assert bool(plans[0].streams.pairs) == expected


def test_a_transformer_s_stream_is_one_and_its_embeddings_are_turned(plans):
    source, target = text(16), text(8)
    given = [jitted_init(model, seed, TOKENS) for seed, model in enumerate((source, target))]
    made = mj.refit({"**": "**"}, source.apply, target.apply, given[0], given[1], TOKENS)
    embeddings = "params/encoder/embeddings"
    assert plans[0].streams.pairs == {f"{embeddings}/norm/bias:0"}
    assert plans[0].streams.tables == {f"{embeddings}/{name}/embedding" for name in ("word", "position")}
    whole, own = (mj.flatten(one)[f"{embeddings}/word/embedding"] for one in (given[0], made.variables))
    turned, *_ = np.linalg.lstsq(np.asarray(whole), np.asarray(own), rcond=None)
    np.testing.assert_allclose(whole @ turned, own, atol=1e-4)
    np.testing.assert_allclose(turned.T @ turned, np.eye(8), atol=1e-3)
    assert not np.isclose(np.abs(turned), 1, atol=1e-2).any()  # No channel of the source.


def stream_of(params, x):
    return np.asarray(x @ params["down"]["kernel"]).reshape(-1, params["down"]["kernel"].shape[1])


@functools.cache
def refitted(choice):
    fn = STREAMS["one layer"][0]
    given = params_of(5, 8, 0), params_of(3, 8, 1)
    return given[0], mj.refit(SAME, fn, fn, given[0], given[1], X, choice=choice, ridge=1e-6).variables


def test_the_target_has_the_directions_of_the_largest_moments():
    source, target = refitted("moments")
    whole, own = stream_of(source, X), stream_of(target, X)
    wanted = whole @ np.linalg.eigh(whole.T @ whole)[1][:, -3:]
    # The same space: what the one has is had from the other.
    found, *_ = np.linalg.lstsq(own, wanted, rcond=None)
    np.testing.assert_allclose(own @ found, wanted, atol=1e-2 * np.abs(wanted).max())
    # And turned by no more than it must be: of orthonormal directions, whose lengths are the source's.
    np.testing.assert_allclose(np.linalg.norm(own), np.linalg.norm(wanted), rtol=1e-2)


def test_directions_are_orthonormal_if_channels_are_dead():
    features = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32) * (np.arange(8) > 2)
    chosen = jnp.eye(8)[jnp.array([0, 1, 4, 5])]  # Two of them are dead.
    sizes = jnp.linalg.svd(_directions(features.T @ features / 500, chosen), compute_uv=False)
    np.testing.assert_allclose(sizes, 1, atol=1e-5)


def test_directions_come_nearer_than_channels():
    fn = STREAMS["one layer"][0]

    def error(choice):
        source, target = refitted(choice)
        return float(jnp.mean(jnp.square(fn(source, X) - fn(target, X))))

    assert error("moments") < 0.7 * error("magnitude")


@pytest.mark.slow
def test_what_is_chosen_is_no_function_that_is_differentiated():
    fn, source, target = STREAMS["one layer"][0], params_of(5, 8, 0), params_of(3, 6, 1)
    source["down"]["kernel"][:, 3:] = 0  # Moments of which three eigenvalues are one: 0.

    def loss(source):
        return jnp.sum(jnp.square(fn(mj.refit(SAME, fn, fn, source, target, X).variables, X)))

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss)(source)))


def mobile(blocks, width, **options):
    stages = (InvertedResidualStage(1, width, 1, 1), InvertedResidualStage(2, width, blocks, 2))
    return mj.models.MobileNetV2(stages, 4, stem_width=width, head_width=4 * width, **options)


@pytest.mark.slow
def test_a_block_more_reaches_the_end_of_a_stage_again():
    """The rows that the next kernel takes are its own: the end of a stage is one value with that of any block."""
    images = jnp.asarray(RNG.normal(size=(40, 8, 8, 1)), jnp.float32)
    source, target = mobile(1, 8, use_bias=False), mobile(2, 4, use_bias=False)
    given = [
        {name: one for name, one in jitted_init(model, 0, images).items() if name != "intermediates"}
        for model in (source, target)
    ]
    blocks = {"stage1_0": "stage1_0", "stage2_0": "stage2_0", "stage2_1": "stage2_0"}
    routes = {f"{block}/**": f"{other}/**" for block, other in {"stem*": "stem*", "head*": "head*", **blocks}.items()}
    made = mj.refit(routes, source.apply, target.apply, given[0], given[1], images)
    assert {f"params/stage2_{i}/project/kernel" for i in (0, 1)} <= made.solved.keys()
