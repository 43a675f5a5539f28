"""Compares tracing and compiling a transfer of many routes of one shape with one route.

    python -m benchmarks.many_routes
    python -m benchmarks.many_routes --no-dropout

Compiles the transfer and its gradient with respect to the adapter, as in the joint step. Routes of one shape form one
group, which is traced once and mapped over. The two are compiled in turns, without a cache; the table shows medians.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

import merge_jax as mj
from benchmarks.report import parse_config, report


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    routes: int = 72
    """Routes of one shape, such as the attention kernels of many layers."""
    features: int = 64
    """The kernels are square and have so many rows."""
    num_layers: int = 2
    """Layers of each LPKA."""
    dropout: bool = True
    """Whether dropout is on, as it is in training."""
    repetitions: int = 5
    """Times that each is compiled."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        if min(self.routes, self.features, self.num_layers, self.repetitions) < 1:
            raise ValueError("every option must be at least 1")


def compile_once(config: Config, routes: int, repetition: int) -> tuple[float, float]:
    """Returns the seconds of tracing and of compiling a transfer of so many routes."""
    shape = jax.ShapeDtypeStruct((config.features, config.features), jnp.float32)
    params = {f"layer_{i}": {"kernel": shape} for i in range(routes)}
    transfer = mj.lpka_transfer({"*/kernel": "*/kernel"}, num_layers=config.num_layers)
    adapter = jax.eval_shape(transfer.init, jax.random.key(0), params, params)

    def pull_back(
        adapter: mj.types.Adapter, source: mj.Params, target: mj.Params, cotangent: mj.Params, key: jax.Array
    ) -> Any:
        # The repetition stands in the program, so that nothing compiled before can serve.
        merged, pullback = jax.vjp(
            lambda adapter: transfer.apply(adapter, source, target, key=key if config.dropout else None), adapter
        )
        return merged, pullback(cotangent), repetition

    start = time.perf_counter()
    lowered = jax.jit(pull_back).lower(adapter, params, params, params, jax.random.key(0))
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def main() -> None:
    """Runs the benchmark."""
    config = parse_config({"default": Config()}, "benchmarks.many_routes", __doc__, Config.check)
    compile_once(config, 1, config.repetitions)  # The first pays for what JAX sets up.
    counts = (1, config.routes)
    seconds: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for repetition in tqdm(range(config.repetitions), unit="repetition"):
        for count in counts:
            seconds[count].append(compile_once(config, count, repetition))
    rows, figures = [], {}
    for count in counts:
        trace, compilation = (statistics.median(part) for part in zip(*seconds[count], strict=True))
        pairs = zip(seconds[count], seconds[1], strict=True)
        ratio = statistics.median(sum(many) / sum(one) for many, one in pairs)
        rows.append((str(count), f"{trace:.2f}", f"{compilation:.2f}", f"{trace + compilation:.2f}", f"{ratio:.2f}"))
        figures[str(count)] = {"trace_seconds": trace, "compile_seconds": compilation, "ratio": ratio}
    notes = f"kernels {config.features}x{config.features}, {config.num_layers} layers; medians of {config.repetitions}"
    report("many routes", config, ("routes", "trace s", "compile s", "both s", "of one route"), rows, figures, notes)


if __name__ == "__main__":
    main()
