"""Measures the joint step on a GPU, in one command of at most ten minutes.

    python -m benchmarks.on_gpu              # ResNet50 to MobileNetV2 at 32x32, the published adapter, batch 128
    python -m benchmarks.on_gpu --minutes 5  # what is worth most comes first; what does not fit is named
    python -m benchmarks.on_gpu --tiny       # two small networks, on a CPU too: shows that it works

First come the two plain steps and the joint step at cycle 1 and 4 in bfloat16, each with memory and the seconds for
compilation, a step and an epoch of 50,000 random images. Then come ours in float32 (TF32 on a GPU, for both), and the
same in PyTorch if installed, eager and through `torch.compile`. Ours are epochs in one compiled loop, as in the
experiments. Compared rows are timed in turns; the table shows medians, including those of neighbours' ratios. Results
are printed at once, and written after each part to runs/benchmarks/on_gpu.json.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too, and peaks are to be seen.

import dataclasses
import functools
import importlib.metadata
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from benchmarks import against_torch
from benchmarks.joint_step import plain_step
from merge_jax.runs import describe_environment
from merge_jax.study.cli import parse

__all__ = ["Config", "Ledger", "Part", "main", "measure", "parts_of"]

_MEBIBYTE = 2**20
_CYCLES = {"two plain steps": None, "joint, cycle 1": 1, "joint, cycle 4": 4}
_PLAIN = "two plain steps"
_COLUMNS = ("part", "ms/step", "ratio", "images/s", "s/epoch", "first s", "planned MiB", "peak MiB")
_FIGURES = ("milliseconds", "ratio", "images_per_second", "epoch_seconds", "first_seconds", "planned_mib", "peak_mib")

Kind = Literal["ours", "eager", "compiled"]
_EXPECTED: dict[Kind, float] = {"ours": 60.0, "eager": 20.0, "compiled": 120.0}  # Guesses until the first is done.


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    minutes: float = 9.0
    """Minutes after which it ends, whatever is not done by then."""
    tiny: bool = False
    """Two small networks and a few images, on whatever device there is."""
    repetitions: int = 5
    """Timed repetitions of what is compared."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        if not 0 < self.minutes < math.inf or self.repetitions < 1:
            raise ValueError("minutes must be above 0 and repetitions at least 1")

    @property
    def sizes(self) -> "_Sizes":
        """The shapes and lengths of what is timed."""
        return _Sizes(8, 8, 4, 64) if self.tiny else _Sizes(32, 128, 20, 50_000)


class _Sizes(NamedTuple):
    """The height and width of images, the examples of a batch, the steps of a repetition, the images of an epoch."""

    pixels: int
    batch: int
    steps: int
    images: int


class _AbsentError(Exception):
    """What a part needs is not here."""


class Part(NamedTuple):
    """One thing to time.

    Attributes:
      name: of the part.
      kind: what it takes before its first step.
      prepare: makes what is timed.
      base: the part that its ratio is over, or under.
    """

    name: str
    kind: Kind
    prepare: Callable[[], "Prepared"]
    base: str | None = None


@dataclass
class Prepared:
    """Something ready to be timed: what takes some steps and waits for them, and what is known of it already."""

    run: Callable[[int], None]
    figures: dict[str, float] = field(default_factory=dict)
    epoch: bool = False
    """Whether an epoch of it is timed too."""
    peak: Callable[[], float | None] = lambda: None
    """Returns the bytes that were held at once so far, if the device tells."""


