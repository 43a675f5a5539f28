"""`merge-jax doctor`: checks whether a machine is ready."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from merge_jax.training.compilation_cache import MAX_BYTES, bytes_in, folder_in_use

__all__ = ["Finding", "examine", "findings"]

_LEAST_DISK = 2 * 2**30  # Bytes: a default run and its environment.
_MARKS = {"good": "ok   ", "note": "note ", "bad": "BAD  "}

# Compiles a program, and prints how many were read from the cache instead.
_COMPILES = """\
import jax
from merge_jax.training.compilation_cache import programs_read
programs_read()
jax.jit(lambda x: jax.numpy.sin(x @ x.T).sum())(jax.numpy.ones((8, 8))).block_until_ready()
print(programs_read())
"""
_OTHER_MACHINE = re.compile(r"Target machine feature \S+ is not\s+supported on the host machine")
_PATIENCE = 300.0  # Seconds for one compilation, including the start of a process.


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
      kind: good; a note, for information; or bad, a problem to fix.
      text: the result, with advice.
    """

    kind: Literal["good", "note", "bad"]
    text: str


def examine() -> int:
    """Prints the findings and returns the exit code: 1 if any is bad."""
    worst = 0
    for finding in findings():
        print(f"{_MARKS[finding.kind]} {finding.text}", flush=True)
        worst |= finding.kind == "bad"
    print("problems found" if worst else "ready")
    return worst


def findings() -> Iterator[Finding]:
    """Yields the findings, one check after the other."""
    # Other processes test the cache, and could not use a device that this one holds.
    for look in (_python, _packages, _plugins, _cache, _devices, _computes, _rows, _cores, _folder):
        yield from look()


def _python() -> Iterator[Finding]:
    kind = "good" if sys.version_info >= (3, 11) else "bad"
    yield Finding(kind, f"Python {platform.python_version()} on {platform.platform()}; 3.11 or newer is needed")


