"""Compares several seeds in one program with the same seeds one after another, in one run.

    python -m benchmarks.seeds           # the digits pair, 1 to 8 seeds
    python -m benchmarks.seeds --pair mlp # two small multilayer perceptrons

Both are compiled loops of the joint step; the ratio is the sequential time divided by the vectorized time: above 1,
vectorized seeds are faster.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from tqdm.auto import tqdm

import merge_jax as mj
from benchmarks.report import parse_config, report
from merge_jax.checks import check_at_least_one
from merge_jax.training.epoch import Epoch


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    pair: Literal["digits", "mlp"] = "digits"
    """The two models: a small ResNet and MobileNetV2, or two perceptrons on the same images."""
    seeds: tuple[int, ...] = (2, 4, 8)
    """Numbers of seeds to try."""
    batch_size: int = 50
    """Examples in a batch of each model."""
    steps: int = 20
    """Steps in a repetition."""
    repetitions: int = 5
    """Timed repetitions; medians are shown."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        check_at_least_one(batch_size=self.batch_size, steps=self.steps, repetitions=self.repetitions)
        if not self.seeds or min(self.seeds) < 2:
            raise ValueError(f"seeds must be numbers of at least 2, got {self.seeds}")


class _Perceptron(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train  # Nothing differs.
        x = nn.relu(nn.Dense(self.width, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="fc")(x)


def _epoch_and_states(config: Config) -> tuple[Epoch, list[mj.JointState]]:
    if config.pair == "digits":
        source, target = mj.models.small_resnet(), mj.models.small_mobilenet_v2()
    else:
        source, target = _Perceptron(256), _Perceptron(64)
    transfer = mj.lpka_transfer({"fc/kernel": "fc/kernel"}, num_layers=1, num_heads=2)

    def task(model: nn.Module) -> mj.Task:
        return mj.Task(mj.classification_loss(model.apply), optax.sgd(0.01, momentum=0.9))

    tasks = task(source), task(target)

    def state(seed: int) -> mj.JointState:
        variables = [
            dict(jax.jit(model.init)(jax.random.key(seed + i), jnp.zeros((1, 8, 8, 1))))
            for i, model in enumerate((source, target))
        ]
        params = [v.pop("params") for v in variables]
        return mj.init_joint_state(
            jax.random.key(seed),
            *tasks,
            transfer,
            source_params=params[0],
            target_params=params[1],
            source_state=variables[0],
            target_state=variables[1],
        )

    epoch = mj.make_epoch(mj.make_joint_step(*tasks, transfer, cycle=4))
    return epoch, [state(seed) for seed in range(max(config.seeds))]


def _time(epoch: Any, state: Any, data: tuple[Any, Any], steps: int) -> tuple[Any, float]:
    start = time.perf_counter()
    state, _ = jax.block_until_ready(epoch(state, *data, np.int32(steps)))
    return state, time.perf_counter() - start


def main() -> None:
    """Runs the benchmark; prints a table and writes JSON."""
    config = parse_config({"default": Config()}, "benchmarks.seeds", __doc__, Config.check)
    random = np.random.default_rng(0)
    examples = {
        "image": random.random((1000, 8, 8, 1), np.float32),
        "label": random.integers(0, 10, 1000, np.int32),
    }
    indices = random.integers(0, 1000, (config.steps, config.batch_size), np.int32)
    arrays, indices = (dict.fromkeys(("source", "target"), tree) for tree in (examples, indices))
    epoch, states = _epoch_and_states(config)

    def program(function: Any, *arguments: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        compiled = jax.jit(function, donate_argnums=0).lower(*arguments, np.int32(0)).compile()
        return compiled, time.perf_counter() - start

    with Console(stderr=True).status("compiling"):
        alone, seconds_alone = program(epoch, states[0], arrays, indices)
    rows, figures = [], []
    for seeds in config.seeds:
        stack = lambda tree: jax.tree.map(lambda leaf: np.stack([leaf] * seeds), tree)  # noqa: B023, E731
        data = stack(arrays), stack(indices)
        together = mj.training.stack_seeds(states[:seeds])
        side_by_side, seconds_together = program(mj.training.over_seeds(epoch), together, *data)
        one = jax.tree.map(jnp.copy, states[0])
        separate, vectorized = [], []
        for repetition in tqdm(range(config.repetitions + 1), desc=f"{seeds} seeds", leave=False):
            together, time_together = _time(side_by_side, together, data, config.steps)
            total = 0.0
            for _ in range(seeds):
                one, seconds = _time(alone, one, (arrays, indices), config.steps)
                total += seconds
            if repetition:  # The first allocates.
                separate.append(total / config.steps)
                vectorized.append(time_together / config.steps)
        figure = {
            "seeds": seeds,
            "separate": statistics.median(separate),
            "vectorized": statistics.median(vectorized),
            "ratio": statistics.median(a / b for a, b in zip(separate, vectorized, strict=True)),
            "compile_seconds": (seconds_alone, seconds_together),
        }
        figures.append(figure)
        milliseconds = (f"{1000 * figure[name]:.2f}" for name in ("separate", "vectorized"))
        compiled = (f"{seconds:.1f}" for seconds in (seconds_alone, seconds_together))
        rows.append((str(seeds), *milliseconds, f"{figure['ratio']:.2f}", *compiled))
    columns = ("seeds", "ms/step separate", "side by side", "times faster", "compile s separate", "side by side")
    notes = f"batch {config.batch_size}; medians of {config.repetitions} repetitions of {config.steps} steps"
    report(f"seeds {config.pair}", config, columns, rows, figures, notes)


if __name__ == "__main__":
    main()