class Ledger:
    """What came out of each part, printed and written as it comes."""

    def __init__(self, path: Path, about: dict[str, Any], names: Sequence[str]):
        """Takes the file to write, what is known beforehand, and all parts, none of which has run."""
        self._path, self._about = path, about
        self._lock = threading.Lock()
        self.outcomes: dict[str, dict[str, Any]] = {name: {"outcome": "not run"} for name in names}

    def note(self, name: str, outcome: str, **figures: float) -> None:
        """Notes, prints and writes what became of a part."""
        with self._lock:
            self.outcomes[name] = {"outcome": outcome, **figures}
            listed = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
            print(f"{name}: {outcome}{': ' if listed else ''}{listed}", flush=True)
            self._write()

    def close(self) -> None:
        """Prints the table of all parts and writes the file."""
        with self._lock:
            rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
            for name, outcome in self.outcomes.items():
                if outcome["outcome"] == "done":
                    rows.append((name, *(_number(outcome.get(figure)) for figure in _FIGURES)))
                else:
                    rows.append((name, outcome["outcome"].replace("|", "/"), *("",) * (len(_FIGURES) - 1)))
            print("\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)
            self._write()
            print(f"written to {self._path}", flush=True)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text(json.dumps({**self._about, "parts": self.outcomes}, indent=2) + "\n")
        part.replace(self._path)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def measure(parts: Sequence[Part], config: Config, ledger: Ledger, deadline: float) -> None:
    """Prepares and times the parts one after another; one that fails or does not fit does not keep the others off.

    Args:
      parts: in order of worth.
      config: how often and how long.
      ledger: what came out goes there.
      deadline: when all must be over, by `time.monotonic`.
    """
    expected = dict.fromkeys(_EXPECTED, 0.0) if config.tiny else dict(_EXPECTED)
    done: dict[str, Prepared] = {}
    for part in parts:
        start = time.monotonic()
        left = deadline - start
        if left < expected[part.kind]:
            needs = f"it needs about {expected[part.kind]:.0f}"
            ledger.note(part.name, f"not run: {max(left, 0):.0f} s are left, and {needs}")
            continue
        try:
            prepared = part.prepare()
            first = time.monotonic()
            prepared.run(config.sizes.steps)  # The first steps allocate, and torch.compile works in them.
            prepared.figures.setdefault("first_seconds", time.monotonic() - first)
            figures = _timed(prepared, done.get(part.base or ""), config)
        except _AbsentError as error:
            ledger.note(part.name, f"not run: {error}")
            continue
        except Exception as error:  # Out of memory, for one: what comes after may fit.
            message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            ledger.note(part.name, f"failed: {message}")
            continue
        done[part.name] = prepared
        expected[part.kind] = time.monotonic() - start
        ledger.note(part.name, "done", **figures)


def _timed(prepared: Prepared, base: Prepared | None, config: Config) -> dict[str, float]:
    """Returns the figures of a part, timed in turns with its base."""
    sizes = config.sizes
    base_seconds, own = [], []
    for _ in range(config.repetitions):
        if base is not None:
            base_seconds.append(_seconds(base.run, sizes.steps))
        own.append(_seconds(prepared.run, sizes.steps))
    seconds = statistics.median(own)
    figures = {"milliseconds": 1000 * seconds, "images_per_second": sizes.batch / seconds, **prepared.figures}
    if base is not None:
        figures["ratio"] = statistics.median(a / b for a, b in zip(own, base_seconds, strict=True))
    if prepared.epoch:
        steps = sizes.images // sizes.batch
        figures["epoch_seconds"] = steps * _seconds(prepared.run, steps)
    peak = prepared.peak()
    if peak is not None:
        figures["peak_mib"] = peak / _MEBIBYTE
    return figures


def _seconds(run: Callable[[int], None], steps: int) -> float:
    start = time.perf_counter()
    run(steps)
    return (time.perf_counter() - start) / steps


def parts_of(config: Config) -> list[Part]:
    """Returns the parts in order of worth; nothing is made before a part is prepared."""
    sizes = config.sizes

    @functools.cache
    def problem() -> against_torch.Problem:
        return _make_problem(config)

    @functools.cache
    def data() -> list[Any]:
        """The images of an epoch on the device, and which of them make the batch of each step."""
        random = np.random.default_rng(0)
        examples = {
            "image": random.standard_normal((sizes.images, sizes.pixels, sizes.pixels, 3), np.float32),
            "label": random.integers(0, problem().models[0].num_classes, sizes.images, np.int32),
        }
        steps = sizes.images // sizes.batch
        order = random.permutation(sizes.images)[: steps * sizes.batch].astype(np.int32)
        on_device = jax.device_put((examples, order.reshape(steps, sizes.batch)))
        return [dict.fromkeys(("source", "target"), tree) for tree in on_device]

    @functools.cache
    def torch_rows() -> dict[tuple[str, str], against_torch.Row]:
        try:
            against_torch.check_torch()
        except ValueError as error:
            raise _AbsentError(error) from None
        rows = against_torch.make_torch_rows(problem(), compiled=jax.default_backend() == "gpu")
        return {(row.step, row.code): row for row in rows}

    def ours(step: str, dtype: str) -> Prepared:
        prepared = _prepare_ours(problem(), _CYCLES[step], jnp.dtype(dtype), *data())
        return dataclasses.replace(prepared, epoch=dtype == "bfloat16")

    def torch(step: str, code: str) -> Prepared:
        rows = torch_rows()
        if (step, code) not in rows:
            raise _AbsentError("only on a GPU")
        return _prepare_torch(rows[step, code], sizes.steps)

    parts = [
        Part(
            f"bfloat16: {step}",
            "ours",
            functools.partial(ours, step, "bfloat16"),
            None if step == _PLAIN else f"bfloat16: {_PLAIN}",
        )
        for step in _CYCLES
    ]
    for step in ("joint, cycle 4", "joint, cycle 1", _PLAIN):
        name = f"float32: {step}"
        parts.append(Part(name, "ours", functools.partial(ours, step, "float32")))
        kinds: dict[str, Kind] = {"torch channels-last": "eager", "torch compiled": "compiled", "torch": "eager"}
        for code, kind in kinds.items():
            parts.append(Part(f"float32: {step}, {code}", kind, functools.partial(torch, step, code), name))
    return parts


def _make_problem(config: Config) -> against_torch.Problem:
    """Returns the published pair, or a tiny one, as in `benchmarks.against_torch`."""
    sizes = config.sizes
    if config.tiny:
        source = mj.models.ResNet((mj.models.ResNetStage(4, 1, 1),), 10, stem_width=4)
        target = mj.models.MobileNetV2((mj.models.InvertedResidualStage(1, 4, 1, 1),), 10, stem_width=4, head_width=8)
        route = ("stage1_0/project/kernel", "fc/kernel")
    else:
        source, target = mj.models.resnet50(100), mj.models.mobilenet_v2(100)
        route = ("stage6_2/project/kernel", "fc/kernel")
    image = (sizes.pixels, sizes.pixels, 3)
    source_variables, target_variables = (
        jax.jit(model.init)(jax.random.key(i), jnp.zeros((1, *image))) for i, model in enumerate((source, target))
    )
    transfer = mj.published_transfer([route])
    random = np.random.default_rng(0)
    return against_torch.Problem(
        models=(source, target),
        variables=(source_variables, target_variables),
        route=route,
        adapter=jax.jit(transfer.init)(jax.random.key(2), source_variables["params"], target_variables["params"]),
        images=random.standard_normal((sizes.steps, sizes.batch, *image), np.float32),
        labels=random.integers(0, source.num_classes, (sizes.steps, sizes.batch)),
    )


def _prepare_ours(problem: against_torch.Problem, cycle: int | None, dtype: Any, arrays: Any, indices: Any) -> Prepared:
    """Compiles an epoch of a step."""
    source_model, target_model = (model.clone(dtype=dtype) for model in problem.models)
    problem = dataclasses.replace(problem, models=(source_model, target_model))
    source, target = against_torch.make_tasks(problem)
    transfer = mj.published_transfer([problem.route])
    state: Any = against_torch.make_state(problem, transfer)
    step: Any
    if cycle is None:
        models = ((model.params, model.model_state, model.opt_state) for model in (state.source, state.target))
        # Copies, since the state is donated and its adapter goes.
        step, state = plain_step(source, target), jax.tree.map(jnp.copy, (state.key, *models))
    else:
        step = mj.make_joint_step(source, target, transfer, cycle=cycle, update="surrogate")
    epoch = jax.jit(mj.make_epoch(step), donate_argnums=0)
    start = time.perf_counter()
    compiled = epoch.lower(state, arrays, indices, np.int32(0)).compile()
    figures = {"first_seconds": time.perf_counter() - start}
    memory = compiled.memory_analysis()  # Not every backend tells.
    if memory is not None:
        figures["planned_mib"] = (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / _MEBIBYTE

    def run(steps: int) -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, arrays, indices, np.int32(steps)))

    device = jax.local_devices()[0]
    return Prepared(run, figures, peak=lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"))


def _prepare_torch(row: against_torch.Row, steps_at_once: int) -> Prepared:
    """Returns a row of PyTorch, which takes a fixed number of steps at once."""
    import torch  # pyright: ignore[reportMissingImports]  # Not at the top: it may be absent.

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def run(steps: int) -> None:
        assert steps == steps_at_once
        row.run()

    return Prepared(run, peak=lambda: torch.cuda.max_memory_allocated() if on_gpu else None)


def _check_device(config: Config) -> None:
    """Raises ValueError unless there is a GPU, or none is needed."""
    if not config.tiny and jax.default_backend() != "gpu":
        devices = jax.devices()
        found = f"{len(devices)} {devices[0].platform} ({devices[0].device_kind})"
        raise ValueError(f"JAX found no GPU here, only {found}; --tiny runs small networks on it")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; what is wrong with options or device is one line and exit code 2."""
    start = time.monotonic()
    try:
        words = sys.argv[1:] if arguments is None else arguments
        config = parse({"default": Config()}, "benchmarks.on_gpu", __doc__ or "", words)
        config.check()
        _check_device(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    environment = describe_environment()
    try:
        torch_version = f"torch {importlib.metadata.version('torch')}"
    except importlib.metadata.PackageNotFoundError:
        torch_version = "PyTorch is not installed"
    sizes, versions = config.sizes, environment["versions"]
    print(
        f"{environment['devices'][0]}, jax {versions['jax']}, {torch_version}, {environment['date'][:10]}\n"
        f"batch {sizes.batch}, {sizes.images} images an epoch; 'first s' is compiling, or {sizes.steps} first steps of "
        "PyTorch\nratios: joint / plain, torch / ours; our peaks are those of all so far",
        flush=True,
    )
    parts = parts_of(config)
    about = {"config": dataclasses.asdict(config), "environment": environment, "torch": torch_version}
    path = Path("runs/benchmarks") / ("on_gpu_tiny.json" if config.tiny else "on_gpu.json")
    ledger = Ledger(path, about, [part.name for part in parts])
    deadline = start + 60 * config.minutes
    watch = threading.Timer(deadline - time.monotonic(), _end, (ledger,))
    watch.daemon = True
    watch.start()
    measure(parts, config, ledger, deadline)
    watch.cancel()
    ledger.close()


def _end(ledger: Ledger) -> None:
    """Ends the process with what there is: a compiler that works cannot be interrupted in another way."""
    print("time is up", flush=True)
    ledger.close()
    os._exit(0)


if __name__ == "__main__":
    main()
