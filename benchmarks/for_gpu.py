"""Checks, without a GPU, whether an experiment's programs compile for one, and their memory there.

    pip install "jax[cuda12]"                # the compiler comes with JAX's plugin; nothing of it runs on a device
    python -m benchmarks.for_gpu cross_structure smoke
    python -m benchmarks.for_gpu cross_structure short --methods vanilla mergenet

The arguments are those of `python -m experiments.<name>`. Each program is compiled for an H100. Temporaries are XLA's
planned memory besides the arguments, which are state and data. If XLA can choose a kernel only by trials on the device,
this is reported: the program passed all stages that depend on shapes. If the compiler aborts, this program ends with
XLA's message, after naming the compiled program.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType

os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu,cuda"}  # Or the plugin wants a driver.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # Kernels as they are by default, none tried.

import jax
from jax.experimental import topologies
from jax.stages import Lowered

from benchmarks.report import report
from merge_jax.study.cli import parse
from merge_jax.study.config import RunConfig
from merge_jax.study.grids.grid import load_experiment
from merge_jax.study.sources import plan_source
from merge_jax.study.trial import make_trials
from merge_jax.training.sharding import DATA_AXIS, jit_layout

__all__ = ["main"]

_MEBIBYTE = 2**20
_UNTRIED = "Failed to get configs"  # What XLA says where it has no device to try kernels on.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(arguments: Sequence[str]) -> None:
    """Compiles and prints a table; what is wrong with the words is one line and exit code 2."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        raise SystemExit(0 if arguments else 2)
    try:
        module = load_experiment(arguments[0])
        config = parse(module.PRESETS, f"benchmarks.for_gpu {arguments[0]}", __doc__ or "", arguments[1:])
        programs = _lowered_for(_an_h100(), module, config)
        rows = []
        for name, lowered in programs:
            print(f"compiling {name}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            outcome, memory = _compiled(lowered)
            rows.append((name, outcome, f"{time.perf_counter() - start:.1f}", *memory))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    report("for gpu", config, ("program", "outcome", "compile s", "arguments MiB", "temporaries MiB"), rows, rows)


def _an_h100() -> jax.sharding.Mesh:
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")
    except NotImplementedError:
        raise ValueError('JAX has no compiler for GPUs here: pip install "jax[cuda12]"') from None
    return topologies.make_mesh(topology, (1,), (DATA_AXIS,))


def _lowered_for(mesh: jax.sharding.Mesh, module: ModuleType, config: RunConfig) -> Iterator[tuple[str, Lowered]]:
    """Yields the name and the traced epoch of everything that an experiment trains, for the devices of a mesh."""
    config.check()
    scenario = module.build(config)
    for name, trial in make_trials(scenario, config, plan_source(scenario, config)).items():
        yield name, trial.lower(jit_layout(mesh))


def _compiled(lowered: Lowered) -> tuple[str, list[str]]:
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if _UNTRIED not in str(error):
            raise
        return "needs a GPU to choose its kernels", ["", ""]
    sizes = () if memory is None else (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    return "compiled", [f"{size / _MEBIBYTE:.1f}" for size in sizes]


if __name__ == "__main__":
    main(sys.argv[1:])
