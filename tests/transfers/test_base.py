import copy
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj

SOURCE = {
    "conv": {"kernel": jnp.ones((3, 3, 4, 6)), "bias": jnp.ones(6)},
    "fc": {"kernel": jnp.ones((6, 5))},
    "steps": jnp.ones((2, 2), jnp.int32),
}
TARGET = {
    "layers": [{"kernel": jnp.ones((4, 7))}, {"kernel": jnp.ones((3, 3, 1, 7))}],
    "fc": {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)},
    "count": jnp.ones((2, 2), jnp.int32),
    "scalar": jnp.ones(()),
    "text": "hello",
}
ARRAYS = {name: leaf for name, leaf in TARGET.items() if name != "text"}
ROUTES = {"layers/0/kernel": "conv/kernel", "fc/kernel": "fc/kernel"}


def randomised(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    random = np.random.default_rng(seed)
    new = [
        jnp.asarray(random.normal(size=leaf.shape), leaf.dtype) if getattr(leaf, "dtype", None) == jnp.float32 else leaf
        for leaf in leaves
    ]
    return jax.tree.unflatten(structure, new)


@pytest.fixture(scope="module")
def trees():
    return randomised(SOURCE, 0), randomised(ARRAYS, 1)


def small_lpka(**options):
    return mj.lpka_transfer(ROUTES, **{"num_layers": 1, "num_heads": 2, "attentions": ("rows_rows",), **options})


TRANSFERS = {
    "published": small_lpka(output="published"),
    "residual": small_lpka(output="residual"),
    "warm": small_lpka(output="warm"),
    "share": mj.share_transfer(ROUTES),
}


@functools.cache
def closed_adapter(name):
    return jax.jit(TRANSFERS[name].init)(jax.random.key(7), randomised(SOURCE, 0), randomised(ARRAYS, 1))


def opened_adapter(name):
    """Returns the adapter with its gates open, so that all of it matters."""
    adapter = closed_adapter(name)
    leaves = {p: leaf + 0.5 if p.endswith("gate") else leaf for p, leaf in mj.flatten(adapter).items()}
    return mj.replace(adapter, leaves)


def test_gradients_reach_the_source(trees):
    source, target = trees
    transfer, adapter = TRANSFERS["published"], closed_adapter("published")

    @jax.jit
    @jax.grad
    def gradient(kernel):
        merged = transfer.apply(adapter, mj.replace(source, {"fc/kernel": kernel}), target)
        return jnp.sum(merged["fc"]["kernel"] ** 3)

    assert np.abs(gradient(source["fc"]["kernel"])).max() > 0


def test_residual_starts_as_the_identity_and_warm_as_sharing(trees, next_key):
    source, target = trees
    share = TRANSFERS["share"].apply({}, source, target)
    for name, expected in (("residual", target), ("warm", share)):
        merged = jax.jit(TRANSFERS[name].apply)(closed_adapter(name), source, target, key=next_key())
        chex.assert_trees_all_equal(merged, expected)


def test_published_rows_have_variance_one(trees):
    source, target = trees
    merged = jax.jit(TRANSFERS["published"].apply)(closed_adapter("published"), source, target)
    rows = merged["layers"][0]["kernel"].T
    np.testing.assert_allclose(rows.var(axis=1), 1, rtol=1e-4)


def test_residual_keeps_the_scale_of_the_target(trees):
    source, target = trees
    apply, adapter = jax.jit(TRANSFERS["residual"].apply), opened_adapter("residual")
    once = apply(adapter, source, target)["fc"]["kernel"]
    tiny = mj.replace(target, {"fc/kernel": target["fc"]["kernel"] * 1e-3})
    np.testing.assert_allclose(apply(adapter, source, tiny)["fc"]["kernel"], once * 1e-3, rtol=1e-3, atol=1e-7)


def test_dropout_follows_the_key(trees, next_key):
    source, target = trees
    adapter, key = closed_adapter("published"), next_key()
    apply = jax.jit(lambda key: TRANSFERS["published"].apply(adapter, source, target, key=key))
    dropped = apply(key)
    chex.assert_trees_all_equal(dropped, apply(key))
    for merged in (apply(next_key()), apply(None)):
        assert np.abs(merged["fc"]["kernel"] - dropped["fc"]["kernel"]).max() > 1e-3


def test_routes_may_be_pairs_or_routes_with_their_own_matrices(trees, next_key):
    source, target = trees
    route = mj.Route("fc/kernel", "fc/kernel", target_spec=mj.MatrixSpec(rows=(0,), inputs=(1,)))
    transposed = mj.lpka_transfer([route], num_layers=1, num_heads=2)
    straight = mj.lpka_transfer([("fc/kernel", "fc/kernel")], num_layers=1, num_heads=2)
    for transfer, width in ((transposed, 5), (straight, 7)):
        adapter = mj.flatten(jax.eval_shape(transfer.init, next_key(), source, target))
        up = adapter["fc/kernel/proposal/feed_forward/up/kernel"]
        assert up.shape == (1, width, 2 * width)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ({}, "no routes"),
        ([], "no routes"),
        (
            [("fc/kernel", "a"), ("fc/kernel", "b")],
            r"'fc/kernel' is routed twice, from 'a' and from 'b'",
        ),
        (["ab"], r"a route is a pair .* got 'ab'"),
        ([("a", "b", "c")], "a route is a pair"),
        ([("a", 1)], "a route is a pair"),
    ],
)
def test_bad_routes_are_refused_at_once(routes, message):
    with pytest.raises(ValueError, match=message):
        mj.share_transfer(routes)


