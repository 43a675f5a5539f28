"""The parts of `benchmarks.torture` that time the cost of reliability."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from benchmarks.torture_part import Outcome, Tools
from experiments import cross_structure
from merge_jax.checkpoints.manifest import Manifest
from merge_jax.study.sources import plan_source
from merge_jax.study.trial import make_trials

__all__ = ["blocking", "digests", "overhead"]

_SIZE = 64 * 10**6  # Bytes.


def overhead(tools: Tools, n: int, seed: int) -> Outcome:
    """Times `save` against the steps between two saves, of mergenet in `experiments.cross_structure`."""
    # Without its dropout and with one route it compiles much faster, and its steps are shorter: that is not in favour
    # of the save.
    preset, without = cross_structure.PRESETS["mobilenet"], {"attention_dropout": 0.0, "feed_forward_dropout": 0.0}
    config = replace(preset, methods=("mergenet_warm",), routes=cross_structure.PRESETS["smoke"].routes, **without)
    scenario = cross_structure.build(config)
    trial = make_trials(scenario, config, plan_source(scenario, config))["mergenet_warm"]
    layout = mj.jit_layout(mj.data_mesh(1))
    count, interval = trial.steps_per_call, trial.lengths.checkpoint_every
    epoch = trial.lower(layout).compile()
    state = layout.put_state(trial.initial_state(seed, trial.fresh_source(seed)))
    arrays, indices_at = layout.put_arrays(trial.arrays(seed)), trial.indices_at(seed)

    def advance(state: mj.JointState) -> mj.JointState:
        for first in range(0, interval, count):
            indices = layout.put_indices(indices_at(first, count))
            state, _ = epoch(state, arrays, indices, np.int32(min(count, interval - first)))
        return state

    return blocking(tools, n, advance, state, interval)


def blocking(
    tools: Tools, n: int, advance: Callable[[mj.JointState], mj.JointState], state: mj.JointState, interval: int
) -> Outcome:
    """Times `save` against the `interval` steps of `advance` before it, n times."""
    steps, saves = [], []
    with mj.Checkpoints(tools.folder / "overhead") as checkpoints:
        for number in range(n + 1):
            start = time.perf_counter()
            state = jax.block_until_ready(advance(state))
            trained = time.perf_counter()
            checkpoints.save((number + 1) * interval, state)
            saved = time.perf_counter()
            if number:  # The first save sets up Orbax.
                steps.append(trained - start)
                saves.append(saved - trained)
                tools.bar.update()
    ratio = statistics.median(save / step_seconds for save, step_seconds in zip(saves, steps, strict=True))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if isinstance(leaf.dtype, np.dtype))
    result = (
        f"{100 * ratio:.2f} % ({1000 * statistics.median(saves):.0f} ms for {size / 1e6:.1f} MB, "
        f"every {interval} steps of {1000 * statistics.median(steps) / interval:.1f} ms)"
    )
    return Outcome(result, ratio < 0.05, {"ratio": ratio, "steps": steps, "saves": saves, "bytes": size})


def digests(tools: Tools, n: int, seed: int) -> Outcome:
    """Times the manifest of a state of 64 MB."""
    random = np.random.default_rng(seed)
    state = {f"layer_{i}": jnp.asarray(random.random(_SIZE // 32, np.float32)) for i in range(8)}
    jax.block_until_ready(state)
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        Manifest.of(0, state, {}, {}, None)
        seconds.append(time.perf_counter() - start)
        tools.bar.update()
    per_gigabyte = statistics.median(seconds) / (_SIZE / 1e9)
    return Outcome(f"{per_gigabyte:.2f} s/GB", per_gigabyte < 1, {"seconds": seconds, "bytes": _SIZE})
