"""Memory of transfers from sharded safetensors: a source streamed leaf by leaf, or loaded.

    python -m benchmarks.stream_source                              # to DistilBERT base from 12, 24, 48 layers
    python -m benchmarks.stream_source --layers 12 --methods refit  # of BERT base's widths, random weights
    python -m benchmarks.stream_source --size half --layers 12 --methods fitted refit  # to a target of half the width
    python -m benchmarks.stream_source --layers 4 8 --size small

`streamed` passes the transfer the leaves mapped by `mj.load_weights`; `loaded` first copies all leaves to the device.
Each runs in a separate process. Memory is the process's peak anonymous memory (Linux's RssAnon, sampled every 5 ms)
beyond that with only the target loaded. It includes the compiler's memory. It excludes pages of the mapped file, which
the system can reclaim, and freed memory that the C library keeps. `programs` is the part of it that still stands
afterwards beside the new target: compiled programs, and what JAX keeps of their traces. `bound` is the new target, and
the largest layer's inputs and outputs: its leaf of the source, the old and the new target, and for methods that compute
the source, its activations on all inputs and their moments.
"""

import argparse
import functools
import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import merge_jax as mj
from benchmarks.apart import measure_apart
from benchmarks.memory import bytes_of, give_back, memory_now, trim
from merge_jax.models import TextEncoder

__all__ = ["main", "measure"]

_METHODS, _WAYS = ("copies", "aligned", "fitted", "refit"), ("streamed", "loaded")
_BASE, _SMALL = (30522, 768, 12, 3072, 512), (2000, 128, 4, 512, 64)
_SIZES = {"base": (_BASE, _BASE, 6), "half": (_BASE, (30522, 384, 6, 1536, 512), 6), "small": (_SMALL, _SMALL, 2)}
"""Sizes of the source and of the target, and the target's layers."""
_SHARD_LAYERS, _TOKENS = 4, 32
_MIB = 2**20


def _encoder(sizes: tuple[int, ...], num_layers: int) -> TextEncoder:
    words, width, heads, hidden, length = sizes
    return TextEncoder(words, width, num_layers, heads, hidden, length, num_segments=0)


def _shapes(encoder: TextEncoder) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(encoder.init, jax.random.key(0), tokens)["params"]


def _draw(shapes: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32) * np.float32(0.02), shapes)


def write_source(folder: Path, size: str, num_layers: int) -> None:
    """Writes random weights to shards of a few layers each, and their index."""
    weight_map, names = {}, {}
    for path in mj.flatten(shapes := _shapes(_encoder(_SIZES[size][0], num_layers))):
        layer = path.split("/")[0].removeprefix("layer_")
        shard = f"{int(layer) // _SHARD_LAYERS:04}.safetensors" if layer.isdigit() else "embeddings.safetensors"
        names.setdefault(shard, []).append(path)
    for number, (shard, paths) in enumerate(names.items()):
        some = {path: mj.flatten(shapes)[path] for path in paths}
        save_file({path.replace("/", "."): leaf for path, leaf in _draw(some, number).items()}, folder / shard)
        weight_map |= {path.replace("/", "."): shard for path in paths}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


class _Peak:
    """The most memory of its own that this process has while it is entered, in bytes; on Linux alone."""

    def __enter__(self) -> "_Peak":
        self._done, self.bytes = threading.Event(), 0
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            trim()
            self.bytes = max(self.bytes, memory_now("RssAnon"))


def measure(folder: str, size: str, layers: str, method: str, way: str, batch: str) -> dict[str, float]:
    """Returns memory and CPU seconds of a transfer from a folder, with the sizes to compare them with, in bytes."""
    source_sizes, target_sizes, target_layers = _SIZES[size]
    source_model, target_model = _encoder(source_sizes, int(layers)), _encoder(target_sizes, target_layers)
    shapes, target_shapes = _shapes(source_model), _shapes(target_model)
    target = jax.block_until_ready(jax.tree.map(jnp.asarray, _draw(target_shapes, 99)))
    routes = mj.match(shapes, target_shapes, source="**", target="**")
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 1000, (int(batch), _TOKENS)), jnp.int32)
    transfer, computed = _transfer(method, routes, (source_model, target_model), (shapes, target_shapes), tokens)
    give_back()
    before, cpu = memory_now("RssAnon"), time.process_time()
    with _Peak() as peak:
        source = mj.load_weights(folder, like=shapes)
        if way == "loaded":
            source = jax.block_until_ready(jax.tree.map(jnp.asarray, source))
        made = jax.block_until_ready(transfer(source, target))
    del source
    give_back()
    return {
        "memory": peak.bytes - before,
        "programs": memory_now("RssAnon") - before - bytes_of(made),
        "source": bytes_of(shapes),
        "bound": _bound(routes, shapes, target_shapes, computed, tokens.size),
        "cpu": time.process_time() - cpu,
        "sum": float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(made))),
    }


