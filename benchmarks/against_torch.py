"""Compares the joint step with the same published step in PyTorch, side by side in one run.

    pip install -e ".[bench]"
    python -m benchmarks.against_torch            # ResNet50 to MobileNetV2 at 32x32, batch 32
    python -m benchmarks.against_torch published  # the same at the published batch size, 128
    python -m benchmarks.against_torch smoke      # two small networks, in half a minute

Both use the same networks, weights, batches, route and adapter, with the update `surrogate`. PyTorch runs idiomatic
code, with contiguous tensors and with channels last, and on a GPU also through `torch.compile`. Ours is one compiled
loop over the steps of a repetition, as in the experiments. Both use all cores, or the GPU with TF32. A repetition times
every row once, in turn; the table shows medians, and a ratio compares neighbours within a repetition.

Nothing else may run on the machine: PyTorch's threads spin while they wait for each other, so another program on a core
slows PyTorch far more than ours. This shows as a wide range over repetitions.
"""

import copy
import importlib.metadata
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console
from tqdm.auto import tqdm

import merge_jax as mj
from benchmarks.joint_step import plain_step
from benchmarks.report import parse_config, report
from merge_jax.models.mobilenet import InvertedResidualStage
from merge_jax.models.resnet import ResNetStage

_CYCLES = {"two plain steps": None, "joint, cycle 4": 4, "joint, cycle 1": 1}
_OURS = "merge_jax"
_PAUSE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    nets: Literal["published", "small"] = "published"
    """The published pair with its route, or two small networks with the same kinds of layers."""
    batch_size: int = 32
    """Examples in a batch, which both models learn from."""
    repetitions: int = 3
    """Timed repetitions of every row."""
    steps: int = 4
    """Steps in a repetition, a multiple of 4 so that each has its transfers."""
    compiled: bool | None = None
    """Whether PyTorch is timed through `torch.compile` too; by default on a GPU only."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        if self.steps < 4 or self.steps % 4 or self.repetitions < 1 or self.batch_size < 2:
            raise ValueError("steps must be a multiple of 4, repetitions at least 1, and batch_size at least 2")


PRESETS = {
    "default": Config(),
    "published": Config(batch_size=128),
    "smoke": Config(nets="small", batch_size=8, repetitions=2),
}


@dataclass(frozen=True)
class Problem:
    """What all rows train: networks, initial variables, the route and its adapter, and a batch for each step.

    Images are `[steps, B, 32, 32, 3]`, labels `[steps, B]`.
    """

    models: tuple[mj.models.ResNet, mj.models.MobileNetV2]
    variables: tuple[Any, Any]
    route: tuple[str, str]
    """The paths of the target's kernel and of the source's."""
    adapter: mj.types.Adapter
    images: np.ndarray
    labels: np.ndarray

    @property
    def torch_route(self) -> tuple[str, str]:
        """The PyTorch modules of the target's kernel and of the source's."""
        target, source = (path.removesuffix("/kernel").replace("/", ".") for path in self.route)
        return target, source


@dataclass
class Row:
    """One thing that is timed: what it does, in which code, and the seconds of a step in each repetition."""

    step: str
    code: str
    run: Callable[[], None]
    """Takes the steps of a repetition and waits for the last."""
    seconds: list[float] = field(default_factory=list)


def make_problem(config: Config) -> Problem:
    """Returns the problem of a config; its weights and data are random but fixed."""
    if config.nets == "published":
        source, target = mj.models.resnet50(100), mj.models.mobilenet_v2(100)
        route = ("stage6_2/project/kernel", "fc/kernel")
    else:
        source = mj.models.ResNet((ResNetStage(8, 1, 1), ResNetStage(16, 2, 2)), 10, stem_width=8)
        stages = (InvertedResidualStage(1, 8, 1, 1), InvertedResidualStage(6, 16, 2, 2))
        target = mj.models.MobileNetV2(stages, 10, stem_width=8, head_width=64)
        route = ("stage2_1/project/kernel", "fc/kernel")
    images = jnp.zeros((1, 32, 32, 3))
    source_variables, target_variables = (
        jax.jit(model.init)(jax.random.key(i), images) for i, model in enumerate((source, target))
    )
    transfer = mj.published_transfer([route])
    random = np.random.default_rng(0)
    return Problem(
        models=(source, target),
        variables=(source_variables, target_variables),
        route=route,
        adapter=transfer.init(jax.random.key(2), source_variables["params"], target_variables["params"]),
        images=random.standard_normal((config.steps, config.batch_size, 32, 32, 3), np.float32),
        labels=random.integers(0, source.num_classes, (config.steps, config.batch_size)),
    )


def make_our_rows(problem: Problem, steps: int) -> list[Row]:
    """Returns the rows of the JAX code, compiled."""
    source, target = make_tasks(problem)
    transfer = mj.published_transfer([problem.route])
    batches = jax.device_put({"image": problem.images, "label": problem.labels.astype(np.int32)})
    rows = []
    for name, cycle in _CYCLES.items():
        state: Any = make_state(problem, transfer)
        if cycle is None:
            models = ((model.params, model.model_state, model.opt_state) for model in (state.source, state.target))
            step, state = plain_step(source, target), (state.key, *models)
        else:
            step = mj.make_joint_step(source, target, transfer, cycle=cycle, update="surrogate")
        rows.append(Row(name, _OURS, _our_run(step, state, batches, steps)))
    return rows


def make_tasks(problem: Problem) -> tuple[mj.Task, mj.Task]:
    """Returns the tasks of both models."""
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    source, target = (mj.Task(mj.classification_loss(model.apply), sgd) for model in problem.models)
    return source, target


def make_state(problem: Problem, transfer: mj.Transfer) -> mj.JointState:
    """Returns the state before the first step, a copy of the problem's variables, so that it can be donated."""
    source, target = problem.variables
    state = mj.init_joint_state(
        jax.random.key(3),
        *make_tasks(problem),
        transfer,
        source_params=source["params"],
        source_state={"batch_stats": source["batch_stats"]},
        target_params=target["params"],
        target_state={"batch_stats": target["batch_stats"]},
    )
    return state.replace(adapter=state.adapter.replace(params=jax.tree.map(jnp.copy, problem.adapter)))