def _packages() -> Iterator[Finding]:
    try:
        requirements = importlib.metadata.requires("merge_jax") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("bad", "merge_jax is not installed: pip install -e . in its repository")
        return
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("bad", f"{requirement.name} is missing: pip install '{requirement}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Finding("good", f"{requirement.name} {found}")
        else:
            yield Finding("bad", f"{requirement.name} {found}, needed is {requirement.specifier}")


def _plugins() -> Iterator[Finding]:
    """Checks that JAX, jaxlib and accelerator plugins have the same version."""
    versions = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name in ("jax", "jaxlib") or name.startswith(("jax-cuda", "jax-rocm")):
            versions[name] = distribution.version
    jax = versions.pop("jax", None)
    if jax is None:
        return
    for name, version in sorted(versions.items()):
        if Version(version).release[:2] != Version(jax).release[:2]:
            yield Finding("bad", f"{name} {version} beside jax {jax}: pip install -U jax {name}, to one version")
    cuda = {name.split("-")[1] for name in versions if name.startswith("jax-cuda")}
    if len(cuda) > 1:
        yield Finding("bad", f"plugins of {' and '.join(sorted(cuda))} are both installed: remove one of them")


def _devices() -> Iterator[Finding]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        yield Finding("bad", f"JAX finds no device: {str(error).splitlines()[0]}")
        return
    kinds: dict[str, int] = {}
    for device in devices:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    yield Finding("good", "devices: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    flag = "--xla_gpu_enable_triton_gemm=false"
    if (
        jax.default_backend() == "gpu"
        and Version(jax.__version__).release < (0, 12)
        and flag not in os.environ.get("XLA_FLAGS", "")
    ):
        yield Finding(
            "note",
            f"jax {jax.__version__} aborts ('Check failed: subdim_size_accumulator') where a product follows a slice "
            f"by steps (openxla/xla#47381): if a model of yours has one, take jax 0.12, or set XLA_FLAGS={flag}",
        )
    asked = os.environ.get("JAX_PLATFORMS")
    if jax.default_backend() == "cpu" and asked != "cpu" and Path("/proc/driver/nvidia").exists():
        yield Finding("bad", 'there is an NVIDIA driver, but JAX computes on the CPU: pip install "jax[cuda13]"')
    if asked:
        yield Finding("note", f"JAX_PLATFORMS is set to {asked}")


def _computes() -> Iterator[Finding]:
    import jax
    import jax.numpy as jnp

    try:
        matrix = jnp.arange(64.0).reshape(8, 8) / 64
        found = float(jax.jit(lambda x: jnp.sum(x @ x.T))(matrix))
    except Exception as error:  # A broken installation may raise anything.
        yield Finding("bad", f"a compiled product of matrices fails: {type(error).__name__}: {str(error)[:200]}")
        return
    expected = sum(sum(i * 8 + k for i in range(8)) ** 2 for k in range(8)) / 64**2
    close = abs(found - expected) < 1e-2 * expected
    yield Finding(
        "good" if close else "bad", f"a compiled product of matrices gives {found:.4f}, {expected:.4f} is right"
    )


def _rows() -> Iterator[Finding]:
    """Computes what jax 0.10.2 gets wrong on a CPU."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "cpu":
        return
    rows = jnp.tile(jnp.arange(40_000.0)[:, None] % 97, (1, 3))
    found = jax.jit(jax.vmap(lambda row: jnp.max(jnp.eye(3) @ row)))(rows)
    wrong = jnp.flatnonzero(found != rows[:, 0])
    if wrong.size:
        yield Finding(
            "note",
            f"jax {jax.__version__} is wrong on this CPU from row {int(wrong[0])} on, where a jitted vmap reduces "
            "products with a 3x3 or 2x3 matrix (jax-ml/jax#39103): take jax 0.12, or fewer rows at a time",
        )


def _cache() -> Iterator[Finding]:
    folder = folder_in_use()
    bound = "" if "JAX_COMPILATION_CACHE_DIR" in os.environ else f" of at most {MAX_BYTES / 2**20:.0f}"
    yield Finding("good", f"compilation cache: in {folder}, {bytes_in(folder) / 2**20:.1f} MiB{bound}")
    try:
        with tempfile.TemporaryDirectory() as trial:
            first = _compiled_in(Path(trial))
            kept = any(Path(trial).glob("*-cache"))
            second = _compiled_in(Path(trial))
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("note", f"compilation cache: not tried: {error}")
        return
    failed = next((run for run in (first, second) if run.returncode), None)
    if failed is not None:
        yield Finding("note", f"compilation cache: not tried, as compiling fails: {_end(failed.stderr)}")
        return
    yield _judged(kept, int(second.stdout.split()[-1]), second.stderr)


def _compiled_in(folder: Path) -> subprocess.CompletedProcess[str]:
    """Compiles in a separate process that caches programs in a folder."""
    cache_settings = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    return subprocess.run(
        [sys.executable, "-c", _COMPILES],
        env={**os.environ, **cache_settings},
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
    )


def _judged(kept: bool, read: int, said: str) -> Finding:
    """Returns the finding for the number of programs that a second process read from the cache, and its output."""
    refusal = _OTHER_MACHINE.search(said)
    known = "" if refusal is None else f"XLA says {' '.join(refusal[0].split())!r} of this very machine's programs"
    if known and read:
        return Finding(
            "note",
            f"compilation cache: read, though {known} (jax-ml/jax#38445): where a run dies of SIGILL, give it "
            "--compilation-cache none",
        )
    if read:
        return Finding("good", "compilation cache: read: a second process need not compile what a first one has")
    if known:
        return Finding(
            "note",
            f"compilation cache: not read, because {known}: jax-ml/jax#38445, reported of CPUs with AVX-512 and "
            "jax 0.9.1 to 0.10.1; all works, but each run compiles again: --compilation-cache none spares the writing",
        )
    reason = _end(said) if kept else "nothing was written"
    return Finding("note", f"compilation cache: not read, because {reason}; each run compiles again")


def _end(said: str) -> str:
    """Returns the last line of a process's output."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "of something that JAX does not say"


def _cores() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("good", f"{cores} CPU cores")


def _folder() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    kind = "good" if free >= _LEAST_DISK else "bad"
    yield Finding(kind, f"free disk here: {free / 2**30:.1f} GiB; a run takes up to {_LEAST_DISK / 2**30:.0f} GiB")
    try:
        with tempfile.TemporaryDirectory(dir=here) as folder:
            from merge_jax.checkpoints.lock import FolderLock

            FolderLock(Path(folder)).release()
    except OSError as error:
        yield Finding("bad", f"run folders cannot be made or locked in {here}: {error}")
