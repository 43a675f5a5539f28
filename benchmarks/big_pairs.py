"""Compiles and runs one step of large pairs: process memory, CPU seconds and bytes per device.

    python -m benchmarks.big_pairs                          # each pair and method on one device, compiled and run
    python -m benchmarks.big_pairs devices                  # over 1, 2, 4 and 8 virtual devices, compiled
    python -m benchmarks.big_pairs --pairs resnet --methods refit

`bert` is BERT base to DistilBERT base, `resnet` a ResNet50 to a MobileNetV2, both of full size. Routes connect all
layers with a counterpart. The LPKA at rank 64 covers all kernels. `aligned` and `refit` also cover norms and biases,
but not the MobileNetV2's depthwise kernels, whose layout a ResNet lacks. A step of `lpka` and `aligned` is a joint step
that transfers: source and target each train on a batch, the adapter on its write. `refit` runs once on a few unlabelled
batches, as one program. Weights are random. Each row runs in a separate process, one after the other.

Arguments, temporaries and outputs are XLA's plan for one device. The peak is the process's highest resident memory,
including Python and XLA's compiler; CPU seconds cover all threads.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import merge_jax as mj
from benchmarks.apart import measure_apart
from benchmarks.memory import bytes_of, give_back, peak_bytes
from benchmarks.report import parse_config, report
from merge_jax.checks import check_at_least_one
from merge_jax.models import TextClassifier, bert_base, distilbert_base
from merge_jax.training.sharding import DATA_AXIS

__all__ = ["Pair", "main", "make_pair", "measure", "transfer_of"]

PairName = Literal["bert", "resnet"]
Method = Literal["lpka", "aligned", "refit"]

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    pairs: tuple[PairName, ...] = ("bert", "resnet")
    """The pairs of models."""
    methods: tuple[Method, ...] = ("lpka", "aligned", "refit")
    """What moves parameters."""
    devices: tuple[int, ...] = (1,)
    """Numbers of devices; with more than one, steps are compiled and not run."""
    batch_size: int = 4
    """Examples in a batch, over all devices."""
    rank: int = 64
    """Rank at which the LPKA sees matrices."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        check_at_least_one(batch_size=self.batch_size, rank=self.rank)
        if not self.pairs or not self.methods or not self.devices or min(self.devices) < 1:
            raise ValueError(f"pairs, methods and devices must be named, devices be at least 1, got {self}")
        if any(self.batch_size % number for number in self.devices):
            raise ValueError(f"devices must divide the batch of {self.batch_size}, got {self.devices}")


class Pair(NamedTuple):
    """Two models of one kind of input.

    Attributes:
      source: the model that gives.
      target: the model that takes.
      entry: name of the input in a batch.
      example: shape and dtype of the input of one example.
      aligned_routes: between the leaves of both, of what can be aligned.
      kernel_routes: between the kernels of both.
      lpka: options of the LPKA that make its adapter small enough to learn in 8 GiB; as it is by default, it has
        503 million parameters for `bert` and 435 million for `resnet`.
    """

    source: nn.Module
    target: nn.Module
    entry: str
    example: jax.ShapeDtypeStruct
    aligned_routes: Mapping[str, str]
    kernel_routes: Mapping[str, str]
    lpka: Mapping[str, Any]

    def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch."""
        example, label = self.example, jax.ShapeDtypeStruct((size,), jnp.int32)
        return {self.entry: jax.ShapeDtypeStruct((size, *example.shape), example.dtype), "label": label}


def variables_of(model: nn.Module, example: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Returns the shapes of a model's variables."""
    one = jax.ShapeDtypeStruct((1, *example.shape), example.dtype)
    made = jax.eval_shape(model.init, jax.random.key(0), one)
    return {name: tree for name, tree in made.items() if name in ("params", "batch_stats")}


