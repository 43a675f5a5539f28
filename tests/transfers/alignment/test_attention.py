"""Alignment of an attention: heads are chosen by what they add, each with channels of its own, in whatever order."""

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj


def attend(params, x):
    """Returns what an attention of any number of heads makes of `[B, L, 3]`, without biases and norms."""
    query, key, value = (jnp.einsum("bli,ihd->blhd", x, params[name]["kernel"]) for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
    return jnp.einsum("blhd,hdo->blo", jnp.einsum("bhqk,bkhd->bqhd", weights, value), params["out"]["kernel"])


def attention(seed, heads, of_query, of_value):
    rng = np.random.default_rng(seed)
    shapes = {"query": (3, heads, of_query), "key": (3, heads, of_query), "value": (3, heads, of_value)}
    shapes["out"] = (heads, of_value, 4)
    return {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}


ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(32, 5, 3)), jnp.float32)


def written(source, target, fitted=True):
    """Returns the transfer of an attention, its adapter and what it writes."""
    transfer = mj.aligned_transfer(
        {"**": "**"}, mj.channel_graph(attend, source, ROWS), mj.channel_graph(attend, target, ROWS)
    )
    moments = mj.input_moments(attend, source, ROWS) if fitted else {}
    adapter = jax.jit(transfer.fit)(moments, source, target)
    return transfer, adapter, jax.jit(transfer.apply)(adapter, source, target)


def test_heads_are_chosen_by_what_they_add_and_each_has_channels_of_its_own():
    source, target = attention(0, 4, 5, 3), attention(1, 2, 2, 2)
    source["out"]["kernel"] *= jnp.asarray([0.01, 5.0, 0.01, 1.0])[:, None, None]
    # Head 1 compares by its channels 0 and 4, and says something in its 1 and 2; head 3 by 2 and 3, and in 0 and 1.
    for name in ("query", "key"):
        source[name]["kernel"] *= jnp.ones((4, 5)).at[1, 1:4].set(0.01).at[3, jnp.array([0, 1, 4])].set(0.01)[None]
    source["value"]["kernel"] *= jnp.ones((4, 3)).at[1, 0].set(0.0).at[3, 2].set(0.0)[None]
    _, adapter, new = written(source, target)
    np.testing.assert_array_equal(jnp.argmax(adapter["outputs"]["key/kernel:1"], 1), [1, 3])
    assert [set(row) for row in np.argmax(adapter["outputs"]["key/kernel:2"], 2).tolist()] == [{0, 4}, {2, 3}]
    assert [set(row) for row in np.argmax(adapter["outputs"]["out/kernel:1"], 2).tolist()] == [{1, 2}, {0, 1}]
    expected = attend(source, ROWS)
    error = jnp.sqrt(jnp.mean(jnp.square(attend(new, ROWS) - expected)) / jnp.mean(jnp.square(expected)))
    assert error < 0.02
    even = attend(written(source, target, fitted=False)[2], ROWS)
    assert jnp.sqrt(jnp.mean(jnp.square(even - expected)) / jnp.mean(jnp.square(expected))) > 0.5


def test_an_attention_of_equal_heads_copies_and_one_of_more_computes_the_same():
    source = attention(0, 2, 4, 3)
    for fitted in (False, True):
        _, _, new = written(source, attention(1, 3, 4, 5) if fitted else attention(1, 2, 4, 3), fitted)
        if not fitted:
            jax.tree.map(np.testing.assert_array_equal, new, source)
        np.testing.assert_allclose(attend(new, ROWS), attend(source, ROWS), rtol=1e-5, atol=1e-5)


def test_the_order_of_heads_and_of_channels_in_each_does_not_matter():
    source, target = attention(0, 4, 5, 3), attention(1, 2, 2, 2)
    heads, rng = jnp.array([2, 0, 3, 1]), np.random.default_rng(2)
    moved = {name: {"kernel": leaf["kernel"][:, heads]} for name, leaf in source.items() if name != "out"}
    moved["out"] = {"kernel": source["out"]["kernel"][heads]}
    compared, said = (jnp.asarray([rng.permutation(size) for _ in heads]) for size in (5, 3))
    for name, order in (("query", compared), ("key", compared), ("value", said)):
        moved[name]["kernel"] = jnp.take_along_axis(moved[name]["kernel"], order[None], 2)
    moved["out"]["kernel"] = jnp.take_along_axis(moved["out"]["kernel"], said[..., None], 1)
    np.testing.assert_allclose(attend(moved, ROWS), attend(source, ROWS), rtol=1e-4, atol=1e-4)
    results = [attend(written(one, target)[2], ROWS) for one in (source, moved)]
    np.testing.assert_allclose(*results, atol=1e-4 * float(jnp.abs(results[0]).max()))


def attend_in_groups(params, x):
    """Returns what an attention makes whose queries `[3, groups, heads, d]` share the keys of their group."""
    query, key, value = (jnp.einsum("bli,i...d->bl...d", x, params[name]) for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bqgrd,bkgd->bgrqk", query, key))
    return jnp.einsum("blgrd,grdo->blo", jnp.einsum("bgrqk,bkgd->bqgrd", weights, value), params["out"])


def attend_repeated(params, x):
    """Returns the same, with keys and values that are repeated for all queries of a group."""
    query, key, value = (jnp.einsum("bli,i...d->bl...d", x, params[name]) for name in ("query", "key", "value"))
    query, key, value = query.reshape(*x.shape[:2], 4, -1), key.repeat(2, 2), value.repeat(2, 2)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
    values = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return jnp.einsum("blhd,hdo->blo", values, params["out"].reshape(4, -1, 4))


def groups(seed, of_query, of_value):
    rng = np.random.default_rng(seed)
    shapes = {"query": (3, 2, 2, of_query), "key": (3, 2, of_query), "value": (3, 2, of_value)}
    shapes["out"] = (2, 2, of_value, 4)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def written_by(fn, source, target):
    graphs = [mj.channel_graph(fn, params, ROWS) for params in (source, target)]
    transfer = mj.aligned_transfer({"**": "**"}, *graphs)
    adapter = jax.jit(transfer.fit)(mj.input_moments(fn, source, ROWS), source, target)
    return jax.jit(transfer.apply)(adapter, source, target)


def test_heads_in_groups_are_no_window_of_a_convolution():
    source = groups(0, 4, 3)
    new = written_by(attend_in_groups, source, groups(1, 4, 5))
    np.testing.assert_allclose(attend_in_groups(new, ROWS), attend_in_groups(source, ROWS), rtol=1e-5, atol=1e-5)


def test_repeated_heads_are_aligned_as_those_in_groups():
    source, target = groups(0, 4, 4), groups(1, 3, 3)
    in_groups, repeated = (written_by(fn, source, target) for fn in (attend_in_groups, attend_repeated))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), in_groups, repeated)
