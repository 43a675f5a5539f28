"""A pair of tiny models with dropout and BatchNorm, of different shapes, and what trains them."""

import functools
import socket

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import merge_jax as mj


class Tiny(nn.Module):
    """`fc(dropout(relu(BatchNorm(hidden(x)))))` on `[B, 6]`, to 3 classes."""

    width: int
    dropout: float = 0.2
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(self.width, name="hidden")(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="norm")
        x = nn.relu(norm(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(3, name="fc")(x)


SOURCE, TARGET = Tiny(8), Tiny(5)
ROUTES = {"hidden/kernel": "fc/kernel"}


@functools.cache
def _jitted(model):
    return jax.jit(model.init)


def jitted_init(model, seed, *inputs):
    """Returns the variables of a Linen model: one program, where without jit each of its operations is one."""
    try:
        init = _jitted(model)  # Traced once for equal models.
    except TypeError:  # A list among its attributes, which has no hash.
        init = jax.jit(model.init)
    return init(jax.random.key(seed), *inputs)


@functools.cache
def _initial(model, seed):
    with jax.ensure_compile_time_eval():  # The first who asks may be a function that is traced.
        return jax.device_get(jitted_init(model, seed, jnp.zeros((1, 6))))


def variables(model, seed):
    both = jax.tree.map(jnp.array, _initial(model, seed))  # Copies: who gets them may donate them.
    return both["params"], {"batch_stats": both["batch_stats"]}


def task(model, learning_rate=0.1):
    loss_fn = mj.classification_loss(model.apply, inputs="x")
    return mj.Task(loss_fn, optax.sgd(learning_rate, momentum=0.9))


def batch(seed, size=16):
    random = np.random.default_rng(seed)
    x = random.normal(size=(size, 6)).astype(np.float32)
    return {"x": x, "label": np.argmax(x[:, :3], axis=1).astype(np.int32)}


def batches(step):
    return {"source": batch(2 * step), "target": batch(2 * step + 1)}


def initial_state(transfer, *, frozen=False, **options):
    source_params, source_state = variables(SOURCE, 0)
    target_params, target_state = variables(TARGET, 1)
    return mj.init_joint_state(
        jax.random.key(2),
        None if frozen else task(SOURCE),
        task(TARGET),
        transfer,
        source_params=source_params,
        source_state=source_state,
        target_params=target_params,
        target_state=target_state,
        **options,
    )


@functools.cache
def joint_step(transfer, *, frozen=False, **options):
    # Jitted, since each operation by itself would be a program to compile.
    return jax.jit(mj.make_joint_step(None if frozen else task(SOURCE), task(TARGET), transfer, **options))


def free_port():
    """Returns a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
