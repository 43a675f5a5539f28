"""Compares the joint step with its two plain training steps, side by side in one run.

    python -m benchmarks.joint_step            # the digits pair of experiments.cross_structure
    python -m benchmarks.joint_step published  # ResNet50 to MobileNetV2 at 32x32, the published route and adapter
    python -m benchmarks.joint_step capped     # the same with the default caps on the adapter's widths

Each row is one compiled loop of some steps, as in the experiments, and includes the same plain steps of both models. A
repetition times every row once, so that other load affects all rows alike; the table shows medians over repetitions.
Compilation is timed separately. Memory is XLA's planned memory of the compiled loop besides its arguments.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console
from tqdm.auto import tqdm

import merge_jax as mj
from benchmarks.report import parse_config, report
from experiments.cross_structure import ROUTES

_EPOCH = 50_000  # Training images of CIFAR-100.


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    pair: Literal["digits", "published", "capped"] = "digits"
    """The two models with their routes and adapter."""
    batch_size: int = 50
    """Examples in a batch of each model."""
    repetitions: int = 20
    """Timed repetitions of every row."""
    steps: int = 20
    """Steps in a repetition, a multiple of 4 so that each has its transfers."""
    update: Literal["exact", "surrogate"] = "exact"
    """What the adapter follows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation in both models."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        if self.steps < 4 or self.steps % 4 or self.repetitions < 1 or self.batch_size < 1:
            raise ValueError("steps must be a multiple of 4; repetitions and batch_size at least 1")


PRESETS = {
    "default": Config(),
    **{pair: Config(pair=pair, batch_size=128, repetitions=3, steps=4) for pair in ("published", "capped")},
}


@dataclass(frozen=True)
class Pair:
    """Two models, the shape of their images, and the transfer between them."""

    source: mj.models.ResNet
    target: mj.models.MobileNetV2
    image: tuple[int, int, int]
    transfer: mj.Transfer


def make_pair(name: str, dtype: Any = jnp.float32) -> Pair:
    """Returns the models and the transfer of a pair by its name."""
    if name in ("published", "capped"):
        route = {"stage6_2/project/kernel": "fc/kernel"}
        transfer = mj.published_transfer(route) if name == "published" else mj.lpka_transfer(route, output="published")
        models = mj.models.resnet50(100, dtype=dtype), mj.models.mobilenet_v2(100, dtype=dtype)
        return Pair(*models, (32, 32, 3), transfer)
    transfer = mj.lpka_transfer(ROUTES, num_layers=1, num_heads=8)
    models = mj.models.small_resnet(10, dtype=dtype), mj.models.small_mobilenet_v2(10, dtype=dtype)
    return Pair(*models, (8, 8, 1), transfer)


@dataclass
class Row:
    """One thing that is timed: a compiled loop, the state it goes through, and what was measured."""

    name: str
    loop: Any
    state: Any
    compile_seconds: float
    temporary_bytes: int
    seconds: list[float]

    def run(self, steps: int) -> None:
        """Times some steps and notes the seconds a step."""
        start = time.perf_counter()
        self.state = jax.block_until_ready(self.loop(self.state, np.int32(steps)))
        self.seconds.append((time.perf_counter() - start) / steps)


def compile_row(name: str, step: Callable[..., Any], state: Any, batches: Any) -> Row:
    """Compiles a loop of a step on the same batches, with its state donated."""

    def loop(state: Any, steps: Any) -> Any:
        return lax.fori_loop(0, steps, lambda _, state: step(state, batches)[0], state)

    start = time.perf_counter()
    compiled = jax.jit(loop, donate_argnums=0).lower(state, np.int32(0)).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()  # Not every backend tells.
    return Row(name, compiled, state, seconds, memory.temp_size_in_bytes if memory else 0, [])


def plain_step(source: mj.Task, target: mj.Task) -> Callable[..., Any]:
    """Returns a training step of both models written with JAX and Optax alone: what the joint step is held to."""

    def learn(task: mj.Task, model: Any, batch: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, model_state, opt_state = model
        grad = jax.value_and_grad(task.loss_fn, has_aux=True)
        (loss, (model_state, _)), grads = grad(params, model_state, batch, key)
        updates, opt_state = task.optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), model_state, opt_state), loss

    def step(state: Any, batches: Any) -> tuple[Any, Any]:
        key, source_model, target_model = state
        key, source_key, target_key = jax.random.split(key, 3)
        source_model, source_loss = learn(source, source_model, batches["source"], source_key)
        target_model, target_loss = learn(target, target_model, batches["target"], target_key)
        return (key, source_model, target_model), (source_loss, target_loss)

    return step


