"""`merge-jax doctor`: whether a machine is ready."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

__all__ = ["Finding", "examine", "findings"]

_LEAST_DISK = 2 * 2**30  # Bytes: a default run and its environment.
_MARKS = {"good": "ok   ", "note": "note ", "bad": "BAD  "}


class Finding(NamedTuple):
    """What one look found.

    Attributes:
      kind: good; a note, to know; or bad, which is to be mended.
      text: what was found, and what to do.
    """

    kind: Literal["good", "note", "bad"]
    text: str


def examine() -> int:
    """Prints what was found and returns the exit code: 1 where something is bad."""
    worst = 0
    for finding in findings():
        print(f"{_MARKS[finding.kind]} {finding.text}", flush=True)
        worst |= finding.kind == "bad"
    print("something is to be mended" if worst else "ready")
    return worst


def findings() -> Iterator[Finding]:
    """Yields what is found, one look after the other."""
    for look in (_python, _packages, _plugins, _devices, _computes, _threads, _folder):
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
    """JAX, its compiled part and its plugins for accelerators must be of one version."""
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
    except Exception as error:  # Whatever a broken installation raises.
        yield Finding("bad", f"a compiled product of matrices fails: {type(error).__name__}: {str(error)[:200]}")
        return
    expected = sum(sum(i * 8 + k for i in range(8)) ** 2 for k in range(8)) / 64**2
    close = abs(found - expected) < 1e-2 * expected
    yield Finding(
        "good" if close else "bad", f"a compiled product of matrices gives {found:.4f}, {expected:.4f} is right"
    )


def _threads() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("good", f"{cores} CPU cores")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    hint = f"in {cache}" if cache else "none; JAX_COMPILATION_CACHE_DIR=FOLDER makes later runs start faster"
    yield Finding("note", f"cache of compiled programs: {hint}")


def _folder() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    kind = "good" if free >= _LEAST_DISK else "bad"
    yield Finding(kind, f"free disk here: {free / 2**30:.1f} GiB; a run takes up to {_LEAST_DISK / 2**30:.0f} GiB")
    try:
        with tempfile.TemporaryDirectory(dir=here) as folder:
            from merge_jax.lock import FolderLock

            FolderLock(Path(folder)).release()
    except OSError as error:
        yield Finding("bad", f"run folders cannot be made or locked in {here}: {error}")
