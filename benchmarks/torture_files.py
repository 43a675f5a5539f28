"""The parts of `benchmarks.torture` that damage files."""

import contextlib
import gc
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from benchmarks.damage import DAMAGE, Damage
from benchmarks.torture_children import Children
from benchmarks.torture_pair import digest
from benchmarks.torture_part import Outcome, Tools, counted

__all__ = ["damage", "flip_each", "flips"]


def _state(step: int) -> dict[str, Any]:
    """Returns the state of a step, whose numbers no compression shortens; few leaves, so that most bits are numbers."""
    random = np.random.default_rng(step)
    return {
        "model": {"kernel": jnp.asarray(random.normal(size=(64, 64)), jnp.float32), "bias": jnp.zeros(7)},
        "half": jnp.full((3, 5), step, jnp.bfloat16),
        "count": jnp.int32(step),
        "key": jax.random.key(step),
    }


_FLIPPED = 3  # The step whose bits are flipped.
_EFFECTS = ("exception", "digest", "harmless", "silent")
_LIKE = jax.eval_shape(lambda: _state(0))


def _save(folder: Path, *steps: int) -> None:
    with mj.Checkpoints(folder, keep=None) as checkpoints:
        for step in steps:
            checkpoints.save(step, _state(step))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what Orbax logs of files that are damaged, and of tasks that it leaves behind when it reads them."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
        gc.collect()  # Python finds them here at the latest.
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def flips(tools: Tools, n: int, seed: int) -> Outcome:
    """Flips one bit at a time of a saved step, in files chosen by their size; each process has its share of them."""
    whole, random = tools.folder / "whole", np.random.default_rng(seed)
    _save(whole, _FLIPPED)
    files = sorted(path for path in (whole / str(_FLIPPED)).rglob("*") if path.is_file() and path.stat().st_size)
    sizes = np.array([path.stat().st_size for path in files])
    chosen = random.choice(len(files), n, p=sizes / sizes.sum())
    planned = [
        (str(files[i].relative_to(whole)), int(random.integers(sizes[i])), int(random.integers(8))) for i in chosen
    ]

    def share(children: Children, number: int) -> list[str]:
        folder = tools.folder / f"flips-{number}"
        shutil.copytree(whole, folder)
        folder.with_suffix(".json").write_text(json.dumps(planned[number :: len(tools.children)]))
        children.start("flip", folder)
        effects = []
        while (said := children.until("flipped")[-1])[0] == "flipped":
            effects.append(said[1])
            tools.bar.update()
        return effects

    with ThreadPoolExecutor(len(tools.children)) as pool:
        shares = list(pool.map(share, tools.children, range(len(tools.children))))
    counts: Counter[str] = Counter(dict.fromkeys(_EFFECTS, 0))
    for effects in shares:
        counts.update(effects)
    result = ", ".join(f"{count} {name}" for name, count in counts.items())
    reached = counts["silent"] == 0 and set(counts) == set(_EFFECTS) and counts.total() == n
    return Outcome(result, reached, counts)


def flip_each(folder: Path) -> Iterator[str]:
    """Flips the bits that the file beside a folder lists, one at a time, and yields how each was noticed."""
    known = digest(_state(_FLIPPED))
    with _quiet():
        for name, byte, bit in json.loads(folder.with_suffix(".json").read_text()):
            before = (folder / name).read_bytes()
            content = bytearray(before)
            content[byte] ^= 1 << bit
            (folder / name).write_bytes(content)
            yield _effect(folder, known)
            (folder / name).write_bytes(before)


def _effect(folder: Path, known: str) -> str:
    """Returns how the flip of a bit was noticed; an error that is not of the documented kind by its name."""
    try:
        with mj.Checkpoints(folder, read_only=True) as checkpoints:
            restored = checkpoints.restore_latest(_LIKE)
    except ValueError as error:
        return "digest" if "changed since" in str(error) else "exception"
    except Exception as error:
        return type(error).__name__
    return "harmless" if restored is not None and digest(restored[1]) == known else "silent"


def damage(tools: Tools, n: int, seed: int) -> Outcome:
    """Damages the newest of three steps in every way there is, and goes on from what is restored."""
    whole = tools.folder / "whole"
    _save(whole, 1, 2, 3)
    names = [name for name in DAMAGE if os.geteuid() or name != "a state nobody may read"]  # Root may.
    chosen = [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:n]]
    failed = []
    with _quiet():
        for i, name in enumerate(chosen):
            folder = tools.folder / f"damage-{i}"
            shutil.copytree(whole, folder)
            problem = _problem(folder, DAMAGE[name])
            if problem:
                failed.append(f"{name}: {problem}")
            tools.bar.update()
    result = counted(len(chosen) - len(failed), len(chosen)) + "".join(f"; {line}" for line in failed)
    return Outcome(result, not failed, {"kinds": chosen, "failed": failed})


def _problem(folder: Path, kind: Damage) -> str:
    """Returns what is not as it should be after damage, or nothing."""
    kind.spoil(folder / "3")
    try:
        with warnings.catch_warnings(record=True) as caught, mj.Checkpoints(folder, keep=None) as checkpoints:
            warnings.simplefilter("always")
            step, state = checkpoints.restore_latest(_LIKE) or (0, None)
            messages = [str(one.message) for one in caught if one.category is mj.checkpoints.DamagedCheckpointWarning]
            if step != kind.restored or digest(state) != digest(_state(kind.restored)):
                return f"step {step} was restored"
            named = all(re.search(kind.reason or "", message) for message in messages)
            if len(messages) != (kind.reason is not None) or not named:
                return f"it said {messages}"
            checkpoints.save(step + 1, _state(step + 1))
        with mj.Checkpoints(folder, read_only=True) as checkpoints:
            after, state = checkpoints.restore_latest(_LIKE) or (0, None)
        if after != step + 1 or digest(state) != digest(_state(step + 1)):
            return f"after step {step + 1} was saved, step {after} was restored"
    except Exception as error:
        return f"{type(error).__name__} {str(error)[:200]}"
    return ""
