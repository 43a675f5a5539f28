"""The training pair of `benchmarks.torture`: two tiny trainable networks with dropout and augmentation, and states."""

import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import merge_jax as mj
from merge_jax.data.images.augment import crop_flip_rotate

__all__ = [
    "KnownStates",
    "batches_at",
    "compile_step",
    "digest",
    "initial_state",
    "joint_step",
    "load_step",
    "shapes",
    "spoiled_batches_at",
]

_IMAGE = (6, 6, 1)
_CLASSES = 3


class _Tiny(nn.Module):
    """`fc(dropout(relu(BatchNorm(hidden(x)))))` on images `[B, 6, 6, 1]`, to 3 classes."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.Dense(self.width, name="hidden")(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(_CLASSES, name="fc")(x)


_MODELS = {"source": _Tiny(8), "target": _Tiny(5)}
# Of all adapters it compiles fastest.
_TRANSFER = mj.linear_operator_transfer({"hidden/kernel": "fc/kernel"})


def _task(role: str) -> mj.Task:
    return mj.Task(mj.classification_loss(_MODELS[role].apply), optax.sgd(0.05, momentum=0.9))


@jax.jit
def initial_state() -> mj.JointState:
    """Returns the state before the first step."""
    variables = {
        role: dict(model.init(jax.random.key(i), jnp.zeros((1, *_IMAGE))))
        for i, (role, model) in enumerate(_MODELS.items())
    }
    params = {role: entries.pop("params") for role, entries in variables.items()}
    return mj.init_joint_state(
        jax.random.key(2),
        _task("source"),
        _task("target"),
        _TRANSFER,
        source_params=params["source"],
        source_state=variables["source"],
        target_params=params["target"],
        target_state=variables["target"],
    )


def _augment(key: jax.Array, batch: mj.Batch) -> mj.Batch:
    return {**batch, "image": crop_flip_rotate(key, batch["image"], padding=1)}


joint_step = mj.augmented(
    mj.make_joint_step(_task("source"), _task("target"), _TRANSFER, cycle=2),
    {"source": _augment, "target": _augment},
)
"""A step of both models and the adapter, which receives at every second step."""


def batches_at(step: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns the batches of a step: `image` `[16, 6, 6, 1]`, `label` the largest of its first pixels."""

    def batch(seed: int) -> dict[str, np.ndarray]:
        image = np.random.default_rng(seed).normal(size=(16, *_IMAGE)).astype(np.float32)
        return {"image": image, "label": np.argmax(image[:, 0, :_CLASSES, 0], axis=1).astype(np.int32)}

    return {"source": batch(2 * step), "target": batch(2 * step + 1)}


def spoiled_batches_at(step: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns the batches of a step; a twentieth of the sources', and of the targets', have NaN in one image."""
    batches, random = batches_at(step), np.random.default_rng([step, 1])
    for batch in batches.values():
        if random.random() < 0.05:
            batch["image"][random.integers(len(batch["image"]))] = np.nan
    return batches


@functools.cache
def shapes() -> tuple[Any, Any]:
    """Returns the shapes of `(state, metrics)`; nothing is computed, so no device is used."""
    return jax.eval_shape(joint_step, jax.eval_shape(initial_state), batches_at(0))


def compile_step(path: Path) -> Any:
    """Returns the compiled step, and writes it to a file for other processes of this machine."""
    # What is read from a compilation cache cannot be written again: another process finds none of its functions.
    cached = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks once, at the first program, whether there is one.
    try:
        compiled = jax.jit(joint_step).lower(shapes()[0], batches_at(0)).compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        reset_cache()
    path.write_bytes(serialize_executable.serialize(compiled)[0])
    return compiled


def load_step(path: Path) -> Any:
    """Returns the compiled step that another process wrote: the same instructions, and so the same bits."""
    state, metrics = shapes()
    arguments = jax.tree.structure(((state, batches_at(0)), {}))
    return serialize_executable.deserialize_and_load(path.read_bytes(), arguments, jax.tree.structure((state, metrics)))


def digest(tree: Any) -> str:
    """Returns the sha256 of all leaves with their paths, shapes and dtypes; written apart from that of a manifest."""
    total = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


class KnownStates:
    """The digests of the states of an unbroken run, taken as far as they are asked for; threads may share it."""

    def __init__(self, step: Any, batches: Callable[[int], Any] = batches_at):
        """Takes the compiled step, and what returns the batches of a step."""
        self._step = step
        self._batches = batches
        self._state = initial_state()
        self._digests = [digest(self._state)]
        self._lock = threading.Lock()

    def digest(self, step: int) -> str:
        """Returns the digest of the state after so many steps."""
        with self._lock:
            while len(self._digests) <= step:
                self._state, _ = self._step(self._state, self._batches(len(self._digests) - 1))
                self._digests.append(digest(self._state))
            return self._digests[step]
