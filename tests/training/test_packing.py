import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from merge_jax.training.packing import pack, packed, unpack

SHAPES = {"a": {"kernel": (3, 4), "bias": (4,)}, "b": {"kernel": (300, 300), "scale": ()}, "c": [(2, 2), (5,)]}


def tree(seed, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


@pytest.mark.parametrize("shapes", [SHAPES, {"kernel": (2, 3)}, {"bias": (2,)}, {}])
def test_a_packed_tree_unpacks_to_itself(shapes):
    leaves = tree(0, shapes)
    chex.assert_trees_all_equal(unpack(pack(leaves), leaves), leaves)
    # Nothing that a checkpoint refuses to hold.
    assert all(leaf.size for leaf in jax.tree.leaves(pack(leaves)))


def test_small_leaves_are_two_vectors_and_others_stay():
    half = {**tree(0), "half": {"kernel": jnp.ones(3, jnp.bfloat16)}, "count": jnp.arange(3)}
    together = pack(half)
    assert together["kernel"].shape == (12,)
    assert together["other"].shape == (4 + 1 + 4 + 5,)
    assert together["large"].keys() == {"b/kernel", "half/kernel", "count"}
    chex.assert_trees_all_equal_shapes_and_dtypes(unpack(together, half), half)


def test_a_long_vector_can_be_shared_by_devices():
    long = {"kernel": jnp.arange(5000.0), "bias": jnp.arange(3.0)}
    together = pack(long)
    assert (together["kernel"].shape, together["other"].shape) == ((5120,), (3,))
    assert not together["kernel"][5000:].any()
    chex.assert_trees_all_equal(unpack(together, long), long)


def test_the_adapters_optimizer_is_that_of_the_leaves_apart():
    """Clipping by the norm of all leaves, AdamW of each, and decay of kernels alone."""
    params = tree(0)

    def decays(params):
        leaves = [path.endswith("kernel") for path in mj.flatten(params)]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    apart = optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(0.1, weight_decay=0.5, mask=decays))
    optimizers = mj.adapter_adamw(0.1, weight_decay=0.5, max_norm=5.0), apart
    states = [optimizer.init(params) for optimizer in optimizers]
    updates_of = [jax.jit(optimizer.update) for optimizer in optimizers]
    for seed in (1, 2):
        results = [update(tree(seed), s, params) for update, s in zip(updates_of, states, strict=True)]
        (updates, _), (expected, _) = results
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)
        states = [state for _, state in results]
        params = optax.apply_updates(params, expected)


def test_an_optimizer_without_parameters_is_packed_too():
    sgd = packed(optax.sgd(0.5))
    updates, _ = sgd.update(tree(1), sgd.init(tree(0)))
    chex.assert_trees_all_close(updates, jax.tree.map(lambda leaf: -0.5 * leaf, tree(1)))
