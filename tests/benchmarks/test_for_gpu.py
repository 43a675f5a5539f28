"""`benchmarks.for_gpu` in a process of its own, since it tells JAX about a GPU before JAX is imported."""

import importlib.util
import subprocess
import sys

import pytest

from tests import ROOT

HAS_COMPILER = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def for_gpu(*words):
    command = [sys.executable, "-m", "benchmarks.for_gpu", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow  # No user runs it, and it starts a process.
@pytest.mark.skipif(HAS_COMPILER, reason="JAX's plugin for CUDA is installed")
def test_without_the_compiler_it_says_what_to_install():
    done = for_gpu("cross_structure", "smoke")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == 'error: JAX has no compiler for GPUs here: pip install "jax[cuda12]"'


@pytest.mark.skipif(not HAS_COMPILER, reason="needs JAX's plugin for CUDA")
def test_the_smoke_preset_compiles():
    done = for_gpu("cross_structure", "smoke", "--methods", "vanilla", "kd")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines() if " compiled " in line] == [
        ["source", "compiled"],
        ["vanilla", "compiled"],
        ["kd", "compiled"],
    ]


@pytest.mark.slow
def test_near_misses_of_an_experiment_are_named():
    done = for_gpu("cross_structur")
    assert done.returncode == 2
    assert "did you mean 'cross_structure'" in done.stderr
