"""Memory of transfers from sharded safetensors: a source streamed leaf by leaf, or loaded.

    python -m benchmarks.stream_source                              # to DistilBERT base from 12, 24, 48 layers
    python -m benchmarks.stream_source --layers 12 --methods refit  # of BERT base's widths, random weights
    python -m benchmarks.stream_source --layers 4 8 --size small

`streamed` passes the transfer the leaves mapped by `mj.load_weights`; `loaded` first copies all leaves to the device.
Each runs in a separate process. Memory is the process's peak anonymous memory (Linux's RssAnon, sampled every 2 ms)
beyond that with only the target loaded. It excludes pages of the mapped file, which the system can reclaim. `bound` is
the new target, the adapter, the moments that it is fitted to, and three largest leaves: of the source, the old target
and the new one.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import merge_jax as mj
from benchmarks.apart import measure_apart
from benchmarks.memory import bytes_of, memory_now
from merge_jax.models import TextEncoder

__all__ = ["main", "measure"]

_METHODS, _WAYS = ("copies", "aligned", "fitted", "refit"), ("streamed", "loaded")
_SIZES = {"base": (30522, 768, 12, 3072, 512), "small": (2000, 128, 4, 512, 64)}
_TARGET_LAYERS, _SHARD_LAYERS = {"base": 6, "small": 2}, 4
_MIB = 2**20


def _encoder(size: str, num_layers: int) -> TextEncoder:
    words, width, heads, hidden, length = _SIZES[size]
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
    for path in mj.flatten(shapes := _shapes(_encoder(size, num_layers))):
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
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, memory_now("RssAnon"))


def measure(folder: str, size: str, layers: str, method: str, way: str, batch: str) -> dict[str, float]:
    """Returns memory and CPU seconds of a transfer from a folder, with the sizes to compare them with, in bytes."""
    source_model, target_model = _encoder(size, int(layers)), _encoder(size, _TARGET_LAYERS[size])
    shapes, target_shapes = _shapes(source_model), _shapes(target_model)
    target = jax.block_until_ready(jax.tree.map(jnp.asarray, _draw(target_shapes, 99)))
    routes = mj.match(shapes, target_shapes, source="**", target="**")
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 1000, (int(batch), 32)), jnp.int32)
    transfer, extra = _transfer(method, routes, (source_model, target_model), (shapes, target_shapes), tokens)
    before, cpu = memory_now("RssAnon"), time.process_time()
    with _Peak() as peak:
        source = mj.load_weights(folder, like=shapes)
        if way == "loaded":
            source = jax.block_until_ready(jax.tree.map(jnp.asarray, source))
        made = jax.block_until_ready(transfer(source, target))
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(target)]
    return {
        "memory": peak.bytes - before,
        "source": bytes_of(shapes),
        "bound": sum(sizes) + 3 * max(sizes) + extra,
        "cpu": time.process_time() - cpu,
        "sum": float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(made))),
    }


def _transfer(
    method: str, routes: Any, models: Sequence[TextEncoder], shapes: Sequence[Any], tokens: jax.Array
) -> tuple[Callable[[Any, Any], Any], int]:
    """Returns `(source, target) -> new target` of a method, and the bytes of its adapter and moments."""

    def apply(model: TextEncoder) -> Callable[..., Any]:
        return lambda params, tokens: model.apply({"params": params}, tokens)

    if method == "copies":
        transfer = mj.share_transfer(routes)
        return lambda source, target: transfer.apply({}, source, target), 0
    graphs = [mj.channel_graph(apply(model), one, tokens) for model, one in zip(models, shapes, strict=True)]
    aligned = mj.aligned_transfer(routes, *graphs)
    adapter = bytes_of(jax.eval_shape(aligned.init, jax.random.key(0), *shapes))
    if method == "aligned":
        init = aligned.init
        return lambda source, target: aligned.apply(init(jax.random.key(0), source, target), source, target), adapter
    extra = adapter + bytes_of(jax.eval_shape(lambda one: mj.input_moments(apply(models[0]), one, tokens), shapes[0]))

    def fitted(source: Any, target: Any) -> Any:
        assert aligned.fit is not None
        moments = mj.input_moments(apply(models[0]), source, tokens)
        return aligned.apply(aligned.fit(moments, source, target), source, target)

    def refit(source: Any, target: Any) -> Any:
        return mj.refit(routes, apply(models[0]), apply(models[1]), source, target, tokens, batch_size=8).variables

    return {"fitted": fitted, "refit": refit}[method], extra


def main(arguments: list[str] | None = None) -> None:
    """Writes sources, transfers from each in processes of their own, and prints the memory that these took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=["copies", "aligned", "fitted"])
    parser.add_argument("--ways", nargs="+", choices=_WAYS, default=list(_WAYS))
    parser.add_argument("--size", choices=_SIZES, default="base")
    parser.add_argument("--texts", type=int, default=16, help="of 32 tokens, that moments and refit are from")
    options = parser.parse_args(arguments)
    print("| method | layers | source MiB | way | memory MiB | of the source | bound MiB | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            write_source(Path(folder), options.size, layers)
            for method in options.methods:
                sums = set()
                for way in options.ways:
                    words = [folder, options.size, str(layers), method, way, str(options.texts)]
                    one = measure_apart("benchmarks.stream_source", *words)
                    sums.add(float(f"{one['sum']:.4g}"))
                    mebibytes = [f"{one[name] / _MIB:.0f}" for name in ("source", "memory", "bound")]
                    ratio = f"{one['memory'] / one['source']:.2f}"
                    print(
                        f"| {method} | {layers} | {mebibytes[0]} | {way} | {mebibytes[1]} | {ratio} | {mebibytes[2]} | "
                        f"{one['cpu']:.0f} |",
                        flush=True,
                    )
                if len(sums) > 1:
                    print(f"the sums of what was made differ: {sorted(sums)}")


if __name__ == "__main__":
    main()
