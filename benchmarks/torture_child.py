"""The separate processes of `benchmarks.torture`, which are killed, stopped and refused.

    python -m benchmarks.torture_child serve STEP_FILE
    python -m benchmarks.torture_child peer SIGNAL FOLDER COORDINATOR PROCESS_ID

`serve` imports everything and then forks a child for each line `[WORK, FOLDER, OPTIONS]` that it reads. At that time
nothing has been computed, so JAX has neither devices nor threads; a child is as good as a new process, without the
seconds for imports. Children report in lines of JSON.
"""

import functools
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

import merge_jax as mj
from benchmarks.torture_children import ADVICE
from benchmarks.torture_files import flip_each
from benchmarks.torture_pair import batches_at, digest, joint_step, load_step, shapes
from merge_jax.training.distributed import exit_on_error

__all__ = ["main", "say", "serve"]

_PAUSE = 0.002  # Seconds between steps, as data takes them.


def say(word: str, *values: Any) -> None:
    """Writes a message to whoever reads this process."""
    os.write(1, (json.dumps([word, *values]) + "\n").encode())  # Atomic: it is short.


def _train(folder: Path, step_file: Path) -> None:
    """Trains and saves every step until it is killed."""
    advance = load_step(step_file)
    with mj.Checkpoints(folder) as checkpoints:
        step, state = _restore(checkpoints)
        while True:
            state, _ = advance(state, batches_at(step))
            step += 1
            checkpoints.save(step, state)
            checkpoints.wait()
            say("finished", step)


def _run(folder: Path, step_file: Path) -> None:
    """Runs the training loop until a signal stops it; the exit code is that of the experiments."""

    def slow_batches(step: int) -> Mapping[str, mj.Batch]:
        time.sleep(_PAUSE)
        return batches_at(step)

    by_steps = mj.stepwise(load_step(step_file), slow_batches)

    def advance(state: mj.JointState, first: int, count: int) -> tuple[mj.JointState, Any]:
        state, metrics = by_steps(state, first, count)
        say("reached", first + count)
        return state, metrics

    with mj.Checkpoints(folder) as checkpoints, mj.StopSignals() as signals:
        _, state = _restore(checkpoints)
        state = mj.run_loop(
            advance,
            state,
            num_steps=10**6,
            report_every=100,
            report=lambda *unused: None,
            checkpoints=checkpoints,
            checkpoint_every=100,
            should_stop=signals.should_stop,
        )
    say("stopped", int(state.step), digest(state))
    raise SystemExit(128 + (signals.received or 0))


def _go_on(folder: Path, step_file: Path) -> None:
    """Restores and goes on to the tenth step, with a step that it compiles itself."""
    del step_file
    advance = jax.jit(joint_step)
    with mj.Checkpoints(folder, read_only=True) as checkpoints:
        step, state = _restore(checkpoints)
    for i in range(step, 10):
        state, _ = advance(state, batches_at(i))
    say("done", int(state.step), digest(state))


def _write_too(folder: Path, step_file: Path) -> None:
    """Tries to write into a folder that another process writes into."""
    del step_file
    start = time.perf_counter()
    try:
        mj.Checkpoints(folder).close()
        message = ""
    except ValueError as error:
        message = str(error)
    say("refused", message, time.perf_counter() - start)


def _flip(folder: Path, step_file: Path) -> None:
    """Flips bits of a saved step, each on its own, and restores it."""
    del step_file
    for effect in flip_each(folder):
        say("flipped", effect)


def _restore(checkpoints: mj.Checkpoints) -> tuple[int, mj.JointState]:
    with warnings.catch_warnings():
        # Nothing is damaged here, and the circumstances are the same: a warning is a failure.
        warnings.simplefilter("error")
        restored = checkpoints.restore_latest(shapes()[0])
    if restored is None:
        raise ValueError(f"nothing is saved in {checkpoints.folder}")
    say("restored", restored[0], digest(restored[1]))
    return restored


_WORKS: Mapping[str, Callable[[Path, Path], None]] = {
    "train": _train,
    "run": _run,
    "go on": _go_on,
    "write too": _write_too,
    "flip": _flip,
}


def serve(step_file: Path, works: Mapping[str, Callable[..., None]]) -> None:
    """Forks a child for each line of standard input: a list of the name of a work, its folder and its options."""
    shapes()  # Traced once, for all children.
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1:
        raise RuntimeError("there are other threads already, which a fork would lose")
    say("ready")
    for line in sys.stdin:
        work, folder, options = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_code_of(functools.partial(works[work], Path(folder), step_file, **options)))
        _, status = os.waitpid(child, 0)
        say("ended", os.waitstatus_to_exitcode(status))


def _code_of(work: Callable[[], None]) -> int:
    say("pid", os.getpid())
    try:
        work()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Counter(struct.PyTreeNode):
    """A state of two processes: the number of its steps, and eight numbers that lie on both."""

    step: jax.Array
    total: jax.Array


def _peer(number: int, folder: str, process_id: int) -> None:
    """Trains and saves every second step with another process; process 1 sends itself a signal in its fourth step."""
    mesh = mj.data_mesh()
    split = NamedSharding(mesh, PartitionSpec(mj.training.DATA_AXIS))
    total = jax.make_array_from_callback((8,), split, lambda index: np.zeros(8, np.float32)[index])
    state = _Counter(jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec())), total)

    @jax.jit
    def step_fn(state: _Counter, batches: Any) -> tuple[_Counter, dict[str, jax.Array]]:
        del batches
        sum_of_both = jnp.sum(state.total)  # An exchange of numbers.
        return _Counter(state.step + 1, state.total + 1 + 0 * sum_of_both), {"sum": sum_of_both}

    def batches(step: int) -> dict[str, Any]:
        if step == 3 and process_id == 1:
            checkpoints.wait()
            say("gone", time.time())
            os.kill(os.getpid(), number)
        return {}

    with mj.Checkpoints(folder) as checkpoints, mj.StopSignals() as signals:
        mj.run_loop(
            mj.stepwise(step_fn, batches),
            state,
            num_steps=100,
            report_every=2,
            report=lambda *unused: None,
            checkpoints=checkpoints,
            checkpoint_every=2,
            should_stop=signals.should_stop,
        )


def main() -> None:
    """Does what the command line says."""
    role, *arguments = sys.argv[1:]
    if role == "serve":
        serve(Path(arguments[0]), _WORKS)
    else:
        number, folder, address, process_id = arguments
        mj.training.connect(address, 2, int(process_id), timeout=60, answer_within=60)
        with exit_on_error(ADVICE):
            _peer(int(number), folder, int(process_id))


if __name__ == "__main__":
    main()
