"""The measurements of `benchmarks.against_commit`, and their targets."""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from benchmarks.measured_tree import MeasurementError, Tree

__all__ = ["MEASUREMENTS", "Figures", "Measurement", "Program", "Target"]

Figures = Mapping[str, float]
"""What one process, or a few that belong together, came to, by name and unit."""

Program = Callable[[Tree], Figures]
"""Measures a tree once, in fresh processes."""

_EXPERIMENT = ("-m", "experiments.cross_structure")


class Target(NamedTuple):
    """What a measurement is to come to.

    Attributes:
      figure: which of its figures is judged.
      kind: whether the limit is for the second figure over the first, or for the second figure itself.
      limit: which it is at most.
    """

    figure: str
    kind: Literal["ratio", "value"]
    limit: float

    def __str__(self) -> str:
        """Returns e.g. `ratio <= 1/40`."""
        inverse = 1 / self.limit
        whole = self.limit < 1 and abs(inverse - round(inverse)) < 1e-9
        return f"{self.kind} <= {f'1/{round(inverse)}' if whole else f'{self.limit:g}'}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One thing to measure.

    Attributes:
      what: it is, in words.
      program: measures a tree.
      targets: what is aimed for.
      base: what this tree is compared with where that is not the tree of the commit: another program of this tree.
      alone: only this tree is measured, and compared with nothing.
      heavy: it takes many minutes.
    """

    what: str
    program: Program
    targets: tuple[Target, ...] = ()
    base: Program | None = None
    alone: bool = False
    heavy: bool = False


def _in_process(*words: str) -> Program:
    return lambda tree: tree.program(*words)


def _gradient(routes: int, layers: int, *more: str) -> Program:
    return _in_process("gradient", "--routes", str(routes), "--layers", str(layers), *more)


def _init(routes: int, layers: int) -> Program:
    return _in_process("init", "--routes", str(routes), "--layers", str(layers))


def _whole(*words: str, in_tree: bool = False, cached: bool = False) -> Program:
    """Returns the program that takes the time of a whole process, in an empty folder or in that of the tree."""

    def program(tree: Tree) -> Figures:
        variables = {"JAX_ENABLE_COMPILATION_CACHE": "true"} if cached else None
        with tempfile.TemporaryDirectory() as folder:
            done = tree.run(words, tree.root if in_tree else Path(folder), variables)
        return {"CPU s": done.cpu, "wall s": done.wall}

    return program


def _readme_block(tree: Tree) -> Figures:
    texts = [
        (tree.root / name).read_text() for name in ("README.md", "docs/transfers.md")
    ]  # It stood in the README once.
    blocks = re.findall(r"^```python\n(.*?)^```", "\n".join(texts), re.MULTILINE | re.DOTALL)
    block = next((block for block in blocks if "mj.lpka_transfer" in block), None)
    if block is None:
        raise MeasurementError("neither README.md nor docs/transfers.md has a block of Python with an LPKA")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "block.py").write_text(block)
        done = tree.run(("block.py",), Path(folder))
    return {"CPU s": done.cpu, "wall s": done.wall}


def _joint_run(*words: str) -> Program:
    """Returns the program that times steps with the tree's own `benchmarks.joint_step`."""

    def program(tree: Tree) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            tree.run(("-m", "benchmarks.joint_step", *words), Path(folder))
            (file,) = Path(folder).glob("runs/benchmarks/*.json")
            rows = {row["step"]: row for row in json.loads(file.read_text())["figures"]["rows"]}
        ratios = {f"cycle {cycle} / plain": rows[f"joint, cycle {cycle}"]["ratio"] for cycle in (1, 4)}
        return {**ratios, "plain ms/step": 1000 * rows["two plain steps"]["seconds"]}

    return program


_SHORT = ("--seeds", "1", "--steps", "15", "--source-steps", "15", "--report-every", "15", "--checkpoint-every", "15")