def _our_run(step: Callable[..., Any], state: Any, batches: Any, steps: int) -> Callable[[], None]:
    def loop(state: Any, batches: Any) -> Any:
        def advance(i: jax.Array, state: Any) -> Any:
            batch = jax.tree.map(lambda entry: entry[i], batches)
            return step(state, {"source": batch, "target": batch})[0]

        return lax.fori_loop(0, steps, advance, state)

    compiled = jax.jit(loop, donate_argnums=0).lower(state, batches).compile()

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(state, batches))

    return run


def make_torch_modules(problem: Problem) -> tuple[Any, Any, Any]:
    """Returns source, target and adapter in PyTorch, with the problem's weights."""
    import torch  # pyright: ignore[reportMissingImports]  # Not at the top, so that main can tell where it is missing.

    from benchmarks import torch_pair

    source, target = problem.models
    modules = (
        torch_pair.resnet(source.stages, source.num_classes, source.stem_width),
        torch_pair.mobilenet_v2(target.stages, target.num_classes, target.stem_width, target.head_width),
    )
    for module, variables in zip(modules, problem.variables, strict=True):
        torch_pair.load_model(module, variables["params"], variables["batch_stats"])
    target_shape, source_shape = (
        module.get_submodule(name).get_parameter("weight").flatten(1).shape
        for module, name in zip(modules[::-1], problem.torch_route, strict=True)
    )
    adapter = torch_pair.Adapter(target_shape, source_shape)
    arrays = mj.transfers.export_published_adapter(problem.adapter[problem.route[0]])
    adapter.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    return *modules, adapter


