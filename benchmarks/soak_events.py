"""The events of `benchmarks.soak`, one at a time; each leaves the run resumable."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

import merge_jax as mj
from benchmarks.damage import DAMAGE
from benchmarks.soak_child import checkpoints_of
from benchmarks.soak_run import Soak, end
from benchmarks.torture_pair import digest, shapes

__all__ = ["EVENTS", "small_disk"]

Random = np.random.Generator

_DAMAGE = (
    "a flipped bit",
    "numbers cut short",
    "numbers cut to nothing",
    "numbers gone",
    "zeros for numbers",
    "an empty step",
    "a file for a step",
    "no state",
    "no tree",
    "no index",
    "an index cut short",
    "no metadata",
    "metadata cut short",
    "no manifest",
)
"""Those of `DAMAGE` that do not depend on the step's number."""
_YEARS = 365.25 * 24 * 3600
_DISK = 16  # MiB of the small disk.


def _options(random: Random) -> dict[str, object]:
    return {"save_every": int(random.choice([5, 10, 20])), "wait": bool(random.random() < 0.5)}


def kill(soak: Soak, random: Random) -> None:
    """Kills a child: as it starts, or while it trains and saves."""
    children = soak.children()
    child = children.start("train", soak.folder, **_options(random) | {"save_every": 5})
    if random.random() < 0.2:
        time.sleep(random.uniform(0, 0.5))
        said = end(children, child, signal.SIGKILL)
        if any(word == "restored" for word, *_ in said):
            soak.check_start([line for line in said if line[0] == "restored"], "kill")
    else:
        said = children.until("restored")
        soak.check_start(said, "kill")
        time.sleep(random.uniform(0, 1))
        said += end(children, child, signal.SIGKILL)
    soak.tally.figures["kills in a save"] += any(checkpoints_of(soak.folder).glob("*.orbax-checkpoint-tmp*"))
    soak.take(said)
    if said[-1] != ["ended", -signal.SIGKILL]:
        soak.tally.note(f"kill: it ended with {said[-3:]}")


def sigterm(soak: Soak, random: Random, event: str = "sigterm", **options: object) -> None:
    """Asks a child to stop: the step that it reached is saved."""
    children = soak.children()
    child = children.start("train", soak.folder, **_options(random), **options)
    said = children.until("restored")
    soak.check_start(said, event)
    time.sleep(random.uniform(0, 1))
    said += end(children, child, signal.SIGTERM)
    soak.take(said)
    if event == "clock" and soak.refusal(said, event, ("was not saved in", "the system clock changed")):
        return
    if said[-1] != ["ended", 128 + signal.SIGTERM]:
        soak.tally.note(f"{event}: it ended with {said[-3:]}")


def clock(soak: Soak, random: Random) -> None:
    """Dates all files years away, and lets the clock jump while a child trains."""
    now = time.time()
    for path in soak.folder.rglob("*"):
        date = now + random.uniform(-20, 20) * _YEARS
        os.utime(path, (date, date), follow_symlinks=False)
    sigterm(soak, random, "clock", clock=[float(off) for off in random.uniform(-5, 5, 7) * _YEARS])


def writers(soak: Soak, random: Random) -> None:
    """Lets two processes write into the folder, from the start or later: one is refused, the other goes on."""
    both = soak.children(0), soak.children(1)
    options = _options(random)
    first = both[0].start("train", soak.folder, **options)
    at_once = bool(random.random() < 0.5)
    said = [[], []] if at_once else [both[0].until("restored"), []]
    second = both[1].start("train", soak.folder, **options)
    for i in range(at_once ^ 1, 2):
        said[i] = both[i].until("restored")
    going = [i for i in range(2) if said[i][-1][0] == "restored"]
    if len(going) != 1:
        soak.tally.silent += len(going) == 2
        soak.tally.note(f"writers: {len(going)} of two processes write: {[lines[-3:] for lines in said]}")
    for i, child in enumerate((first, second)):
        if i in going:
            soak.check_start(said[i], "writers")
            time.sleep(random.uniform(0, 0.5))
            said[i] += end(both[i], child, signal.SIGTERM)
            soak.take(said[i])
        else:
            other = (second, first)[i]
            soak.refusal(said[i], "writers", ("another run is writing into", f"process {other} on"))