def _bound(routes: Any, source: Any, target: Any, moments: Mapping[str, Any], rows: int) -> int:
    """Returns the bytes of the new target and of the largest layer's inputs and outputs; see above."""
    sources, targets, layers = mj.flatten(source), mj.flatten(target), []
    for one in mj.share_transfer(routes).describe(source, target):
        leaf, own = sources[one.source], moments.get(one.source)
        inputs = math.isqrt(own.size) if own is not None else 0
        activations = inputs + (leaf.size // inputs if inputs else leaf.shape[-1])
        layers.append(bytes_of((leaf, targets[one.target], targets[one.target], own)) + 4 * rows * activations)
    return bytes_of(target) + max(layers)


def _transfer(
    method: str, routes: Any, models: Sequence[TextEncoder], shapes: Sequence[Any], tokens: jax.Array
) -> tuple[Callable[[Any, Any], Any], Mapping[str, Any]]:
    """Returns `(source, target) -> new target` of a method, and the shapes of the moments of what it computes."""

    def apply(model: TextEncoder) -> Callable[..., Any]:
        return lambda params, tokens: model.apply({"params": params}, tokens)

    if method == "copies":
        transfer = mj.share_transfer(routes)
        return lambda source, target: transfer.apply({}, source, target), {}
    graphs = [mj.channel_graph(apply(model), one, tokens) for model, one in zip(models, shapes, strict=True)]
    align = functools.partial(mj.transfers.align, routes, *graphs)
    if method == "aligned":
        return align, {}
    moments = jax.eval_shape(lambda one: mj.input_moments(apply(models[0]), one, tokens), shapes[0])

    def fitted(source: Any, target: Any) -> Any:
        return align(source, target, mj.transfers.layer_moments(apply(models[0]), source, tokens))

    def refit(source: Any, target: Any) -> Any:
        return mj.refit(routes, apply(models[0]), apply(models[1]), source, target, tokens, batch_size=8).variables

    return {"fitted": fitted, "refit": refit}[method], moments


def main(arguments: list[str] | None = None) -> None:
    """Writes sources, transfers from each in processes of their own, and prints the memory that these took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=["copies", "aligned", "fitted"])
    parser.add_argument("--ways", nargs="+", choices=_WAYS, default=list(_WAYS))
    parser.add_argument("--size", choices=_SIZES, default="base")
    parser.add_argument("--texts", type=int, default=16, help="of 32 tokens, that moments and refit are from")
    options = parser.parse_args(arguments)
    print("| method | layers | source MiB | way | memory MiB | of the source | programs MiB | bound MiB | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            write_source(Path(folder), options.size, layers)
            for method in options.methods:
                sums = set()
                for way in options.ways:
                    words = [folder, options.size, str(layers), method, way, str(options.texts)]
                    one = measure_apart("benchmarks.stream_source", *words)
                    sums.add(float(f"{one['sum']:.4g}"))
                    mebibytes = [f"{one[name] / _MIB:.0f}" for name in ("source", "memory", "programs", "bound")]
                    ratio = f"{one['memory'] / one['source']:.2f}"
                    print(
                        f"| {method} | {layers} | {mebibytes[0]} | {way} | {mebibytes[1]} | {ratio} | {mebibytes[2]} | "
                        f"{mebibytes[3]} | {one['cpu']:.0f} |",
                        flush=True,
                    )
                if len(sums) > 1:
                    print(f"the sums of what was made differ: {sorted(sums)}")


if __name__ == "__main__":
    main()
