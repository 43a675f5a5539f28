"""Compares the refit of a target from unlabelled inputs with one epoch of plain training on them.

    python -m benchmarks.refit                # ResNet50 from ResNet50, 2,000 images of 32x32 pixels
    python -m benchmarks.refit --nets small   # two small networks, in half a minute
    python -m benchmarks.refit --nets efficientnet_lite0   # EfficientNet-lite0 to its half, 64x64 pixels
    python -m benchmarks.refit --nets minilm --inputs 1000  # MiniLM to its half, texts of 32 tokens

Both are timed after compilation. Memory is XLA's plan for each program, including its arguments: the weights and all
inputs.
"""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import merge_jax as mj
from benchmarks.report import parse_config, report

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    nets: Literal["resnet50", "efficientnet_lite0", "minilm", "small"] = "resnet50"
    """ResNet50 to ResNet50, or an EfficientNet-lite0, a MiniLM or a small ResNet to one of half its width."""
    inputs: int = 2000
    """Images or texts that are refitted on, and that make the epoch."""
    batch_size: int = 128
    """Examples in a batch of the training."""
    refit_batch_size: int = 250
    """Inputs in a batch of the refit."""
    repetitions: int = 1
    """Times that each is run, in turns."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        if min(self.inputs, self.batch_size, self.refit_batch_size, self.repetitions) < 1:
            raise ValueError("every option must be at least 1")


class Pair(NamedTuple):
    """A source, a target of its family, and unlabelled inputs of both."""

    source: nn.Module
    target: nn.Module
    inputs: jax.Array
    kind: str
    num_classes: int
    routes: dict[str, str]


def make_pair(config: Config) -> Pair:
    """Returns the networks of a choice, and random inputs."""
    random, routes = np.random.default_rng(0), {"**": "**"}
    if config.nets == "minilm":
        encoders = mj.models.minilm(), mj.models.minilm_half()
        tokens = random.integers(1000, encoders[0].vocab_size, (config.inputs, 32))
        routes = {f"encoder/layer_{i}/**": f"encoder/layer_{j}/**" for i, j in ((0, 0), (1, 2), (2, 5))}
        routes |= {"encoder/embeddings/**": "encoder/embeddings/**", "classifier/*": "classifier/*"}
        source, target = (mj.models.TextClassifier(encoder, 4, pooler="mean") for encoder in encoders)
        return Pair(source, target, jnp.asarray(tokens, jnp.int32), "tokens", 4, routes)
    if config.nets == "resnet50":
        source, target, pixels = mj.models.resnet50(100), mj.models.resnet50(100), 32
    elif config.nets == "efficientnet_lite0":
        source, target, pixels = mj.models.efficientnet_lite(100), mj.models.efficientnet_lite(100, 0.5), 64
    else:
        source, target, pixels = mj.models.small_resnet(10), mj.models.small_resnet(10, width=0.5), 8
    images = random.standard_normal((config.inputs, pixels, pixels, 3), np.float32)
    return Pair(source, target, jnp.asarray(images), "image", source.num_classes, routes)


def make_programs(config: Config) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns both programs by name, compiled, each with its arguments."""
    source, target, inputs, kind, num_classes, routes = make_pair(config)
    labels = jnp.asarray(np.random.default_rng(1).integers(0, num_classes, config.inputs), jnp.int32)
    variables = []
    for seed, model in enumerate((source, target)):
        made = jax.jit(model.init)(jax.random.key(seed), inputs[:1])
        variables.append({name: made[name] for name in ("params", "batch_stats") if name in made})

    def fit(source_variables: Any, target_variables: Any, inputs: jax.Array) -> Any:
        made = mj.refit(
            routes,
            source.apply,
            target.apply,
            source_variables,
            target_variables,
            inputs,
            batch_size=config.refit_batch_size,
        )
        return made.variables

    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    loss_fn = mj.classification_loss(target.apply, inputs=kind)
    steps = math.ceil(config.inputs / config.batch_size)

    def epoch(variables: Any, opt_state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
        def step(i: jax.Array, state: Any) -> Any:
            params, model_state, opt_state = state
            rows = (i * config.batch_size + jnp.arange(config.batch_size)) % config.inputs
            batch = {kind: inputs[rows], "label": labels[rows]}
            grads, (model_state, _) = jax.grad(loss_fn, has_aux=True)(params, model_state, batch, jax.random.key(0))
            updates, opt_state = sgd.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), model_state, opt_state

        model_state = {name: value for name, value in variables.items() if name != "params"}
        return lax.fori_loop(0, steps, step, (variables["params"], model_state, opt_state))

    arguments = {
        "one epoch of training": (epoch, (variables[1], sgd.init(variables[1]["params"]), inputs, labels)),
        "refit": (fit, (*variables, inputs)),
    }
    return {name: (jax.jit(fn).lower(*args).compile(), args) for name, (fn, args) in arguments.items()}


def main() -> None:
    """Runs the benchmark."""
    config = parse_config({"default": Config()}, "benchmarks.refit", __doc__, Config.check)
    start = time.perf_counter()
    programs = make_programs(config)
    compiled = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(config.repetitions):
        for name, (program, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[name].append(time.perf_counter() - start)
    rows, figures = [], {}
    plain = "one epoch of training"
    memory = {}
    for name, (program, _) in programs.items():
        sizes = program.memory_analysis()
        memory[name] = (sizes.temp_size_in_bytes + sizes.argument_size_in_bytes) / _MIB
    for name, taken in seconds.items():
        pairs = zip(taken, seconds[plain], strict=True)
        ratio, of_memory = statistics.median(one / other for one, other in pairs), memory[name] / memory[plain]
        median = statistics.median(taken)
        rows.append((name, f"{median:.1f}", f"{ratio:.2f}", f"{memory[name]:.0f}", f"{of_memory:.2f}"))
        figures[name] = {"seconds": median, "ratio": ratio, "MiB": memory[name], "memory_ratio": of_memory}
    notes = f"{config.inputs} inputs; medians of {config.repetitions}; both compiled in {compiled:.0f} s"
    report("refit", config, ("program", "s", "of the epoch", "MiB", "of its memory"), rows, figures, notes)


if __name__ == "__main__":
    main()