def make_pair(name: PairName) -> Pair:
    """Returns a pair by its name."""
    if name == "bert":
        models = TextClassifier(bert_base(), 2), TextClassifier(distilbert_base(), 2, pooler="relu")
        entry, example = "tokens", jax.ShapeDtypeStruct((128,), jnp.int32)
    else:
        models = mj.models.resnet50(100), mj.models.mobilenet_v2(100)
        entry, example = "image", jax.ShapeDtypeStruct((32, 32, 3), jnp.float32)
    source, target = (variables_of(model, example)["params"] for model in models)

    def routes(pairs: Mapping[str, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for pattern, other in pairs.items():
            found |= mj.match(source, target, source=other, target=pattern, unmatched="skip")
        return found

    if name == "bert":
        kernels = routes({"encoder/**/kernel": "encoder/**/kernel"})
        aligned = routes({"encoder/**": "encoder/**"})
    else:
        layers = {"expand": "conv1", "project": "conv3"}
        norms = {"expand_norm": "norm1", "project_norm": "norm3"}
        ends = {"fc/kernel": "fc/kernel"}
        aligned = routes({f"**/{one}/kernel": f"**/{other}/kernel" for one, other in layers.items()} | ends)
        for leaf in ("scale", "bias"):
            aligned |= routes({f"**/{one}/{leaf}": f"**/{other}/{leaf}" for one, other in norms.items()})
        every = layers | {"depthwise": "conv2"}
        kernels = routes({f"**/{one}/kernel": f"**/{other}/kernel" for one, other in every.items()} | ends)
        kernels["head/kernel"] = "stage4_2/conv3/kernel"
    lpka = {"shared": True} if name == "bert" else {"num_layers": 1}
    return Pair(*models, entry, example, aligned, kernels, lpka)


def transfer_of(pair: Pair, method: Method, rank: int) -> mj.Transfer:
    """Returns the transfer of a method."""
    if method == "lpka":
        target = mj.flatten(variables_of(pair.target, pair.example)["params"])

        def whole(path: str) -> bool:
            rows = target[path].shape[-1]
            return min(rows, target[path].size // rows) < rank

        pairs = pair.kernel_routes.items()
        routes = [mj.Route(one, other, rank="whole" if whole(one) else rank) for one, other in pairs]
        return mj.lpka_transfer(routes, **pair.lpka)
    graphs = []
    for model in (pair.source, pair.target):
        shapes = variables_of(model, pair.example)
        inputs = jax.ShapeDtypeStruct((2, *pair.example.shape), pair.example.dtype)

        def apply(params: Any, x: jax.Array, model: nn.Module = model, shapes: Any = shapes) -> Any:
            state = {name: jax.tree.map(jnp.ones_like, tree) for name, tree in shapes.items() if name != "params"}
            return model.apply({"params": params, **state}, x)

        graphs.append(mj.channel_graph(apply, shapes["params"], inputs, strict=False))
    return mj.aligned_transfer(pair.aligned_routes, *graphs)


class Program(NamedTuple):
    """What is compiled, and the shapes of its arguments."""

    lowered: Any
    arguments: tuple[Any, ...]


def joint_step(pair: Pair, method: Method, num_devices: int, *, batch_size: int, rank: int) -> Program:
    """Returns the joint step of a pair, sharded over the first devices, from shapes alone."""
    transfer = transfer_of(pair, method, rank)
    loss = partial(mj.classification_loss, inputs=pair.entry)
    source, target = (mj.Task(loss(model.apply), optax.adamw(1e-4)) for model in (pair.source, pair.target))

    def init(key: jax.Array, variables: Mapping[str, Mapping[str, Any]]) -> mj.JointState:
        given = {f"{role}_params": one["params"] for role, one in variables.items()}
        for role, one in variables.items():
            given[f"{role}_state"] = {name: tree for name, tree in one.items() if name != "params"}
        return mj.init_joint_state(key, source, target, transfer, **given)

    shapes = {"source": variables_of(pair.source, pair.example), "target": variables_of(pair.target, pair.example)}
    state = jax.eval_shape(init, jax.random.key(0), shapes)
    step = mj.make_epoch(mj.make_joint_step(source, target, transfer, cycle=1))
    indices = jax.ShapeDtypeStruct((1, batch_size), jnp.int32)
    arguments = (
        state,
        dict.fromkeys(("source", "target"), pair.batch(batch_size)),
        dict.fromkeys(("source", "target"), indices),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    layout = mj.jit_layout(mj.data_mesh(num_devices), sharded=num_devices > 1)
    return Program(layout.lower(step, *arguments), arguments)


def refit_program(pair: Pair, num_devices: int, *, batch_size: int) -> Program:
    """Returns the refit of a pair from four batches, as one program; devices share the inputs."""
    several = num_devices > 1

    def fit(source: Any, target: Any, inputs: jax.Array) -> Any:
        models = pair.source.apply, pair.target.apply
        options = {"batch_size": batch_size // num_devices, "axis_name": DATA_AXIS if several else None}
        return mj.refit(pair.aligned_routes, *models, source, target, inputs, **options).variables

    shapes = [variables_of(model, pair.example) for model in (pair.source, pair.target)]
    inputs = pair.batch(4 * batch_size)[pair.entry]
    if several:
        split = PartitionSpec(), PartitionSpec(), PartitionSpec(DATA_AXIS)
        mesh = mj.data_mesh(num_devices)
        fit = jax.shard_map(fit, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False)
    return Program(jax.jit(fit).lower(*shapes, inputs), (*shapes, inputs))


def _draw(shapes: Any) -> Any:
    """Returns random arguments of these shapes; none is negative, since some are variances."""
    random = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(np.abs(random.standard_normal(leaf.shape, np.float32)) * np.float32(0.02), leaf.dtype)
        return jnp.ones(leaf.shape, leaf.dtype)

    return jax.tree.map(draw, shapes)


def measure(name: PairName, method: Method, devices: str, batch_size: str, rank: str) -> dict[str, Any]:
    """Returns the figures of one row, in a process that has compiled nothing before."""
    number, size = int(devices), int(batch_size)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    start = time.process_time()
    pair = make_pair(name)
    if method == "refit":
        program = refit_program(pair, number, batch_size=size)
    else:
        program = joint_step(pair, method, number, batch_size=size, rank=int(rank))
    traced = time.process_time()
    # Without LLVM's optimisations: they take long, and the plan of the memory is made before them.
    compiled = program.lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
    memory = compiled.memory_analysis()
    found = {f"{kind} MiB": getattr(memory, f"{kind}_size_in_bytes") / _MIB for kind in ("argument", "temp", "output")}
    found |= {"trace CPU s": traced - start, "compile CPU s": time.process_time() - traced}
    found["compile peak MiB"] = peak_bytes() / _MIB
    if method != "refit":
        state = program.arguments[0]
        parts = {role: getattr(state, role) for role in ("source", "target", "adapter")}
        found["state MiB"] = {role: bytes_of(part) / _MIB for role, part in parts.items()}
        found["adapter parameters"] = sum(leaf.size for leaf in jax.tree.leaves(state.adapter.params))
    if number == 1:
        arguments = _draw(program.arguments)
        del program
        give_back()
        begin = time.process_time()
        made = jax.block_until_ready(compiled(*arguments))
        found |= {"run CPU s": time.process_time() - begin, "peak MiB": peak_bytes() / _MIB}
        leaves = [leaf for leaf in jax.tree.leaves(made) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        found["finite"] = bool(all(jnp.all(jnp.isfinite(leaf)) for leaf in leaves))
    return found


def main() -> None:
    """Runs the benchmark."""
    presets = {"default": Config(), "devices": Config(devices=(1, 2, 4, 8), batch_size=8)}
    config = parse_config(presets, "benchmarks.big_pairs", __doc__, Config.check)
    kinds = ("argument MiB", "temp MiB", "output MiB", "trace CPU s", "compile CPU s", "run CPU s", "peak MiB")
    rows, figures = [], []
    for name in config.pairs:
        for method in config.methods:
            for number in config.devices:
                words = [name, method, str(number), str(config.batch_size), str(config.rank)]
                found = measure_apart("benchmarks.big_pairs", *words)
                cells = [f"{found[kind]:,.0f}" if kind in found else "" for kind in kinds]
                rows.append((name, method, str(number), *cells))
                figures.append({"pair": name, "method": method, "devices": number, **found})
                print(json.dumps(figures[-1]), flush=True)
    report("big pairs", config, ("pair", "method", "devices", *kinds), rows, figures, f"batch {config.batch_size}")


if __name__ == "__main__":
    main()
