"""The parts of `benchmarks.torture` that kill, stop or refuse other processes, or leave them alone."""

import contextlib
import json
import os
import signal
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from benchmarks.torture_children import ADVICE, PATIENCE, Children, start_program
from benchmarks.torture_pair import KnownStates, digest, initial_state, shapes
from benchmarks.torture_part import Outcome, Tools, counted

__all__ = ["frozen", "kills", "peer", "sigterm", "writer"]


class _Restart(NamedTuple):
    """What was found when a child started, after `finished`, the newest step whose save was known to have ended."""

    finished: int
    step: int | None
    digest: str
    in_flight: bool


def _start_folder(folder: Path) -> None:
    with mj.Checkpoints(folder) as checkpoints:
        checkpoints.save(0, initial_state())


def kills(tools: Tools, n: int, seed: int) -> Outcome:
    """Kills children that save every step, after none to two finished saves and up to a fifth of a second more."""
    shares = [len(share) for share in np.array_split(np.arange(n), len(tools.children))]
    randoms = np.random.default_rng(seed).spawn(len(shares))

    def chain(children: Children, folder: Path, count: int, random: np.random.Generator) -> list[_Restart]:
        restarts, finished, in_flight = [], 0, False
        for kill in range(count + 1):
            child = children.start("train", folder)
            word, *values = children.until("restored")[-1]
            step, found = values if word == "restored" else (None, "")
            restarts.append(_Restart(finished, step, found, in_flight))
            if kill < count:
                for _ in range(random.integers(3)):
                    word, *values = children.until("finished")[-1]
                    if word == "ended":
                        raise RuntimeError(f"a child has ended by itself: {children.noise}")
                    finished = values[0]
                time.sleep(random.uniform(0, 0.2))
            if word != "ended":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                said = children.until("ended")
                finished = max([finished, *(step for word, step in said if word == "finished")])
            in_flight = any(folder.glob("*.orbax-checkpoint-tmp*"))
            tools.bar.update(kill < count)
        return restarts[1:]  # Nothing was killed before the first.

    folders = [tools.folder / f"chain-{i}" for i in range(len(shares))]
    for folder in folders:  # Not in the threads: Orbax does not save two folders at once in one process.
        _start_folder(folder)
    with ThreadPoolExecutor(len(shares)) as pool:
        futures = [
            pool.submit(chain, *options) for options in zip(tools.children, folders, shares, randoms, strict=True)
        ]
        restarts = [restart for future in futures for restart in future.result()]
    survived = sum(_is_known(tools.known, one.step, one.digest) for one in restarts)
    lost = sum(one.step is None or one.step < one.finished for one in restarts)
    in_flight = sum(one.in_flight for one in restarts)
    figures = {"survived": survived, "lost": lost, "in_flight": in_flight, "steps": [one.step for one in restarts]}
    result = f"{counted(survived, n)}, {lost} saves lost; {in_flight} kills in a save"
    return Outcome(result, survived == n and lost == 0, figures)


def _is_known(known: KnownStates, step: int | None, found: str) -> bool:
    return step is not None and found == known.digest(step)


def sigterm(tools: Tools, n: int, seed: int) -> Outcome:
    """Sends SIGTERM to children that run the training loop."""
    random = np.random.default_rng(seed)
    children, folder = tools.children[0], tools.folder / "run"
    _start_folder(folder)
    good, seconds, stops = 0, [], []
    before: tuple[int, str] = 0, tools.known.digest(0)
    for _ in range(n):
        child = children.start("run", folder)
        restored = tuple(children.until("restored")[-1][1:])
        said = children.until("reached")
        time.sleep(random.uniform(0, 0.3))
        sent = time.perf_counter()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        said += children.until("ended")
        seconds.append(time.perf_counter() - sent)
        reached = max((values[0] for word, *values in said if word == "reached"), default=None)
        stopped: tuple[int, str] = next((tuple(values) for word, *values in said if word == "stopped"), (0, ""))
        good += (
            restored == before
            and said[-1] == ["ended", 128 + signal.SIGTERM]
            and stopped[0] == reached
            and _is_known(tools.known, *stopped)
            and _saved(folder, tools.known) == stopped[0]
        )
        before = stopped
        stops.append(stopped[0])
        tools.bar.update()
    figures = {"good": good, "stopped_at": stops, "seconds": seconds}
    return Outcome(f"{counted(good, n)}, the slowest in {max(seconds):.2f} s", good == n, figures)