def spoiled(soak: Soak, random: Random) -> None:
    """Gives a copy of the run nothing but batches with NaN: its parameters stay, and it ends with a message."""
    with _copy(soak) as folder:
        before = _params(folder)
        children = soak.children()
        children.start("train", folder, all_spoiled=True)
        said = children.until("restored")
        soak.check_start(said, "nan")
        said += children.until("ended")
        if not soak.refusal(said, "nan", ("NumericFaultError", "was not finite in the last 100 steps")):
            soak.tally.note(f"nan: it went on: {said[-3:]}")
        after = _params(folder)
        if before[0] >= after[0] or before[1] != after[1]:
            soak.tally.silent += 1
            soak.tally.note(f"nan: the parameters of step {before[0]} are not those of step {after[0]}")
    del random


def _params(folder: Path) -> tuple[int, str]:
    """Returns the newest step, and the digest of both models' parameters."""
    state = shapes()[0]
    parts = {"source/params": state.source.params, "target/params": state.target.params}
    with mj.Checkpoints(checkpoints_of(folder), read_only=True) as checkpoints:
        step = checkpoints.latest_step or 0
        return step, digest(checkpoints.restore_parts(step, parts))


def disk(soak: Soak, random: Random) -> None:
    """Moves the run to a small disk that fills up, by all it has or by the size of one file; then there is room."""
    with small_disk(soak.folder.with_name("disk")) as disk_folder:
        mounted = disk_folder is not None
        soak.mounted = f"a tmpfs of {_DISK} MiB" if mounted else "RLIMIT_FSIZE alone, since mount is not allowed"
        moved = shutil.move(soak.folder, disk_folder / "run") if disk_folder else soak.folder
        at_home, soak.folder = soak.folder, Path(moved)
        try:
            if disk_folder is not None and random.random() < 0.7:
                _fill(soak, random, disk_folder)
            else:
                _limit(soak, random)
            sigterm(soak, random, "after a full disk")
        finally:
            if soak.folder != at_home:
                shutil.move(soak.folder, at_home)
            soak.folder = at_home


def _fill(soak: Soak, random: Random, disk_folder: Path) -> None:
    filler = disk_folder / "filler"
    left = int(random.choice([0, 4, 16, 64, 256])) * 1024 + int(random.integers(4096))
    with filler.open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk_folder).free - left)))
    _train_until_full(soak, random)
    filler.unlink()


def _limit(soak: Soak, random: Random) -> None:
    _train_until_full(soak, random, largest_file=int(random.choice([0, 100, 1000, 5000, 20000])))


def _train_until_full(soak: Soak, random: Random, **options: object) -> None:
    children = soak.children()
    child = children.start("train", soak.folder, **_options(random), **options)
    said = children.until("restored")
    if said[-1][0] == "restored":
        soak.check_start(said, "disk")
        time.sleep(random.uniform(0.5, 2))
        said += end(children, child, signal.SIGTERM)  # There may be room for all that it writes.
    soak.take(said)
    if not soak.refusal(said, "disk", (str(soak.folder),)):
        soak.tally.figures["disks with room for all"] += 1
        if said[-1] != ["ended", 128 + signal.SIGTERM]:
            soak.tally.note(f"disk: it ended with {said[-3:]}")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Yields a folder with a file system of its own and little room; None where that is not allowed."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}m", "none", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def damage(soak: Soak, random: Random) -> None:
    """Damages the newest step: the one before comes back, with a warning, or the newest as it was."""
    folder = checkpoints_of(soak.folder)
    steps = _steps(folder)
    if len(steps) < 2:
        return sigterm(soak, random, "before a damage")
    *_, before, newest = steps
    spoil(folder / str(newest), random)
    soak.finished = before
    children = soak.children()
    child = children.start("train", soak.folder, **_options(random))
    said = children.until("restored")
    word, *values = said[-1]
    harmless = word == "restored" and values[0] == newest
    soak.tally.figures["damage to what nothing reads"] += harmless
    step = soak.check_start(said, "damage", allowed=None if harmless else "DamagedCheckpointWarning")
    soak.tally.refused["damage"] += step == before
    time.sleep(random.uniform(0, 1))
    said += end(children, child, signal.SIGTERM)
    return soak.take(said)


