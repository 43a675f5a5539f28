"""Plans a 7B to 1B pair from shapes alone: memory per device of a joint step, and communication.

    python -m benchmarks.plan_pair                        # sizes for 8, 64 and 512 devices; nothing is compiled
    python -m benchmarks.plan_pair traffic                # compiled for 8 virtual devices, and its collectives counted
    python -m benchmarks.plan_pair traffic --devices 64 --batch-size 64
    python -m benchmarks.plan_pair traffic --devices 512 --batch-size 512 --routings one --layers 2

The source has the shapes of Llama 2 7B and is frozen, the target those of Llama 3.2 1B; the target and the adapter
train with AdamW. Routes connect all attention and feed-forward kernels, at proportional depth, by an LPKA at rank 64:
`own` has one adapter per route, `shared` one per shape, `one` only the last `up` kernel. Numbers are float32. No array
is allocated: shapes come from `jax.eval_shape`, placements from `mj.jit_layout(..., sharded=True)`.

`replicated` is what every device holds whole, since no axis is divisible by the number of devices or the leaf is small.
`gathered` is what a device receives in a step if every sharded trainable leaf is gathered twice, forward and backward,
and every gradient is reduced to its shards: `3 (n - 1) / n` of target and adapter, and once the source's routed leaves.
A compiler may need less or more; `traffic` counts this in its program: the bytes that a device receives with the usual
ring algorithms, with loops counted as often as they run.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh

import merge_jax as mj
from benchmarks.collectives import received_bytes
from benchmarks.memory import bytes_of
from benchmarks.report import parse_config, report
from merge_jax.checks import check_at_least_one
from merge_jax.training.sharding import DATA_AXIS, state_shardings
from merge_jax.types import Batch

__all__ = ["Decoder", "Plan", "bytes_on_a_device", "llama", "main", "make_tasks", "make_transfer", "plan_state"]

Routing = Literal["own", "shared", "one"]

_GIB = 2**30
_KERNELS = ("query", "key", "value", "out", "gate", "up", "down")


class Decoder(NamedTuple):
    """Sizes of a decoder of Llama's kind."""

    vocabulary: int
    width: int
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    tied: bool

    def shapes(self) -> dict[str, Any]:
        """Returns the shapes of its parameters, float32, kernels as `[in, out]`."""

        def leaf(*sizes: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, jnp.float32)

        width, kv = self.width, self.width // self.num_heads * self.num_kv_heads
        kernels = {
            **{"query": (width, width), "key": (width, kv), "value": (width, kv), "out": (width, width)},
            **{"gate": (width, self.hidden), "up": (width, self.hidden), "down": (self.hidden, width)},
        }
        layer = {name: {"kernel": leaf(*sizes)} for name, sizes in kernels.items()}
        layer |= {name: {"scale": leaf(width)} for name in ("norm1", "norm2")}
        tree: dict[str, Any] = {f"layer_{i}": layer for i in range(self.num_layers)}
        tree |= {"embedding": leaf(self.vocabulary, width), "norm": {"scale": leaf(width)}}
        return tree if self.tied else {**tree, "head": {"kernel": leaf(width, self.vocabulary)}}


LARGE = Decoder(32000, 4096, 32, 11008, 32, 32, False)
SMALL = Decoder(128256, 2048, 16, 8192, 32, 8, True)


