"""Compares encoding and decoding a matrix at low rank with a full singular value decomposition.

    python -m benchmarks.low_rank

A repetition times both once, so that other load affects both alike; the table shows medians. The error is that of `W ~
B B^T W` in the Frobenius norm, relative to that of the best matrix of this rank.
"""

import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import merge_jax as mj
from benchmarks.report import parse_config, report


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    rows: int = 2048
    """Rows of the matrix."""
    columns: int = 512
    """Columns of the matrix."""
    ranks: tuple[int, ...] = (4, 16, 64)
    """Ranks to encode at."""
    repetitions: int = 15
    """Timed repetitions."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        if not all(1 <= rank <= min(self.rows, self.columns) for rank in self.ranks) or self.repetitions < 1:
            raise ValueError(f"ranks must lie in [1, {min(self.rows, self.columns)}], repetitions be at least 1")


def round_trip(matrix: jax.Array, rank: int) -> jax.Array:
    """Encodes, changes the code, decodes."""
    basis = mj.transfers.row_basis(matrix, rank)
    return mj.transfers.decode(matrix, 0.1 * mj.transfers.encode(matrix, basis), basis)


def main() -> None:
    """Runs the benchmark."""
    config = parse_config({"default": Config()}, "benchmarks.low_rank", __doc__, Config.check)
    random = np.random.default_rng(0)
    # Singular values that fall slowly, as those of trained layers do; a random matrix has none that lead.
    m, n = config.rows, config.columns
    scale = np.arange(1, n + 1.0) ** -0.5
    matrix = jnp.asarray(random.normal(size=(m, n)) * scale @ np.linalg.qr(random.normal(size=(n, n)))[0], jnp.float32)
    functions = {"full SVD": jax.jit(lambda w: jnp.linalg.svd(w, full_matrices=False))}
    for rank in config.ranks:
        functions[f"rank {rank}"] = jax.jit(lambda w, rank=rank: round_trip(w, rank))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function(matrix))
    for _ in tqdm(range(config.repetitions), unit="repetition"):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(matrix))
            seconds[name].append(time.perf_counter() - start)
    values = np.asarray(functions["full SVD"](matrix)[1])
    rows, figures = [], {}
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["full SVD"], strict=True))
        error = ""
        if name != "full SVD":
            rank = int(name.split()[1])
            basis = mj.transfers.row_basis(matrix, rank)
            error = f"{np.linalg.norm(matrix - basis @ (basis.T @ matrix)) / np.linalg.norm(values[rank:]):.4f}"
        rows.append((name, f"{1000 * statistics.median(times):.2f}", f"{ratio:.3f}", error))
        figures[name] = {"milliseconds": 1000 * statistics.median(times), "ratio": ratio, "error": error}
    notes = f"a {m}x{n} matrix; medians of {config.repetitions} repetitions"
    report("low rank", config, ("what", "ms", "of full SVD", "error / best error"), rows, figures, notes)


if __name__ == "__main__":
    main()