def make_torch_rows(problem: Problem, *, compiled: bool) -> list[Row]:
    """Returns the rows of the PyTorch code."""
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks import torch_pair

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA does by default; no change on a CPU.
    torch.backends.cudnn.benchmark = True  # XLA tunes its convolutions too.
    modules = make_torch_modules(problem)
    images = torch.from_numpy(problem.images).permute(0, 1, 4, 2, 3).contiguous().to(device)
    labels = torch.from_numpy(problem.labels).to(device)

    codes: dict[str, dict[str, bool]] = {"torch": {}, "torch channels-last": {"channels_last": True}}
    if compiled:
        codes["torch compiled"] = {"channels_last": True, "compiled": True}

    def make_run(cycle: int | None, options: dict[str, bool]) -> Callable[[], None]:
        source, target, adapter = (copy.deepcopy(module).to(device) for module in modules)
        training = torch_pair.JointTraining(source, target, adapter, problem.torch_route, cycle=cycle, **options)

        def run() -> None:
            for batch in zip(images, labels, strict=True):
                training.step(*batch)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return [
        Row(name, code, make_run(cycle, options)) for name, cycle in _CYCLES.items() for code, options in codes.items()
    ]


def check_torch() -> None:
    """Raises ValueError unless PyTorch is there and runs where JAX does."""
    if importlib.util.find_spec("torch") is None:
        raise ValueError('PyTorch is not installed: pip install -e ".[bench]"')
    import torch  # pyright: ignore[reportMissingImports]

    backend = jax.default_backend()
    if backend != "cpu" and not (backend == "gpu" and torch.cuda.is_available()):
        raise ValueError(f"JAX runs on a {backend}, where this PyTorch cannot; set JAX_PLATFORMS=cpu")


def main() -> None:
    """Runs the benchmark."""
    config = parse_config(PRESETS, "benchmarks.against_torch", __doc__, Config.check)
    try:
        check_torch()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    on_gpu = jax.default_backend() == "gpu"
    with Console().status("compiling"):
        problem = make_problem(config)
        rows = make_our_rows(problem, config.steps)
        rows += make_torch_rows(problem, compiled=on_gpu if config.compiled is None else config.compiled)
    rows.sort(key=lambda row: list(_CYCLES).index(row.step))  # Rows of one step are neighbours, ours first.
    for row in rows:  # The first steps allocate what the later ones reuse, and torch.compile works in them.
        row.run()
    for _ in tqdm(range(config.repetitions), unit="repetition"):
        for row in rows:
            time.sleep(_PAUSE_SECONDS)  # The threads of the row before go on spinning for some milliseconds.
            start = time.perf_counter()
            row.run()
            row.seconds.append((time.perf_counter() - start) / config.steps)
    _report(config, rows)


def _report(config: Config, rows: list[Row]) -> None:
    lines, figures = [], []
    ours = {row.step: row.seconds for row in rows if row.code == _OURS}
    for row in rows:
        milliseconds = 1000 * statistics.median(row.seconds)
        ratio = statistics.median(a / b for a, b in zip(row.seconds, ours[row.step], strict=True))
        least, most = 1000 * min(row.seconds), 1000 * max(row.seconds)
        lines.append((row.step, row.code, f"{milliseconds:.1f}", f"{least:.1f}-{most:.1f}", f"{ratio:.2f}"))
        figures.append(
            {
                "step": row.step,
                "code": row.code,
                "milliseconds": milliseconds,
                "ratio": ratio,
                "seconds": row.seconds,
            }
        )
    notes = (
        f"medians of {config.repetitions} repetitions of {config.steps} steps; the ratio says how many times faster "
        f"ours is\ntorch {importlib.metadata.version('torch')}"
    )
    title = f"against torch {config.nets} batch {config.batch_size}"
    report(title, config, ("step", "code", "ms/step", "range", "torch / ours"), lines, figures, notes)


if __name__ == "__main__":
    main()
