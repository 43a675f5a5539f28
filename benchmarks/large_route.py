"""Peak memory and time of one large route, forward and backward: by default 4096x4096 from 4096x11008 at rank 64.

    python -m benchmarks.large_route
    python -m benchmarks.large_route --unchunked  # what whole attention maps would take: planned, not run

The peak is the highest resident memory of the whole process, including Python and JAX, as counted by the operating
system; memory left by compilation is released before the passes. Temporaries are XLA's planned memory besides arguments
and outputs.
"""

import contextlib
import ctypes
import statistics
import sys
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from benchmarks.memory import bytes_of, give_back, peak_bytes
from benchmarks.report import parse_config, report


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    target: tuple[int, int] = (4096, 4096)
    """Rows and columns of the target's matrix."""
    source: tuple[int, int] = (4096, 11008)
    """Rows and columns of the source's matrix."""
    rank: int = 64
    """Rank of the re-encoding of both."""
    num_layers: int = 2
    """Layers of the LPKA."""
    repetitions: int = 3
    """Times that it runs."""
    unchunked: bool = False
    """Compile for whole attention maps, kept for the backward pass; nothing is run, since few machines could."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        if self.repetitions < 1:
            raise ValueError(f"repetitions must be at least 1, got {self.repetitions}")


def main() -> None:
    """Runs the benchmark."""
    with contextlib.suppress(OSError, AttributeError):  # Arrays from 1 MiB on are given back at once (GNU's C library).
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)
    config = parse_config({"default": Config()}, "benchmarks.large_route", __doc__, Config.check)
    before = peak_bytes()
    keys = jax.random.split(jax.random.key(0))
    random = np.random.default_rng(0)
    target, source = (
        {"w": {"weight": jnp.asarray(random.standard_normal(shape, np.float32) * np.float32(0.02))}}
        for shape in (config.target, config.source)
    )
    transfer = mj.lpka_transfer(
        {"w/weight": "w/weight"},
        num_layers=config.num_layers,
        rank=config.rank,
        max_scores=sys.maxsize if config.unchunked else 2**22,
    )
    adapter = transfer.init(keys[0], source, target)

    @jax.jit
    def gradient(
        adapter: mj.types.Adapter, source: mj.Params, target: mj.Params, key: jax.Array
    ) -> tuple[mj.types.Adapter, mj.Params]:
        def loss(adapter: mj.types.Adapter) -> tuple[jax.Array, mj.Params]:
            merged = transfer.apply(adapter, source, target, key=key)
            return jnp.sum(jnp.square(merged["w"]["weight"])), merged

        return jax.grad(loss, has_aux=True)(adapter)

    start = time.perf_counter()
    compiled = gradient.lower(adapter, source, target, keys[1]).compile()
    compile_seconds = time.perf_counter() - start
    jax.clear_caches()  # What compiling leaves behind is not part of a pass.
    seconds = []
    give_back()
    for _ in range(0 if config.unchunked else config.repetitions):
        start = time.perf_counter()
        outputs = jax.block_until_ready(compiled(adapter, source, target, keys[1]))
        seconds.append(time.perf_counter() - start)
        del outputs
        give_back()
    memory = compiled.memory_analysis()
    mebibytes = {
        "peak of the process": peak_bytes(),
        "before the first array": before,
        "adapter": bytes_of(adapter),
        "both matrices": bytes_of((source, target)),
        "temporaries": memory.temp_size_in_bytes if memory else 0,
    }
    rows = [(name, f"{value / 2**20:.0f}") for name, value in mebibytes.items()]
    shapes = [f"{m}x{n}" for m, n in (config.target, config.source)]
    notes = (
        f"{shapes[0]} from {shapes[1]} at rank {config.rank}, forward and backward with dropout; "
        f"{f'{statistics.median(seconds):.2f} s a pass (median of {len(seconds)})' if seconds else 'not run'}, "
        f"{compile_seconds:.1f} s to compile"
    )
    figures = {"bytes": mebibytes, "seconds": seconds, "compile_seconds": compile_seconds}
    report("large route", config, ("memory", "MiB"), rows, figures, notes)


if __name__ == "__main__":
    main()