def all_damaged(soak: Soak, random: Random) -> None:
    """Damages all steps of a copy: nothing restarts."""
    with _copy(soak) as folder:
        for step in (steps := _steps(checkpoints_of(folder))):
            DAMAGE["a flipped bit"].spoil(checkpoints_of(folder) / str(step))
        children = soak.children()
        children.start("train", folder)
        said = children.until("ended")
        words = ("CheckpointError", "damaged checkpoint", "there is no other step to restore")
        if steps and not soak.refusal(said, "all damaged", words):
            soak.tally.silent += 1
            soak.tally.note(f"all damaged: it went on: {said[-3:]}")
    del random


def spoil(step_folder: Path, random: Random) -> None:
    """Damages a step: in a known way, or some bytes or the length of one of its files."""
    files = sorted(path for path in step_folder.rglob("*") if path.is_file() and path.stat().st_size)
    kind = random.integers(3)
    if kind == 0:
        DAMAGE[str(random.choice(_DAMAGE))].spoil(step_folder)
        return
    path = files[random.integers(len(files))]
    content = bytearray(path.read_bytes())
    if kind == 1:
        for at in random.integers(len(content), size=random.integers(1, 65)):
            content[at] ^= 1 << int(random.integers(8))
    else:
        content = content[: random.integers(len(content))]
    path.write_bytes(content)


def _steps(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def other_version(soak: Soak, random: Random) -> None:
    """Goes on with a copy of the run under another version of JAX, and then again under this one."""
    if soak.other_python is None:
        return
    with _copy(soak) as folder:
        children = soak.children(python=soak.other_python)
        child = children.start("train", folder, compiles=True, wait=False)
        said = children.until("restored")
        step = soak.check_start(said, "another JAX", allowed="NotBitExactWarning" if soak.finished else None)
        time.sleep(random.uniform(0, 3))
        said += end(children, child, signal.SIGTERM)
        stopped = next((values for word, *values in said if word == "stopped"), None)
        if step is None or stopped is None:
            soak.tally.note(f"another JAX: it ended with {said[-3:]}")
            return
        soak.tally.figures["bits of another JAX equal"] += stopped[1] == soak.known.digest(stopped[0])
        children = soak.children()
        child = children.start("train", folder)
        back = children.until("restored")
        end(children, child, signal.SIGKILL)
        word, *values = back[-1]
        if word != "restored" or values[0] < stopped[0]:
            soak.tally.lost += 1
            soak.tally.note(f"another JAX: step {stopped[0]} did not come back: {back[-3:]}")
        elif values[:2] != stopped:
            soak.tally.silent += 1
            soak.tally.note(f"another JAX: {stopped} came back as {values}")
        elif jax.__version__ not in str(values[2]):
            soak.tally.note(f"another JAX: nothing was said of it: {values[2]}")


@contextlib.contextmanager
def _copy(soak: Soak) -> Iterator[Path]:
    folder = soak.folder.with_name("copy")
    shutil.copytree(soak.folder, folder, symlinks=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


EVENTS: dict[str, tuple[float, Callable[[Soak, Random], object]]] = {
    "kill": (4, kill),
    "sigterm": (2, sigterm),
    "full disk": (2, disk),
    "nan": (1, spoiled),
    "damage": (3, damage),
    "all damaged": (0.5, all_damaged),
    "clock": (1, clock),
    "two writers": (2, writers),
    "another JAX": (0.7, other_version),
}
"""By name, how often an event happens beside the others, and what does it."""