@pytest.mark.parametrize(
    ("target_path", "source_path", "message"),
    [
        ("fc/kernal", "fc/kernel", r"unknown target path 'fc/kernal'; did you mean 'fc/kernel'"),
        (
            "fc/kernel",
            "conv/kernl",
            r"unknown source path 'conv/kernl'; did you mean 'conv/kernel'",
        ),
        ("count", "fc/kernel", r"target leaf 'count' must be a float array, got an array of int32"),
        ("fc/kernel", "steps", r"source leaf 'steps' must be a float array, got an array of int32"),
        ("scalar", "fc/kernel", r"target leaf 'scalar' cannot take part.*not a matrix"),
        ("text", "fc/kernel", r"target leaf 'text' must be a float array, got str"),
    ],
)
def test_routes_that_do_not_fit_the_models_are_refused_by_init(target_path, source_path, message, next_key):
    with pytest.raises(ValueError, match=message):
        mj.share_transfer({target_path: source_path}).init(next_key(), SOURCE, TARGET)


def test_a_matrix_spec_that_does_not_fit_is_refused(trees, next_key):
    route = mj.Route("fc/kernel", "fc/kernel", source_spec=mj.MatrixSpec((0,), (1, 2)))
    with pytest.raises(ValueError, match="source leaf 'fc/kernel' cannot take part"):
        mj.share_transfer([route]).init(next_key(), *trees)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be a whole number of at least 1, got 2.0"),
        ({"view": "windows"}, "unknown view 'windows'"),
        ({"gate": "open"}, "gate must be a finite number or a schedule of the step, got 'open'"),
        ({"gate": 0.5, "output": "published"}, "the output form 'published' has no gate"),
        ({"shared": "yes"}, "shared must be True or False, got 'yes'"),
        ({"max_width": 0}, "max_width must be a whole number of at least 1, got 0"),
        ({"max_hidden": 0.5}, "max_hidden must be a whole number of at least 1, got 0.5"),
        ({"max_scores": None}, "max_scores must be a whole number of at least 1, got None"),
        ({"attentions": ()}, r"attentions must be a tuple of one or more of rows_rows, .*, got \(\)"),
        ({"attentions": ("rows_row",)}, "unknown attention 'rows_row'; did you mean 'rows_rows'"),
        ({"attentions": ("rows_rows", "rows_rows")}, "an attention appears twice"),
        ({"dtype": jnp.int32}, "dtype must be a float type, such as jnp.bfloat16, got <class"),
        ({"dtype": "bf16"}, "dtype must be a float type, such as jnp.bfloat16, got 'bf16'"),
        ({"gate": True}, "gate must be a finite number or a schedule of the step, got True"),
        ({"spectral": None}, "spectral must be True or False, got None"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be a whole number of at least 1, got 0"),
        ({"num_heads": 2.5}, "num_heads must be a whole number of at least 1, got 2.5"),
        ({"output": "publishd"}, "unknown output form 'publishd'; did you mean 'published'"),
        ({"attention_dropout": 1.0}, r"attention_dropout must lie in \[0, 1\), got 1.0"),
        ({"feed_forward_dropout": -0.1}, r"feed_forward_dropout must lie in \[0, 1\), got -0.1"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        mj.lpka_transfer(ROUTES, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be a whole number of at least 1, got -1"),
        ({"max_hidden": 0}, "max_hidden must be a whole number of at least 1, got 0"),
        ({"feed_forward_dropout": 1}, r"feed_forward_dropout must lie in \[0, 1\), got 1"),
        ({"output": "wram"}, "unknown output form 'wram'; did you mean 'warm'"),
    ],
)
def test_bad_options_of_the_perceptron_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        mj.mlp_transfer(ROUTES, **options)


def test_an_adapter_of_other_routes_is_refused(trees):
    source, target = trees
    other = mj.lpka_transfer({"fc/bias": "conv/bias"}, num_layers=1)
    with pytest.raises(ValueError, match=r"has no entry for the route to 'fc/bias'; .* there is 'layers/0/kernel'"):
        other.apply(closed_adapter("warm"), source, target)


def test_an_adapter_made_with_other_options_is_refused(trees):
    source, target = trees
    message = "the adapter of the route to 'layers/0/kernel' does not fit; was it made with other options"
    for options in ({"max_width": 8}, {"num_layers": 2}):
        with pytest.raises(ValueError, match=message):
            small_lpka(**options).apply(closed_adapter("warm"), source, target)


def test_a_batch_is_its_routes_one_by_one():
    """With the slice of the stacked adapter that is each one's; the order of leaves and adapters is the routes'."""
    source, target = (
        {f"layer_{i}": {"kernel": jnp.asarray(np.random.default_rng(seed + i).normal(size=shape), jnp.float32)}
         for i in range(3)}
        for seed, shape in ((0, (6, 5)), (10, (7, 4)))
    )  # fmt: skip
    routes = {f"layer_{i}/kernel": f"layer_{(i + 1) % 3}/kernel" for i in (2, 0, 1)}
    options = {"num_layers": 1, "num_heads": 1, "attentions": ("rows_rows",), "output": "published"}
    together = mj.lpka_transfer(routes, **options)
    ((name, adapter),) = jax.jit(together.init)(jax.random.key(0), source, target).items()
    merged = jax.jit(together.apply)({name: adapter}, source, target)
    for i, (path, source_path) in enumerate(routes.items()):
        alone = mj.lpka_transfer({path: source_path}, **options)
        own = {path: jax.tree.map(lambda leaf, i=i: leaf[i], adapter)}
        expected = jax.jit(alone.apply)(own, source, target)
        np.testing.assert_allclose(mj.flatten(merged)[path], mj.flatten(expected)[path], atol=1e-5)


def test_more_heads_than_width_are_refused(trees, next_key):
    with pytest.raises(ValueError, match=r"the route to 'fc/kernel' .* num_heads must lie in \[1, 128\]"):
        mj.lpka_transfer({"fc/kernel": "fc/kernel"}, num_heads=129).init(next_key(), *trees)


def test_a_vector_can_be_routed(trees, next_key):
    source, target = trees
    options = {"num_layers": 1, "num_heads": 2, "attentions": ("rows_rows",), "output": "published"}
    transfer = mj.lpka_transfer({"fc/bias": "conv/bias"}, **options)
    merged = jax.jit(transfer.apply)(jax.jit(transfer.init)(next_key(), source, target), source, target)
    np.testing.assert_allclose(merged["fc"]["bias"].var(), 1, rtol=1e-4)


def equations(routes):
    """Returns how many operations a transfer of so many routes of one shape traces to, and its split leaves."""
    params = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)} for i in range(routes)}
    transfer = mj.lpka_transfer({"*/kernel": "*/kernel"}, num_layers=1)
    adapter = jax.eval_shape(transfer.init, jax.random.key(0), params, params)
    return len(jax.make_jaxpr(transfer.apply)(adapter, params, params).jaxpr.eqns)


