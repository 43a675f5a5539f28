"""One measurement of `benchmarks.against_commit`, in a separate process, of its environment's tree.

    python -P benchmarks/measured_program.py TREE init --routes 5 --layers 2
    python -P benchmarks/measured_program.py TREE gradient --routes 5 --layers 2
    python -P benchmarks/measured_program.py TREE joint-step
    python -P benchmarks/measured_program.py TREE image-steps
    python -P benchmarks/measured_program.py TREE where

The same file measures trees of other commits, so it uses only names common to all: public ones. It fails if imports lie
outside the folder TREE. It prints one line of JSON. Seconds are those of the named measurement, after all imports and
with JAX's device initialised, in a process that has not compiled it before.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import experiments.cross_structure
import merge_jax as mj
from merge_jax.runs import describe_environment

__all__ = ["main"]


def _timed(work: Callable[[], Any]) -> dict[str, float]:
    """Returns the CPU seconds, of all threads, and the wall seconds of some work."""
    jax.block_until_ready(jax.random.key(0))  # What JAX sets up once is no part of it.
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(work())
    return {"CPU s": time.process_time() - cpu, "wall s": time.perf_counter() - wall}


def _small_routes(count: int) -> tuple[dict[str, str], mj.Params, mj.Params]:
    """Returns routes of which no two are alike, with the shapes of their targets and of their sources.

    The kernels are like those of the digits pair: 3x3 of 16 to 32 channels give, 1x1 of 8x24 to 12x28 receive.
    """
    routes = {f"target_{i}/kernel": f"source_{i}/kernel" for i in range(count)}
    target = {f"target_{i}": {"kernel": _shape(1, 1, 8 + i, 24 + i)} for i in range(count)}
    source = {f"source_{i}": {"kernel": _shape(3, 3, 16 + 4 * i, 16 + 4 * i)} for i in range(count)}
    return routes, source, target


def _equal_routes(count: int, size: int) -> tuple[dict[str, str], mj.Params, mj.Params]:
    """Returns routes of one shape, from square kernels to square kernels."""
    params = {f"layer_{i}": {"kernel": _shape(size, size)} for i in range(count)}
    return {f"layer_{i}/kernel": f"layer_{i}/kernel" for i in range(count)}, params, params


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def _routes(options: argparse.Namespace) -> tuple[mj.Transfer, mj.Params, mj.Params]:
    alike = options.size is not None
    routes, source, target = _equal_routes(options.routes, options.size) if alike else _small_routes(options.routes)
    return mj.lpka_transfer(routes, num_layers=options.layers), source, target


def _init(options: argparse.Namespace) -> dict[str, float]:
    """Times the making of an adapter from parameters that are there."""
    transfer, *shapes = _routes(options)
    random = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape.shape, np.float32))

    source, target = jax.block_until_ready(jax.tree.map(draw, shapes))
    key = jax.random.key(0)
    return _timed(lambda: transfer.init(key, source, target))


def _gradient(options: argparse.Namespace) -> dict[str, float]:
    """Times tracing and compiling a transfer with its gradient in the adapter, dropout on, as in the joint step."""
    transfer, source, target = _routes(options)
    key = jax.random.key(0)
    adapter = jax.eval_shape(transfer.init, key, source, target)

    def pull_back(adapter: Any, source: Any, target: Any, cotangent: Any, key: jax.Array) -> Any:
        merged, pullback = jax.vjp(lambda adapter: transfer.apply(adapter, source, target, key=key), adapter)
        return merged, pullback(cotangent)

    def work() -> None:
        jax.jit(pull_back).lower(adapter, source, target, target, key).compile()

    return _timed(work)


def _joint_step(options: argparse.Namespace) -> dict[str, float]:
    """Times tracing and compiling the joint step of the digits pair with mergenet, a transfer every fourth step."""
    del options
    transfer = mj.lpka_transfer(experiments.cross_structure.ROUTES, num_layers=1, num_heads=8)
    models = mj.models.small_resnet(10), mj.models.small_mobilenet_v2(10)
    batch = {"image": _shape(50, 8, 8, 1), "label": jax.ShapeDtypeStruct((50,), jnp.int32)}
    batches = {"source": batch, "target": batch}

    def make_task(model: Any) -> mj.Task:
        sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))
        return mj.Task(mj.classification_loss(model.apply), sgd)

    source, target = (make_task(model) for model in models)

    def make_state(key: jax.Array) -> mj.JointState:
        source_variables, target_variables = (model.init(key, jnp.zeros((1, 8, 8, 1))) for model in models)
        return mj.init_joint_state(
            key,
            source,
            target,
            transfer,
            source_params=source_variables["params"],
            source_state={"batch_stats": source_variables["batch_stats"]},
            target_params=target_variables["params"],
            target_state={"batch_stats": target_variables["batch_stats"]},
        )

    state = jax.eval_shape(make_state, jax.random.key(0))
    step = mj.make_joint_step(source, target, transfer, cycle=4)

    def work() -> None:
        jax.jit(step).lower(state, batches).compile()

    return _timed(work)


def _image_steps(options: argparse.Namespace) -> dict[str, float]:
    """Times steps of plain training, in a compiled loop: EfficientNet-lite0 of half the width, 50 images of 64x64."""
    del options
    model = mj.models.efficientnet_lite(100, 0.5)
    images = jax.random.normal(jax.random.key(0), (50, 64, 64, 3))
    variables = mj.models.initialize(model, jax.random.key(1), images)
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    batch, loss, steps = {"image": images, "label": jnp.arange(50)}, mj.classification_loss(model.apply), 8

    def train(params: Any) -> Any:
        def step(_: Any, params: Any) -> Any:
            slope = jax.grad(lambda params: loss(params, state, batch, jax.random.key(2))[0])(params)
            return jax.tree.map(lambda leaf, change: leaf - 1e-3 * change, params, slope)

        return jax.lax.fori_loop(0, steps, step, params)

    lowered = jax.jit(train).lower(params)
    made: list[Any] = []
    compiling = _timed(lambda: made.append(lowered.compile()))
    (program,) = made
    program(params)  # The first call is slower.
    return {"compile CPU s": compiling["CPU s"], "ms/step": 1000 * _timed(lambda: program(params))["wall s"] / steps}


def _where(options: argparse.Namespace) -> dict[str, Any]:
    """Returns where the code lies, and what it runs on."""
    del options
    return {"merge_jax": mj.__file__, "experiments": experiments.cross_structure.__file__, **describe_environment()}


_WORKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "init": _init,
    "gradient": _gradient,
    "joint-step": _joint_step,
    "image-steps": _image_steps,
    "where": _where,
}


def main() -> None:
    """Does what the command line says; code from another tree is one line and exit code 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", type=Path)
    parser.add_argument("work", choices=_WORKS)
    parser.add_argument("--routes", type=int, default=1)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--size", type=int)
    options = parser.parse_args()
    for module in (mj, experiments.cross_structure):
        file = Path(module.__file__ or "").resolve()
        if not file.is_relative_to(options.tree.resolve()):
            raise SystemExit(f"error: {module.__name__} is that of {file}, not that of {options.tree}")
    print(json.dumps(_WORKS[options.work](options)))


if __name__ == "__main__":
    main()