def _first_step_again(tree: Tree) -> Figures:
    """Runs the default experiment twice, cut short, with one folder for what is compiled.

    The first steps are over when the first report is written, 15 steps after the first.
    """
    times = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variables = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        for run in ("first", "second"):
            report = folder / run / "metrics.jsonl"
            words = (*_EXPERIMENT, *_SHORT, "--run-dir", str(folder / run))
            done = tree.run(words, folder, variables, mark=report.exists)
            if done.marked is None:
                raise MeasurementError(f"{report.name} did not appear")
            times.append(done.marked)
    (first_cpu, first), (second_cpu, second) = times
    return {
        "second / first, wall": second / first,
        "second / first, CPU": second_cpu / first_cpu,
        "first, wall s": first,
        "second, wall s": second,
    }


MEASUREMENTS: Mapping[str, Measurement] = {
    "init_5x2": Measurement(
        what="transfer.init of five unlike small routes, two layers, in a new process",
        program=_init(5, 2),
        targets=(Target("CPU s", "ratio", 1 / 40),),
    ),
    "init_1": Measurement(
        what="transfer.init of one small route, two layers, in a new process",
        program=_init(1, 2),
        targets=(Target("wall s", "value", 1.0),),
    ),
    "grad_5x1": Measurement(
        what="trace and compile the gradient of five unlike routes, one layer, with dropout",
        program=_gradient(5, 1),
        targets=(Target("CPU s", "ratio", 1 / 6),),
    ),
    "grad_5x2": Measurement(
        what="the same, two layers",
        program=_gradient(5, 2),
        targets=(Target("CPU s", "ratio", 1 / 12),),
    ),
    "grad_5x4": Measurement(
        what="the same in this tree: four layers (after) and one (before)",
        program=_gradient(5, 4),
        base=_gradient(5, 1),
        targets=(Target("CPU s", "ratio", 1.3),),
    ),
    "grad_64x64": Measurement(
        what="trace and compile the gradient of one route, 64x64 to 64x64, two layers, with dropout",
        program=_gradient(1, 2, "--size", "64"),
        targets=(Target("CPU s", "ratio", 1 / 2),),
    ),
    "grad_72": Measurement(
        what="the same in this tree: 72 such routes (after) and one (before)",
        program=_gradient(72, 2, "--size", "64"),
        base=_gradient(1, 2, "--size", "64"),
        targets=(Target("CPU s", "ratio", 1.5),),
    ),
    "joint_step_digits": Measurement(
        what="trace and compile the joint step of the digits pair, mergenet, cycle 4",
        program=_in_process("joint-step"),
        targets=(Target("CPU s", "ratio", 1 / 4),),
    ),
    "joint_run_digits": Measurement(
        what="steps of the digits pair over its two plain steps (benchmarks.joint_step)",
        program=_joint_run(),
        targets=(Target("cycle 1 / plain", "value", 1.8),),
    ),
    "joint_run_published": Measurement(
        what="the same, published pair, batch 128",
        program=_joint_run("published"),
        targets=(Target("cycle 1 / plain", "value", 1.10), Target("cycle 4 / plain", "value", 1.03)),
        heavy=True,
    ),
    "image_steps": Measurement(
        what="steps of plain training, EfficientNet-lite0 of half the width, 50 images of 64x64, in a compiled loop",
        program=_in_process("image-steps"),
        heavy=True,
    ),
    "readme_block": Measurement(
        what="the first block of Python with an LPKA in README.md or docs/transfers.md, whole process",
        program=_readme_block,
        targets=(Target("CPU s", "ratio", 1 / 3),),
    ),
    "family_run": Measurement(  # The default run is another one since 2026-11-28.
        what="python -m experiments.cross_structure family, nothing compiled before",
        program=_whole(*_EXPERIMENT, "family", "--run-dir", "run"),
        targets=(Target("wall s", "ratio", 0.6),),
        heavy=True,
    ),
    "first_step_again": Measurement(
        what="from start to first report in this tree: a second run over the first (15 steps, one seed, one cache)",
        program=_first_step_again,
        targets=(Target("second / first, wall", "value", 1 / 4),),
        alone=True,
    ),
    "help": Measurement(
        what="python -m experiments.cross_structure --help",
        program=_whole(*_EXPERIMENT, "--help"),
        targets=(Target("CPU s", "value", 2.0),),
    ),
    "tests": Measurement(
        what="pytest, the default suite",
        program=_whole("-m", "pytest", "-p", "no:cacheprovider", in_tree=True, cached=True),
        heavy=True,
    ),
}
"""Measurements by name."""