def test_routes_of_one_shape_are_traced_once():
    """As many operations for 72 routes as for 2: nothing is done for each route."""
    assert equations(72) == equations(2) <= 1.2 * equations(1)


def temporary_bytes(columns, max_scores):
    params = {"w": {"weight": jax.ShapeDtypeStruct((512, columns), jnp.float32)}}
    transfer = mj.lpka_transfer(
        {"w/weight": "w/weight"}, num_layers=1, max_width=16, max_hidden=16, max_scores=max_scores, spectral=False
    )
    adapter = jax.eval_shape(transfer.init, jax.random.key(0), params, params)

    def gradient(adapter, source, target):
        return jax.grad(lambda adapter: jnp.sum(transfer.apply(adapter, source, target)["w"]["weight"]))(adapter)

    return jax.jit(gradient).lower(adapter, params, params).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_rows_times_columns():
    """Attention of 2048 columns on 2048 in 8 heads is 128 MiB a map; in chunks no map of any size is held or kept."""
    whole, chunked, wider = (temporary_bytes(*case) for case in ((2048, 2**30), (2048, 2**16), (4096, 2**16)))
    assert whole > 4 * 2048 * 2048 * 8
    assert chunked < whole / 5
    assert wider < 3 * chunked


def test_a_transfer_of_ones_own_needs_two_functions_that_take_the_step():
    init, tree = (lambda key, source, target: {"gain": jnp.ones(())}), {"w": jnp.ones((2, 3))}

    def apply(adapter, source_params, target_params, *, key=None, step=None):
        return {"w": target_params["w"] + adapter["gain"] * (0 if step is None else step)}

    own = mj.Transfer(init, apply)
    assert (own.describe(tree, tree), own.monitor({}, tree, tree, step=1), own.fit) == ((), {}, None)
    both = mj.chain(own, mj.scheduled(own, 0.5))
    merged = both.apply(both.init(jax.random.key(0), tree, tree), tree, tree, step=jnp.array(4))
    np.testing.assert_array_equal(merged["w"], 1 + 4 + 0.5 * 4)
    with pytest.raises(
        ValueError, match=r"apply must take the step of training, and the keywords in def apply\(.*key=None, step=None"
    ):
        mj.Transfer(init, lambda adapter, source_params, target_params, *, key=None: target_params)
    with pytest.raises(ValueError, match="monitor must take the step"):
        mj.Transfer(init, apply, monitor=lambda adapter, source_params, target_params: {})


def test_transfers_can_be_copied_and_sent_to_another_process():
    """As engines that ship functions to workers do; the copy transfers what the original does."""
    source, target = {"w": jnp.arange(6.0).reshape(2, 3)}, {"w": jnp.zeros((2, 3))}
    gated = mj.scheduled(mj.linear_operator_transfer({"w": "w"}), optax.constant_schedule(0.5))
    for transfer in (mj.identity_transfer(), mj.share_transfer({"w": "w"}), gated):
        for copied in (copy.copy(transfer), copy.deepcopy(transfer)):
            assert type(copied) is type(transfer)
            adapter = transfer.init(jax.random.key(0), source, target)
            chex.assert_trees_all_equal(
                copied.apply(adapter, source, target, step=3), transfer.apply(adapter, source, target, step=3)
            )
            assert copied.describe(source, target) == transfer.describe(source, target)
            assert copied.monitor(adapter, source, target, step=3) == transfer.monitor(adapter, source, target, step=3)