def llama(sizes: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns logits `[B, L, vocabulary]` of tokens `[B, L]`: a decoder of Llama's kind, but for rotary positions."""
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * scale[None, None]

    def heads(x: jax.Array, layer: Any, name: str, count: int) -> jax.Array:
        x = (x @ layer[name]["kernel"]).reshape(*x.shape[:2], count, -1)
        return jnp.repeat(x, sizes.num_heads // count, axis=2)

    x = params["embedding"][tokens]
    for i in range(sizes.num_layers):
        layer = params[f"layer_{i}"]
        y = norm(x, layer["norm1"]["scale"])
        query = heads(y, layer, "query", sizes.num_heads)
        key, value = (heads(y, layer, name, sizes.num_kv_heads) for name in ("key", "value"))
        scores = jnp.einsum("blhd,bmhd->bhlm", query, key) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        x += jnp.einsum("bhlm,bmhd->blhd", weights, value).reshape(x.shape) @ layer["out"]["kernel"]
        y = norm(x, layer["norm2"]["scale"])
        x += (jax.nn.silu(y @ layer["gate"]["kernel"]) * (y @ layer["up"]["kernel"])) @ layer["down"]["kernel"]
    x = norm(x, params["norm"]["scale"])
    return x @ (params["embedding"].T if sizes.tied else params["head"]["kernel"])


def make_tasks(target: Decoder) -> tuple[None, mj.Task]:
    """Returns the tasks of a frozen source and of a target that predicts the next token."""

    def loss(params: Any, state: Any, batch: Batch, key: jax.Array | None) -> Any:
        del key
        logits = llama(target, params, batch["tokens"])
        return mj.cross_entropy(logits[:, :-1], batch["tokens"][:, 1:]).mean(), (state, {})

    return None, mj.Task(loss, optax.adamw(1e-4))


def make_transfer(source: Decoder, target: Decoder, routing: Routing, rank: int) -> mj.Transfer:
    """Returns the LPKA between the kernels of both."""
    if routing == "one":
        last = f"layer_{target.num_layers - 1}/up/kernel", f"layer_{source.num_layers - 1}/up/kernel"
        return mj.lpka_transfer(dict([last]), rank=rank)
    routes: dict[str, str] = {}
    for name in _KERNELS:
        one = f"layer_*/{name}/kernel"
        routes |= mj.match(source.shapes(), target.shapes(), source=one, target=one)
    return mj.lpka_transfer(routes, rank=rank, shared=routing == "shared")


class Plan(NamedTuple):
    """The state of a joint step, as shapes, and its routes."""

    state: mj.JointState
    tasks: tuple[None, mj.Task]
    transfer: mj.Transfer


def plan_state(source: Decoder, target: Decoder, routing: Routing, rank: int) -> Plan:
    """Returns the state before the first step, as shapes."""
    tasks, transfer = make_tasks(target), make_transfer(source, target, routing, rank)

    def init(key: jax.Array, source: Any, target: Any) -> mj.JointState:
        return mj.init_joint_state(key, *tasks, transfer, source_params=source, target_params=target)

    state = jax.eval_shape(init, jax.random.key(0), source.shapes(), target.shapes())
    return Plan(state, tasks, transfer)


class Held(NamedTuple):
    """Bytes that one of several devices holds, and what of them every device holds whole, with the largest leaf."""

    total: int
    replicated: int
    largest: str


def bytes_on_a_device(tree: Any, num_devices: int) -> Held:
    """Returns what one of several devices holds of a tree whose large leaves are split."""
    mesh = AbstractMesh((num_devices,), (DATA_AXIS,))
    total, whole = 0, {}
    shardings = jax.tree.leaves(state_shardings(tree, mesh, sharded=True))  # pyright: ignore[reportArgumentType]
    for (path, leaf), sharding in zip(mj.flatten(tree).items(), shardings, strict=True):
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total += size
        if sharding.is_fully_replicated:
            whole[path] = size
    return Held(total, sum(whole.values()), max(whole, key=lambda path: whole[path], default=""))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    routings: tuple[Routing, ...] = ("one", "shared", "own")
    """Which kernels take part, and whether those of one shape share an adapter."""
    devices: tuple[int, ...] = (8, 64, 512)
    """Numbers of devices."""
    rank: int = 64
    """Rank at which the LPKA sees matrices."""
    compile: bool = False
    """Compile the step for so many virtual devices of a CPU, and count its collectives."""
    batch_size: int = 8
    """Texts in a batch, over all devices, where it is compiled."""
    length: int = 128
    """Tokens of a text, where it is compiled."""
    layers: int = SMALL.num_layers
    """Layers of the target; the source has twice as many."""

    def pair(self) -> tuple[Decoder, Decoder]:
        """Returns the sizes of source and target."""
        return LARGE._replace(num_layers=2 * self.layers), SMALL._replace(num_layers=self.layers)

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        check_at_least_one(rank=self.rank, batch_size=self.batch_size, length=self.length, layers=self.layers)
        if not self.routings or not self.devices or min(self.devices) < 1:
            raise ValueError(f"routings and devices must be named, devices be at least 1, got {self}")
        if self.compile and any(self.batch_size % number for number in self.devices):
            raise ValueError(f"batch_size {self.batch_size} does not divide among {self.devices} devices")


def _sizes(config: Config, plans: Mapping[Routing, Plan]) -> None:
    rows, figures = [], []
    source, target = config.pair()
    for routing, plan in plans.items():
        parts = {role: getattr(plan.state, role) for role in ("source", "target", "adapter")}
        learned = bytes_of((parts["target"].params, parts["adapter"].params))
        routed = {row.source: row for row in plan.transfer.describe(source.shapes(), target.shapes())}
        given = sum(math.prod(row.source_matrix) * 4 for row in routed.values())
        for number in config.devices:
            held = {role: bytes_on_a_device(part, number) for role, part in parts.items()}
            total, whole = (sum(getattr(one, name) for one in held.values()) for name in ("total", "replicated"))
            gathered = (number - 1) / number * (3 * learned + given)
            cells = [f"{one.total / _GIB:.3f}" for one in held.values()]
            largest = max(held.values(), key=lambda one: one.replicated).largest
            rows.append(
                (routing, str(number), *cells, f"{total / _GIB:.3f}", f"{whole / 2**20:.1f}", f"{gathered / _GIB:.1f}")
            )
            figures.append(
                {
                    **{"routing": routing, "devices": number, "bytes": total, "replicated": whole, "largest": largest},
                    **{"gathered": gathered, "parameters": {role: _count(part) for role, part in parts.items()}},
                    "moments": {role: bytes_of(getattr(part, "opt_state", ())) for role, part in parts.items()},
                }
            )
    columns = ("routes", "devices", "source", "target", "adapter", "in all GiB", "replicated MiB", "gathered GiB")
    lines = [f"{one['routing']}: {one['parameters']}" for one in figures[:: len(config.devices)]]
    report("plan pair", config, columns, rows, figures, "GiB a device. Parameters: " + "; ".join(lines))


def _count(part: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(part.params))


def _traffic(config: Config, plans: Mapping[Routing, Plan]) -> None:
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.length), jnp.int32)
    rows, figures = [], []
    for routing, plan in plans.items():
        step = mj.make_epoch(mj.make_joint_step(*plan.tasks, plan.transfer, cycle=1))
        indices = {"target": jax.ShapeDtypeStruct((1, config.batch_size), jnp.int32)}
        for number in config.devices:
            lowered = mj.jit_layout(mj.data_mesh(number), sharded=True).lower(
                step, plan.state, {"target": {"tokens": tokens}}, indices, jax.ShapeDtypeStruct((), jnp.int32)
            )
            compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
            memory, received = compiled.memory_analysis(), received_bytes(compiled.as_text() or "", number)
            assert memory is not None
            sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, sum(received.values())
            by_kind = ", ".join(f"{kind} {size / _GIB:.2f}" for kind, size in sorted(received.items()))
            rows.append((routing, str(number), *(f"{size / _GIB:.2f}" for size in sizes), by_kind))
            figures.append(
                {
                    "routing": routing,
                    "devices": number,
                    "arguments": sizes[0],
                    "temporaries": sizes[1],
                    "received": received,
                }
            )
    columns = ("routes", "devices", "arguments GiB", "temporaries GiB", "received GiB", "of it")
    notes = f"a device; batch {config.batch_size} x {config.length} tokens"
    report("plan pair traffic", config, columns, rows, figures, notes)


def main() -> None:
    """Runs the benchmark."""
    presets = {"default": Config(), "traffic": Config(compile=True, routings=("one", "shared"), devices=(8,))}
    config = parse_config(presets, "benchmarks.plan_pair", __doc__, Config.check)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(config.devices) if config.compile else 1)
    plans: dict[Routing, Plan] = {one: plan_state(*config.pair(), one, config.rank) for one in config.routings}
    (_traffic if config.compile else _sizes)(config, plans)


if __name__ == "__main__":
    main()