def make_rows(config: Config) -> tuple[list[Row], int]:
    """Returns the compiled rows and the number of the adapter's parameters."""
    pair = make_pair(config.pair, jnp.dtype(config.dtype))
    num_classes = pair.source.num_classes
    random = np.random.default_rng(0)
    batch = {
        "image": random.normal(size=(config.batch_size, *pair.image)).astype(np.float32),
        "label": random.integers(0, num_classes, config.batch_size).astype(np.int32),
    }
    batches = jax.device_put({"source": batch, "target": batch})

    def make_task(model: Any) -> mj.Task:
        sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))
        return mj.Task(mj.classification_loss(model.apply), sgd)

    source, target = make_task(pair.source), make_task(pair.target)
    images = jnp.zeros((1, *pair.image))
    variables = [jax.jit(model.init)(jax.random.key(i), images) for i, model in enumerate((pair.source, pair.target))]

    def joint_state() -> mj.JointState:
        return mj.init_joint_state(
            jax.random.key(2),
            source,
            target,
            pair.transfer,
            source_params=variables[0]["params"],
            source_state={"batch_stats": variables[0]["batch_stats"]},
            target_params=variables[1]["params"],
            target_state={"batch_stats": variables[1]["batch_stats"]},
        )

    state = joint_state()
    plain_state = (
        state.key,
        *((m.params, m.model_state, m.opt_state) for m in (state.source, state.target)),
    )
    rows = [compile_row("two plain steps", plain_step(source, target), plain_state, batches)]
    for name, cycle, stop in (
        ("joint, no transfer", 1, 0.0),
        ("joint, cycle 4", 4, 1.0),
        ("joint, cycle 1", 1, 1.0),
    ):
        step = mj.make_joint_step(source, target, pair.transfer, cycle=cycle, stop=stop, update=config.update)
        rows.append(compile_row(name, step, joint_state(), batches))
    adapter_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.adapter.params))
    return rows, adapter_parameters


def main() -> None:
    """Runs the benchmark; prints a table and writes JSON."""
    config = parse_config(PRESETS, "benchmarks.joint_step", __doc__, Config.check)
    with Console(stderr=True).status("compiling"):
        rows, adapter_parameters = make_rows(config)
    for row in rows:  # The first steps allocate what the later ones reuse.
        row.run(config.steps)
        row.seconds.clear()
    for _ in tqdm(range(config.repetitions), unit="repetition"):
        for row in rows:
            row.run(config.steps)
    figures = [
        {
            "step": row.name,
            "seconds": statistics.median(row.seconds),
            # The ratio of each repetition's neighbours, since the machine's speed drifts over a run.
            "ratio": statistics.median(a / b for a, b in zip(row.seconds, rows[0].seconds, strict=True)),
            "compile_seconds": row.compile_seconds,
            "temporary_bytes": row.temporary_bytes,
        }
        for row in rows
    ]
    report(
        f"joint step {config.pair}",
        config,
        ("step", "ms/step", "ratio", "images/s", "s/50,000 images", "compile s", "temporaries MiB"),
        [
            (
                figure["step"],
                f"{1000 * figure['seconds']:.2f}",
                f"{figure['ratio']:.3f}",
                f"{config.batch_size / figure['seconds']:.0f}",
                f"{_EPOCH / config.batch_size * figure['seconds']:.1f}",
                f"{figure['compile_seconds']:.1f}",
                f"{figure['temporary_bytes'] / 2**20:.1f}",
            )
            for figure in figures
        ],
        {"adapter_parameters": adapter_parameters, "rows": figures},
        f"batch {config.batch_size} of each; medians of {config.repetitions} repetitions of {config.steps} steps\n"
        f"adapter: {adapter_parameters:,} parameters, {4 * adapter_parameters / 2**20:.1f} MiB, "
        "three times that with AdamW's moments",
    )


if __name__ == "__main__":
    main()