def _saved(folder: Path, known: KnownStates) -> int | None:
    """Returns the newest step that is saved, where it is what it should be."""
    with mj.Checkpoints(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(shapes()[0])
    if restored is None or digest(restored[1]) != known.digest(restored[0]):
        return None
    return restored[0]


def writer(tools: Tools, n: int, seed: int) -> Outcome:
    """Lets children write into the folder that this process has open; nothing is random."""
    del seed
    folder, children = tools.folder / "open", tools.children[0]
    refused, seconds = 0, []
    with mj.Checkpoints(folder) as checkpoints:
        for step in range(n):
            checkpoints.save(step, {"x": jnp.ones(3)})
            children.start("write too", folder)
            word, *values = children.until("refused")[-1]
            if word == "refused":
                children.until("ended")
                message, taken = values
                refused += "another run is writing into" in message and f"process {os.getpid()} on" in message
                seconds.append(taken)
            tools.bar.update()
        unharmed = checkpoints.latest_step == n - 1
    slowest = max(seconds, default=float("inf"))
    result = f"{counted(refused, n)}, the slowest in {slowest:.3f} s"
    return Outcome(result, refused == n and unharmed and slowest < 2, {"refused": refused, "seconds": seconds})


def peer(tools: Tools, n: int, seed: int) -> Outcome:
    """Kills one of two processes that train together over localhost: its connections close. Nothing is random."""
    del seed
    return _take_away(tools, n, signal.SIGKILL)


def frozen(tools: Tools, n: int, seed: int) -> Outcome:
    """Stops one of two processes for ever: it says no more than a host that is gone, and its connections stay.

    The other is aborted by JAX, from a thread of its own, and has our message all the same. Nothing is random.
    """
    del seed
    return _take_away(tools, n, signal.SIGSTOP)


def _take_away(tools: Tools, n: int, number: signal.Signals) -> Outcome:
    good, seconds, codes = 0, [], []
    for i in range(n):
        folder = tools.folder / f"peers-{i}"
        output, code, taken = _survivor_of_two(folder, number)
        seconds.append(taken)
        codes.append(code)
        ours = "error: process 0 of 2 cannot go on, or another one has gone" in output and ADVICE in output
        message = ours if number == signal.SIGKILL else "process 0 of 2 was ended" in output and ADVICE in output
        good += code != 0 and message and _holds_second_step(folder)
        tools.bar.update()
    result = f"{counted(good, n)}, in {max(seconds):.2f} s"
    return Outcome(result, good == n and max(seconds) < 10, {"good": good, "seconds": seconds, "codes": codes})


def _survivor_of_two(folder: Path, number: int) -> tuple[str, int, float]:
    """Returns what process 0 has printed, its exit code, and its seconds from the end of the other to its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    left, gone = (start_program("peer", str(int(number)), str(folder), address, str(i)) for i in range(2))
    try:
        output, _ = left.communicate(timeout=PATIENCE)
        ended = time.time()
    finally:
        for process in (left, gone):
            process.kill()
    said, _ = gone.communicate()
    times = [json.loads(line)[1] for line in said.splitlines() if line.startswith('["gone"')]
    return output, left.returncode, ended - times[0] if times else float("inf")


def _holds_second_step(folder: Path) -> bool:
    with warnings.catch_warnings(), mj.Checkpoints(folder, read_only=True) as checkpoints:
        warnings.simplefilter("ignore", mj.checkpoints.NotBitExactWarning)  # One process reads what two have saved.
        parts = checkpoints.restore_parts(2, {"total": jax.ShapeDtypeStruct((8,), jnp.float32)})
    return bool(np.array_equal(parts["total"], np.full(8, 2.0)))
