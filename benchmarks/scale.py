"""Memory per device of a sharded joint step, compiled for 1, 2, 4 and 8 virtual devices but not run.

    python -m benchmarks.scale       # both pairs, one after the other
    python -m benchmarks.scale bert  # BERT base to DistilBERT base, both learning
    python -m benchmarks.scale llm   # a 7B to a 1B model at a sixteenth of their widths, the source frozen

Everything uses shapes, so no model is created. Arguments and outputs are the state and the batch, temporaries are XLA's
planned memory besides them; the state is donated, so outputs need no extra memory. The batch is the same for any number
of devices. Every step transfers, since such steps need the most.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.stages import Compiled
from tqdm.auto import tqdm

import merge_jax as mj
from benchmarks.memory import bytes_of
from benchmarks.report import parse_config, report
from merge_jax.checks import check_at_least_one
from merge_jax.models import TextClassifier, TextEncoder, bert_base, distilbert_base
from merge_jax.objectives.losses import model_loss
from merge_jax.types import Batch, LossFn, ModelApply

__all__ = ["LanguageModel", "Pair", "compile_step", "make_pair", "next_token_loss"]

PairName = Literal["bert", "llm"]

_MEBIBYTE = 2**20
_NARROWER = 16  # What the widths of `llm` are divided by.


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    pairs: tuple[PairName, ...] = ("bert", "llm")
    """The pairs of models."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices; ratios are to the first."""
    batch_size: int = 8
    """Texts in a batch, over all devices."""
    length: int = 128
    """Tokens of a text."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        check_at_least_one(batch_size=self.batch_size, length=self.length)
        if not self.pairs or not self.devices or min(self.devices) < 1:
            raise ValueError(f"pairs and devices must be named, devices be at least 1, got {self}")
        for number in self.devices:
            if self.batch_size % number:
                raise ValueError(f"batch_size {self.batch_size} does not divide among {number} devices")


class LanguageModel(nn.Module):
    """Logits of each position over the vocabulary, tokens `[B, L]` to `[B, L, vocabulary]`: `encoder(x) E^T`.

    `E` is the embedding of the tokens. No mask hides later tokens and no gate is in the feed-forward blocks, so it is
    no decoder to use; what it takes of memory is like one's.

    Attributes:
      encoder: the layers; its leaves are below `encoder`.
    """

    encoder: TextEncoder

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps tokens `[B, L]` to logits `[B, L, vocabulary]`."""
        x = self.encoder(tokens, train=train)
        return x @ self.encoder.variables["params"]["embeddings"]["word"]["embedding"].T


