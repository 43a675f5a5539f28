"""What the tests of several models share: random parameters, outputs, training, and the equations in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import erf

import merge_jax as mj


def random_params(model, *inputs):
    """Returns parameters that are all random and far from 0: what starts at 0 or 1 would hide what it is for."""
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * random.normal(size=leaf.shape), leaf.dtype), params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs(model, train, params, inputs, key):
    return model.apply({"params": params}, *inputs, train=train, rngs=None if key is None else {"dropout": key})


def outputs(model, params, *inputs, train=False, key=None):
    # All arguments are given here: `jit` would compile once more for those that are left out.
    return _outputs(model, train, params, inputs, key)


def in_training(module, params, *inputs):
    """Returns what a module gives in training, and what each of its submodules gave, by name."""
    apply = functools.partial(module.apply, train=True, capture_intermediates=True, mutable=["intermediates"])
    output, found = jax.jit(apply)({"params": params}, *inputs, rngs={"dropout": jax.random.key(0)})
    return output, found["intermediates"]


def learned(model, loss, steps, inputs, learning_rate=1e-3):
    """Returns the losses `loss(params, key)` of a training from the model's own start."""
    optimizer = optax.adam(learning_rate)

    @jax.jit
    def step(params, state, key):
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    state, losses = optimizer.init(params), []
    for i in range(steps):
        params, state, value = step(params, state, jax.random.key(i))
        losses.append(float(value))
    return losses


def assert_reaches_every_leaf(loss, params):
    """The gradient of a loss is something in each leaf, and nothing where it must be."""
    for path, leaf in mj.flatten(jax.jit(jax.grad(loss))(params)).items():
        largest = float(jnp.abs(leaf).max())
        if path.endswith("attention/key/bias"):
            # It adds one number to all scores of a query, which the softmax takes out again.
            assert largest < 1e-5, path
        else:
            assert largest > 1e-5, path


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def layer_shapes(width, heads, hidden, *, attentions=("attention",)):
    """Returns the shapes of the leaves of a layer, by path; it has a norm for each attention, and one more."""
    attention = {
        **{f"{name}/kernel": (width, heads, width // heads) for name in ("query", "key", "value")},
        **{f"{name}/bias": (heads, width // heads) for name in ("query", "key", "value")},
        "out/kernel": (heads, width // heads, width),
        "out/bias": (width,),
    }
    return {
        **{f"{name}/{path}": shape for name in attentions for path, shape in attention.items()},
        "up/kernel": (width, hidden),
        "up/bias": (hidden,),
        "down/kernel": (hidden, width),
        "down/bias": (width,),
        **{f"norm{k + 1}/{name}": (width,) for k in range(len(attentions) + 1) for name in ("scale", "bias")},
    }


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def norm(layer, x, epsilon=1e-12):
    deviation = np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return (x - x.mean(-1, keepdims=True)) / deviation * layer["scale"] + layer["bias"]


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def attend_one(query, key, value, seen=True):
    """Returns what one head takes of the values whose keys are seen."""
    scores = query @ key.T / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    return weights / weights.sum(-1, keepdims=True) @ value


def attend(block, x, keys, seen=True):
    """Returns what positions `x [N, width]` take from the keys `[M, width]` that are seen, one head at a time."""
    result = block["out"]["bias"]
    for head in range(block["out"]["kernel"].shape[0]):
        query, key, value = (
            inputs @ block[name]["kernel"][:, head] + block[name]["bias"][head]
            for name, inputs in (("query", x), ("key", keys), ("value", keys))
        )
        result = result + attend_one(query, key, value, seen) @ block["out"]["kernel"][head]
    return result


def feed_forward(layer, x):
    return dense(layer["down"], gelu(dense(layer["up"], x)))
