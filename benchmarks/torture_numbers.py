"""The parts of `benchmarks.torture` on numerics: resumed runs, and non-finite batches."""

import jax
import numpy as np

import merge_jax as mj
from benchmarks.torture_pair import batches_at, digest, initial_state, shapes
from benchmarks.torture_part import Outcome, Tools, counted

__all__ = ["nan", "resume"]

_STEPS = 10
_SPLITS = (5, 2, 8, 1, 9)


def resume(tools: Tools, n: int, seed: int) -> Outcome:
    """Saves in the middle of ten steps, drops all, restores and goes on; the first split in a new process too.

    Nothing is random: the last of N is the new process.
    """
    del seed
    known, equal = tools.known.digest(_STEPS), []
    for split in _SPLITS[: max(1, n - 1)]:
        folder = tools.folder / f"split-{split}"
        with mj.Checkpoints(folder) as checkpoints:
            checkpoints.save(split, _trained(tools, initial_state(), 0, split))
        with mj.Checkpoints(folder, read_only=True) as checkpoints:
            step, state = checkpoints.restore_latest(shapes()[0]) or (0, initial_state())
        equal.append(step == split and digest(_trained(tools, state, step, _STEPS)) == known)
        tools.bar.update()
    if n > 1:
        children = tools.children[0]
        children.start("go on", tools.folder / f"split-{_SPLITS[0]}")
        word, *values = children.until("done")[-1]
        equal.append(word == "done" and values == [_STEPS, known])
        if word == "done":
            children.until("ended")
        tools.bar.update()
    splits = [*_SPLITS[: max(1, n - 1)], *([f"{_SPLITS[0]} in a new process"] if n > 1 else [])]
    return Outcome(counted(sum(equal), n), all(equal), {"splits": splits, "equal": equal})


def _trained(tools: Tools, state: mj.JointState, first: int, last: int) -> mj.JointState:
    for step in range(first, last):
        state, _ = tools.step(state, batches_at(step))
    return state


def nan(tools: Tools, n: int, seed: int) -> Outcome:
    """Spoils a tenth of some steps' batches, and leaves those updates out of another run."""
    random = np.random.default_rng(seed)
    bad = set(random.permutation(n)[: n // 10].tolist())
    state = expected = initial_state()
    skipped, others = 0, 0
    for step in range(n):
        batches = batches_at(step)
        if step in bad:
            for batch in batches.values():
                batch["image"][random.integers(len(batch["image"]))] = np.nan
            state, metrics = tools.step(state, batches)
            expected = expected.replace(step=expected.step + 1)
            skipped += metrics["source/skipped"] == metrics["target/skipped"] == 1
        else:
            state, metrics = tools.step(state, batches)
            expected, _ = tools.step(expected, batches)
            others += int(metrics["source/skipped"] + metrics["target/skipped"])
        tools.bar.update()
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.source, state.target, state.adapter)))
    same = digest(state) == digest(expected) and finite
    result = f"{counted(int(skipped), len(bad))} skipped, {others} others, {'same' if same else 'another'} end"
    figures = {"bad": sorted(bad), "skipped": int(skipped), "others": others, "same_end": same}
    return Outcome(result, skipped == len(bad) and others == 0 and same, figures)