def next_token_loss(apply_fn: ModelApply) -> LossFn:
    """Returns the cross entropy of each token given those before it, in nats, the mean over tokens and texts."""

    def per_example(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return mj.cross_entropy(logits[:, :-1], batch["tokens"][:, 1:]).mean(axis=-1), {}

    return model_loss(apply_fn, ("tokens",), per_example)


class Pair(NamedTuple):
    """Two models of text, what they learn, and the transfer between them.

    Attributes:
      source: maps tokens `[B, L]`.
      target: maps tokens `[B, L]`.
      loss: `model.apply -> loss function`, of batches `{"tokens": [B, L], "label": [B]}`.
      frozen: whether the source does not learn.
      transfer: the transfer.
    """

    source: nn.Module
    target: nn.Module
    loss: Callable[[ModelApply], LossFn]
    frozen: bool
    transfer: mj.Transfer

    @property
    def tasks(self) -> tuple[mj.Task | None, mj.Task]:
        """The source's and the target's task."""
        source, target = (mj.Task(self.loss(one.apply), optax.adamw(1e-4)) for one in (self.source, self.target))
        return None if self.frozen else source, target

    def init(self, key: jax.Array, tokens: jax.Array) -> mj.JointState:
        """Returns the state before the first step; under `jax.eval_shape` nothing is made."""
        keys = jax.random.split(key, 3)
        source, target = (
            one.init(key, tokens)["params"] for one, key in zip((self.source, self.target), keys[:2], strict=True)
        )
        return mj.init_joint_state(keys[2], *self.tasks, self.transfer, source_params=source, target_params=target)


def make_pair(name: PairName, length: int) -> Pair:
    """Returns a pair by its name, for texts of that many tokens. One route: the last `up` kernel of both models."""
    if name == "bert":
        source, target = TextClassifier(bert_base(), 2), TextClassifier(distilbert_base(), 2, pooler="relu")
        routes = {"encoder/layer_5/up/kernel": "encoder/layer_11/up/kernel"}
        loss = partial(mj.classification_loss, inputs="tokens")
        return Pair(source, target, loss, False, mj.lpka_transfer(routes))
    options: Mapping[str, Any] = {"num_heads": 32, "max_length": length, "num_segments": 0, "dropout_rate": 0.0}
    large = TextEncoder(32000, 4096 // _NARROWER, 32, hidden=11008 // _NARROWER, **options)
    small = TextEncoder(128256, 2048 // _NARROWER, 16, hidden=8192 // _NARROWER, **options)
    routes = {"encoder/layer_15/up/kernel": "encoder/layer_31/up/kernel"}
    return Pair(LanguageModel(large), LanguageModel(small), next_token_loss, True, mj.lpka_transfer(routes))


class Step(NamedTuple):
    """A compiled joint step, and the shapes of the state that it maps."""

    compiled: Compiled
    state: mj.JointState


def compile_step(pair: Pair, num_devices: int, *, batch_size: int, length: int) -> Step:
    """Returns the sharded joint step of a pair on the first devices, made from shapes alone."""
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    batch = {"tokens": tokens, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    state = jax.eval_shape(pair.init, jax.random.key(0), tokens)
    roles = ("target",) if pair.frozen else ("source", "target")
    lowered = mj.jit_layout(mj.data_mesh(num_devices), sharded=True).lower(
        mj.make_epoch(mj.make_joint_step(*pair.tasks, pair.transfer, cycle=1)),
        state,
        dict.fromkeys(roles, batch),
        dict.fromkeys(roles, jax.ShapeDtypeStruct((1, batch_size), jnp.int32)),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    # Without LLVM's optimisations: they take time, and the plan of the memory is made before them.
    return Step(lowered.compile(compiler_options={"xla_backend_optimization_level": "0"}), state)


def main() -> None:
    """Runs the benchmark."""
    presets = {"default": Config(), **{name: Config(pairs=(name,)) for name in get_args(PairName)}}
    config = parse_config(presets, "benchmarks.scale", __doc__, Config.check)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(config.devices))
    rows, figures, sizes = [], [], []
    progress = tqdm(total=len(config.pairs) * len(config.devices), unit="program")
    for name in config.pairs:
        pair = make_pair(name, config.length)
        first: dict[str, float] = {}
        parts: dict[str, float] = {}
        for number in config.devices:
            start = time.perf_counter()
            step, state = compile_step(pair, number, batch_size=config.batch_size, length=config.length)
            seconds = time.perf_counter() - start
            memory = step.memory_analysis()
            kinds = ("argument", "temp", "output")
            mebibytes = {kind: getattr(memory, f"{kind}_size_in_bytes") / _MEBIBYTE for kind in kinds}
            first = first or mebibytes
            cells = [f"{mebibytes[kind]:.1f}" for kind in kinds]
            ratios = [f"{mebibytes[kind] / first[kind]:.3f}" for kind in ("argument", "temp")]
            rows.append((name, str(number), cells[0], ratios[0], cells[1], ratios[1], cells[2], f"{seconds:.0f}"))
            figures.append({"pair": name, "devices": number, "mebibytes": mebibytes, "compile_seconds": seconds})
            parts = {role: bytes_of(getattr(state, role)) / _MEBIBYTE for role in ("source", "target", "adapter")}
            progress.update()
        sizes.append(f"{name}: " + ", ".join(f"{role} {size:.0f} MiB" for role, size in parts.items()))
    progress.close()
    columns = ("pair", "devices", "arguments MiB", "ratio", "temporaries MiB", "ratio", "outputs MiB", "compile s")
    notes = f"MiB a device; batch {config.batch_size} x {config.length} tokens. State: {'; '.join(sizes)}"
    report("scale", config, columns, rows, figures, notes)


if __name__ == "__main__":
    main()
